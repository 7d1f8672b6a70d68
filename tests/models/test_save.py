"""save_checkpoint: files others can read, all or nothing."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config
from safetensors import safe_open
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.save import save_checkpoint
from deepseek_ray.models.shapes import parameter_shapes


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


def test_reference_reader_reads_every_byte(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    save_checkpoint(tmp_path, config, tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    """Readers map the file; a float32 bias after an odd number of bfloat16 values would be misaligned."""
    config = tiny_config(n_routed_experts=6, hidden_size=36, kv_lora_rank=15)
    save_checkpoint(tmp_path, config, random_tensors(config).items(), dtype=torch.bfloat16)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0, name


def test_dtype_is_stored_and_said_but_correction_biases_stay_float32(tmp_path: Path) -> None:
    config = tiny_config()
    save_checkpoint(tmp_path, config, random_tensors(config).items(), dtype=torch.bfloat16)
    reader = CheckpointReader(tmp_path)
    for name in reader.names:
        bias = name.endswith("e_score_correction_bias")
        assert reader.dtype(name) == (torch.float32 if bias else torch.bfloat16), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_and_index(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    save_checkpoint(tmp_path, config, tensors.items(), max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in tensors.values())
    assert all((tmp_path / file).stat().st_size < 40_000 for file in files)


def test_replacing_a_checkpoint_leaves_no_old_weights_and_keeps_other_files(tmp_path: Path) -> None:
    config = tiny_config()
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(tmp_path, config, random_tensors(config).items(), max_shard_bytes=30_000)
    save_checkpoint(tmp_path, config, random_tensors(config, seed=1).items())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    norm = CheckpointReader(tmp_path).tensor("model.norm.weight")
    assert torch.equal(norm, random_tensors(config, seed=1)["model.norm.weight"])


def test_a_checkpoint_may_be_saved_over_the_one_it_is_read_from(tmp_path: Path) -> None:
    config = tiny_config()
    save_checkpoint(tmp_path, config, random_tensors(config).items())
    reader = CheckpointReader(tmp_path)
    save_checkpoint(tmp_path, config, ((name, reader.tensor(name)) for name in reader.names), max_shard_bytes=30_000)
    again = CheckpointReader(tmp_path)
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in random_tensors(config).items())


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    save_checkpoint(tmp_path, config, tensors.items())
    assert torch.equal(CheckpointReader(tmp_path).tensor("lm_head.weight"), tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.norm.weight", torch.zeros(31), ["model.norm.weight", "[31]", "[32]"]),
        ("model.rogue", torch.zeros(2), ["model.rogue", "no such tensor"]),
        ("model.norm.weight", torch.full((32,), torch.nan), ["model.norm.weight", "32 values that are not finite"]),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int64), ["model.norm.weight", "int64"]),
    ],
)
def test_wrong_tensors_are_named_and_nothing_stays(tmp_path: Path, name: str, tensor: Tensor, words: list[str]) -> None:
    config = tiny_config()
    tensors = {**random_tensors(config), name: tensor}
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "new", config, tensors.items())
    assert all(word in str(caught.value) for word in words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.experts.7.down_proj.weight"])
def test_forgotten_tensors_are_named(tmp_path: Path, name: str) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"1 tensors were not given to save: {name}"):
        save_checkpoint(tmp_path, config, tensors.items())


@pytest.fixture
def small_disk() -> Iterator[int]:
    """No file may grow beyond 50,000 bytes: the system refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_old_checkpoint_untouched(tmp_path: Path, small_disk: int) -> None:
    config = tiny_config()
    old = random_tensors(config)
    save_checkpoint(tmp_path / "old", config, old.items(), max_shard_bytes=30_000)
    files = sorted(os.listdir(tmp_path / "old"))
    for target in ("old", "new"):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path / target, config, random_tensors(config, seed=1).items())
        assert "bytes are free" in str(caught.value)
        assert "free some space" in str(caught.value)
    assert os.listdir(tmp_path) == ["old"]
    assert sorted(os.listdir(tmp_path / "old")) == files
    reader = CheckpointReader(tmp_path / "old")
    reader.validate()
    assert torch.equal(reader.tensor("model.norm.weight"), old["model.norm.weight"])


def test_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    config = tiny_config()
    with pytest.raises(CheckpointError, match="writing the checkpoint failed"):
        save_checkpoint(tmp_path / "file", config, random_tensors(config).items())
    assert (tmp_path / "file").read_text() == "mine"
