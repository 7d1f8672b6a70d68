"""What counts in a configuration and where it is from: precedence, and a printed form that reads back the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deepseek_ray.config.load import load_config, load_pretrain_config, load_values
from deepseek_ray.config.origins import effective_values, to_yaml
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.config.serving import ServingConfig
from deepseek_ray.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "configs" / "tiny.yaml"


def origins(path: Path, *overrides: str) -> dict[str, str]:
    config = load_pretrain_config(path, overrides)
    loaded = load_values(PretrainConfig, path, overrides)
    return {".".join(value.path): value.origin for value in effective_values(config, loaded.origins)}


def line_of(path: Path, text: str) -> str:
    (number,) = [n for n, line in enumerate(path.read_text().splitlines(), start=1) if line.strip().startswith(text)]
    return f"{path}:{number}"


def test_the_stronger_source_wins_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY__TRAINING__MICRO_BATCH_SIZE", "4")
    monkeypatch.setenv("DEEPSEEK_RAY__TRAINING__STEPS", "7")
    config = load_pretrain_config(TINY, ["training.steps=20"])
    assert (config.training.steps, config.training.micro_batch_size) == (20, 4)
    found = origins(TINY, "training.steps=20")
    assert found["training.steps"] == "--set training.steps=20"
    assert found["training.micro_batch_size"] == "DEEPSEEK_RAY__TRAINING__MICRO_BATCH_SIZE"
    assert found["training.global_batch_size"] == line_of(TINY, "global_batch_size")
    assert found["optimizer.lr"] == line_of(TINY, "optimizer:")
    assert found["optimizer.eps"] == "default"
    assert found["model.vocab_size"] == "derived"


def test_a_section_set_as_a_whole_forgets_the_file(tmp_path: Path) -> None:
    found = origins(TINY, "training={steps: 5, global_batch_size: 8}")
    assert found["training.global_batch_size"] == "--set training={steps: 5, global_batch_size: 8}"
    assert found["training.checkpoint_interval"] == "default"


def test_items_of_a_list_have_their_own_lines(tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text("models:\n- model_dir: /a\n  threads: 2\n- {model_dir: /b,\n   name: second}\n")
    loaded = load_values(ServingConfig, path)
    config = load_config(ServingConfig, path)
    values = effective_values(config, loaded.origins)
    found = {".".join(value.path): value.origin for value in values}
    assert found["models.0.threads"] == f"{path}:3"
    assert found["models.1.name"] == f"{path}:5"
    assert found["models.1.engine.max_num_seqs"] == "default"
    path.write_text(to_yaml(values))
    assert load_config(ServingConfig, path) == config


def test_fields_of_a_named_config_json_are_from_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config_json = tmp_path / "model" / "config.json"
    config_json.write_text(json.dumps(load_pretrain_config(TINY).model.to_hf()))
    path = tmp_path / "run.yaml"
    values = yaml.safe_load(TINY.read_text())
    path.write_text(yaml.safe_dump({**values, "model": "model"}))
    found = origins(path, "model.rms_norm_eps=1e-5")
    assert found["model.hidden_size"] == str(config_json)
    assert found["model.rms_norm_eps"] == "--set model.rms_norm_eps=1e-5"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("with_origin", [False, True])
def test_what_is_shown_reads_back_as_the_same(path: Path, with_origin: bool, tmp_path: Path) -> None:
    overrides = ["optimizer.betas=[0.8, 0.9]", "storage_path='/ruño: #1'"]
    config = load_pretrain_config(path, overrides)
    values = effective_values(config, load_values(PretrainConfig, path, overrides).origins)
    shown = tmp_path / "shown.yaml"
    shown.write_text(to_yaml(values, with_origin), encoding="utf-8")
    assert load_pretrain_config(shown) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEEPSEEK_RAY__TRAINING__STPES", "5", r"with DEEPSEEK_RAY__TRAINING__STPES: unknown key 'training.stpes'"),
        ("DEEPSEEK_RAY__", "5", r"DEEPSEEK_RAY__='5' is not of the form key=value"),
        ("DEEPSEEK_RAY__NAME__INNER", "5", r"DEEPSEEK_RAY__NAME__INNER='5': name is 'tiny', which has no keys inside"),
        ("DEEPSEEK_RAY__TRAINING__STEPS", "[1", r"DEEPSEEK_RAY__TRAINING__STEPS='\[1' is not valid YAML"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        load_pretrain_config(TINY)


def test_settings_of_other_tools_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_TEST_DATA", "somewhere")
    assert load_pretrain_config(TINY).training.steps == 40
