"""Run files and overrides: precedence, paths, and errors for what a person types wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.config.load import load_pretrain_config
from deepseek_ray.config.model import ModelConfig
from deepseek_ray.config.yaml_file import read_yaml
from deepseek_ray.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_FILES = sorted((REPOSITORY / "configs").glob("*.yaml"))

RUN_FILE = """
name: example
model:
  hidden_size: 32
  intermediate_size: 64
  moe_intermediate_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  n_routed_experts: 4
  num_experts_per_tok: 2
  kv_lora_rank: 16
  qk_rope_head_dim: 8
  qk_nope_head_dim: 8
  v_head_dim: 8
data: {sequence_length: 64}
schedule: {warmup_steps: 1}
training: {steps: 10}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    return path


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_shipped_run_file_loads(path: Path) -> None:
    config = load_pretrain_config(path)
    assert config.model.model_type in ("deepseek_v2", "deepseek_v3")


def test_there_are_run_files() -> None:
    assert {"tiny.yaml", "quickstart.yaml"} <= {path.name for path in RUN_FILES}


def test_overrides_beat_the_file_and_the_last_one_wins(run_file: Path) -> None:
    config = load_pretrain_config(
        run_file, ["training.steps=20", "training.steps=30", "optimizer.lr=1e-3", "optimizer.betas=[0.8, 0.9]"]
    )
    assert config.training.steps == 30
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.data.sequence_length == 64


def test_null_and_new_sections_can_be_set(run_file: Path) -> None:
    config = load_pretrain_config(run_file, ["training.steps=null", "training.tokens=1000", "distributed.timeout_s=60"])
    assert config.training.steps is None
    assert config.distributed.timeout_s == 60


def test_model_may_be_the_path_of_a_config_json(tmp_path: Path, run_file: Path) -> None:
    import json

    model = load_pretrain_config(run_file).model
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(model.to_hf()))
    head, tail = RUN_FILE.split("model:")
    tail = tail[tail.index("data:") :]
    for reference in ("model", "model/config.json"):
        run_file.write_text(f"{head}model: {reference}\n{tail}")
        loaded = load_pretrain_config(run_file, ["model.rms_norm_eps=1e-5"]).model
        expected = ModelConfig.from_dir(tmp_path / "model").model_dump() | {"rms_norm_eps": 1e-5}
        assert loaded.model_dump() == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stpes=5", r"run.yaml with --set: unknown key 'training.stpes'; did you mean 'steps'"),
        ("training.steps", r"not of the form key=value"),
        ("training..steps=5", r"not of the form key=value"),
        ("name.inner=5", r"name is 'example', which has no keys inside"),
        ("training.steps=[1", r"--set 'training.steps=\[1' is not valid YAML|not valid YAML"),
        ("training.steps=many", r"training.steps is 'many'"),
    ],
)
def test_bad_overrides_are_named(run_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pretrain_config(run_file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", r"key 'name' is given twice"),
        ("training:\n  steps: 1\n  steps: 2\n", r"key 'steps' is given twice"),
        ("- a\n- b\n", r"holds a list; a run file is a mapping"),
        ("", r"holds a NoneType"),
        ("a: [1\n", r"not valid YAML"),
        ("5: a\n", r"key 5 is not a string"),
        ("a: !!python/object/apply:os.system ['true']\n", r"not valid YAML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml does not exist; give the path of a run file"):
        load_pretrain_config(tmp_path / "nowhere.yaml")


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("a: 1e-4\nb: -2E3\nc: 1e\nd: 12\n")
    assert read_yaml(path) == {"a": 1e-4, "b": -2000.0, "c": "1e", "d": 12}
