"""The JSON Schema takes what the classes take, and the page written from it is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deepseek_ray.config.kinds import KINDS, find_kind
from deepseek_ray.config.reference import reference_markdown
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.config.schema import json_schema
from deepseek_ray.config.yaml_file import read_yaml
from deepseek_ray.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "configs" / "tiny.yaml"


def validator(kind: str = "pretrain") -> jsonschema.Draft202012Validator:
    schema = json_schema(KINDS[kind].config_class)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_run_file_fits_the_schema(path: Path) -> None:
    validator().validate(read_yaml(path))


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "finetune").glob("*.yaml")), ids=lambda path: path.name
)
def test_a_fine_tuning_file_needs_no_model(path: Path) -> None:
    values = read_yaml(path)
    validator("finetune").validate(values)
    assert validator("finetune").is_valid({**values, "model": {"rms_norm_eps": 1e-5}})
    assert not validator("finetune").is_valid({key: value for key, value in values.items() if key != "base_model"})


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("training", {"stpes": 5}),
        ("training", {"precision": "fp16"}),
        ("model", {"hidden_size": 0}),
        ("optimizer", {"lr": 0}),
        ("data", {"vocab_size": "many"}),
    ],
)
def test_the_schema_refuses_what_the_classes_refuse(section: str, changes: dict[str, Any]) -> None:
    values = read_yaml(TINY)
    values[section] = {**values[section], **changes}
    assert not validator().is_valid(values)
    with pytest.raises(ConfigError):
        PretrainConfig.parse(values)


def test_a_model_may_be_the_path_of_a_config_json() -> None:
    assert validator().is_valid({**read_yaml(TINY), "model": "model/config.json"})
    assert not validator().is_valid({**read_yaml(TINY), "model": 5})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_schema_that_knows_all_keys(kind: str) -> None:
    cls = KINDS[kind].config_class
    schema = validator(kind).schema
    assert schema["properties"].keys() == cls.model_fields.keys()
    assert schema["additionalProperties"] is False


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--kind is 'sweeps'; there are: pretrain"):
        find_kind("sweeps")


def test_every_key_is_on_the_page_once() -> None:
    page = reference_markdown()
    for key in (
        "model.hidden_size",
        "model.rope_scaling.factor",
        "optimizer.betas",
        "training.steps",
        "distributed.strategy",
    ):
        assert page.count(f"| `{key}` |") == 1
    assert '| `training.precision` | choice | `"fp32"` | `bf16`, `fp32` |' in page
    assert "| `optimizer.betas` | [number, number] | `[0.9, 0.95]` |" in page
    assert "| `training.steps` | integer or null | `null` | >= 1 |" in page


def test_the_page_is_current() -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference_markdown(), (
        "docs/configuration.md is not what the configuration classes say now; run "
        "`deepseek-ray config reference > docs/configuration.md`"
    )
