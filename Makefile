# Everything a person types. `make venv` runs once; the other targets call it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv quickstart test test-slow check bench bench-check chaos test-gpu clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing deepseek_ray and what it needs into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: venv
	@$(BIN)/python -m deepseek_ray.cli.main quickstart

test: venv
	@$(BIN)/python tests/run.py

test-slow: venv
	@$(BIN)/python -m pytest -m slow

check: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: venv
	@$(BIN)/python -m benchmarks.run

bench-check: venv
	@$(BIN)/python -m benchmarks.check

chaos: venv
	@$(BIN)/python -m benchmarks.failures runs/quickstart/model

test-gpu: venv
	@$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) .cache runs build *.egg-info
