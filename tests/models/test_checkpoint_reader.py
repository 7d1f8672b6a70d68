"""CheckpointReader: what it reads, and each thing that can be wrong with a directory."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_random_checkpoint
from safetensors.torch import load_file, save_file

from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.load import load_model
from deepseek_ray.models.mapped_memory import is_mapped

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", tiny_config())


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint with the reference writer."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def problem(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(directory).validate()
    return str(caught.value)


def test_reads_names_shapes_dtypes_and_values(directory: Path) -> None:
    reader = CheckpointReader(directory)
    reader.validate()
    reader.check_finite()
    oracle = load_file(directory / "model.safetensors")
    assert set(reader.names) == set(oracle)
    for name, tensor in oracle.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.tensor(name), tensor)
    assert reader.tensor(GATE, torch.bfloat16).dtype == torch.bfloat16
    assert GATE in reader
    assert reader.config == tiny_config()


def test_validation_reads_no_weight(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("validate read a tensor")

    monkeypatch.setattr(CheckpointReader, "tensor", forbidden)
    CheckpointReader(directory).validate()


def test_missing_extra_and_misshapen_tensors_are_named_in_one_message(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[GATE]
        tensors["model.layers.0.self_attn.rogue.weight"] = torch.zeros(2, 3)
        tensors["model.norm.weight"] = torch.zeros(31)

    rewrite(directory, change)
    message = problem(directory)
    assert f"1 missing: {GATE} [16, 32]" in message
    assert "1 unknown: model.layers.0.self_attn.rogue.weight [2, 3]" in message
    assert "1 misshapen: model.norm.weight has shape [31], config.json asks for [32]" in message
    assert "same model" in message


def test_long_lists_are_cut(directory: Path) -> None:
    edit_config(directory, n_routed_experts=16)
    assert "and 43 more" in problem(directory)  # 2 layers x 8 experts x 3 tensors missing, 5 of them listed


def test_load_model_fails_before_it_allocates(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(directory, hidden_size=2**20)  # terabytes, if it were built
    with pytest.raises(CheckpointError, match=r"config\.json asks for \[96, 1048576\]"):
        load_model(directory)


def test_directory_file_and_weights_missing(tmp_path: Path, directory: Path) -> None:
    assert "not a directory" in problem(tmp_path / "absent")
    (directory / "model.safetensors").unlink()
    assert "has no weights" in problem(directory)
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "model.safetensors.index.json" in problem(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth"])
def test_pickle_only_directories_are_refused(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory / name)
    message = problem(directory)
    assert name in message
    assert "run any code" in message
    assert "Convert them to safetensors" in message


def test_remote_code_is_refused(directory: Path) -> None:
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"})
    with pytest.raises(ConfigError, match="remove the auto_map key"):
        CheckpointReader(directory)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def broken_json(path: Path) -> None:
    path.write_bytes((16).to_bytes(8, "little") + b"{not json at all" + b"\0" * 64)


def overlapping(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)


@pytest.mark.parametrize(
    "damage", [cut_short, huge_header, broken_json, overlapping, lambda path: path.write_bytes(b"")]
)
def test_damaged_files_are_named(directory: Path, damage: Callable[[Path], object]) -> None:
    damage(directory / "model.safetensors")
    message = problem(directory)
    assert "model.safetensors is not a readable safetensors file" in message
    assert "again" in message


def sharded(tmp_path: Path) -> Path:
    source = CheckpointReader(write_random_checkpoint(tmp_path / "one", tiny_config()))
    from deepseek_ray.models.save import save_checkpoint

    tensors = [(name, source.tensor(name)) for name in source.names]
    save_checkpoint(tmp_path / "many", source.config, tensors, max_shard_bytes=40_000)
    return tmp_path / "many"


def test_sharded_equals_single(tmp_path: Path) -> None:
    many = CheckpointReader(sharded(tmp_path))
    many.validate()
    one = CheckpointReader(tmp_path / "one")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert set(many.names) == set(one.names)
    assert all(torch.equal(many.tensor(name), one.tensor(name)) for name in one.names)


@pytest.mark.parametrize("file", ["../one/model.safetensors", "/etc/passwd", "..", "sub/a.safetensors", "a.bin"])
def test_index_paths_never_leave_the_directory(tmp_path: Path, file: str) -> None:
    directory = sharded(tmp_path)
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(values))
    message = problem(directory)
    assert repr(file) in message
    assert "never a path" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_broken_index(tmp_path: Path, text: str) -> None:
    directory = sharded(tmp_path)
    (directory / "model.safetensors.index.json").write_text(text)
    assert "is no safetensors index" in problem(directory)


def test_missing_shard_and_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first, last = (f"model-{n:05d}-of-{len(set(values['weight_map'].values())):05d}.safetensors" for n in (1, 2))
    values["weight_map"]["model.embed_tokens.weight"] = last
    index.write_text(json.dumps(values))
    assert f"places model.embed_tokens.weight in {last}" in problem(directory)
    (directory / first).unlink()
    assert f"names {first}, which is not there" in problem(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_found_by_name(directory: Path, value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE][5, 7] = value

    rewrite(directory, poison)
    CheckpointReader(directory).validate()  # headers are fine
    for read in (lambda: CheckpointReader(directory).tensor(GATE), lambda: load_model(directory)):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert f"tensor {GATE} holds 1 values that are not finite" in str(caught.value)
        assert "[5, 7]" in str(caught.value)
    with pytest.raises(CheckpointError, match="not finite"):
        CheckpointReader(directory).check_finite()
    assert not CheckpointReader(directory, check_finite=False).tensor(GATE).isfinite().all()


def test_large_finite_weights_are_not_mistaken_for_infinity(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors[GATE].fill_(3e38))
    assert CheckpointReader(directory).tensor(GATE).isfinite().all()


def test_integer_weights_and_unknown_names(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({GATE: torch.zeros(16, 32, dtype=torch.int8)}))
    assert f"tensor {GATE} has dtype I8" in problem(directory)
    with pytest.raises(CheckpointError, match="has no tensor nowhere"):
        CheckpointReader(directory).tensor("nowhere")


def test_harmless_extras_are_let_through(tmp_path: Path) -> None:
    directory = write_random_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True, n_shared_experts=0))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(96, 32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.1.mlp.shared_experts.gate_proj.weight"] = torch.zeros(0, 32)

    rewrite(directory, change)
    CheckpointReader(directory).validate()


def test_mtp_layers_may_be_absent_unwanted_but_not_half_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_random_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=1))
    assert CheckpointReader(directory).has_mtp

    edit_config(directory, num_nextn_predict_layers=0)  # there but not asked for
    reader = CheckpointReader(directory)
    reader.validate()
    assert not reader.has_mtp

    edit_config(directory, num_nextn_predict_layers=1)
    rewrite(directory, lambda tensors: tensors.pop("model.layers.3.enorm.weight"))
    assert "1 missing: model.layers.3.enorm.weight [32]" in problem(directory)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    rewrite(directory, drop)  # what transformers saves
    with caplog.at_level(logging.WARNING):
        reader = CheckpointReader(directory)
        reader.validate()
    assert not reader.has_mtp
    assert "multi-token prediction is off" in caplog.text


def test_too_many_layers_are_not_taken_for_mtp_layers(tmp_path: Path) -> None:
    directory = write_random_checkpoint(tmp_path, tiny_config(num_hidden_layers=4))
    edit_config(directory, num_hidden_layers=3)
    assert "unknown: " in problem(directory)


def resident_bytes(path: Path) -> int:
    """Of this process's mappings of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is resident")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_of_a_tensor_that_is_let_go_are_not_resident(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write_random_checkpoint(tmp_path / "model", tiny_config(vocab_size=20_000))
    reader, name = CheckpointReader(directory), "model.embed_tokens.weight"
    tensor = reader.tensor(name, dtype)
    values, before = tensor.clone(), resident_bytes(directory / "model.safetensors")
    assert before >= 20_000 * reader.config.hidden_size * 4
    reader.let_go(name, tensor)
    assert resident_bytes(directory / "model.safetensors") < before / 2
    assert torch.equal(reader.tensor(name, dtype), values), "read again, it is what it was"
    assert not is_mapped(torch.zeros(10), directory / "model.safetensors")
