"""A shard reads and holds its own experts, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore
from deepseek_ray.models.packed_files import PackedExpert, PackedFiles
from deepseek_ray.models.save import save_checkpoint
from tests.checkpoints import tiny_config, write_random_checkpoint


class RecordingReader(CheckpointReader):
    """Remembers the names of the tensors that were read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.read: list[str] = []

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.read.append(name)
        return super().tensor(name, dtype)


def test_only_the_held_experts_are_read(tmp_path: Path) -> None:
    reader = RecordingReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    store = ExpertStore(reader, {1: [2, 5], 2: []}, torch.float32)
    prefixes = {name.rsplit(".", 2)[0] for name in reader.read}
    assert prefixes == {"model.layers.1.mlp.experts.2", "model.layers.1.mlp.experts.5"}
    assert store.holds(1, 5)
    assert not store.holds(1, 0)
    assert not store.holds(2, 2)


def test_rows_come_back_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    store = ExpertStore(reader, {1: range(8)}, torch.float32)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    token_rows, experts = torch.tensor([4, 0, 2, 2, 1]), torch.tensor([7, 1, 7, 0, 1])
    rows = store.run(1, hidden, token_rows, experts)
    for row, token, expert in zip(rows, token_rows, experts, strict=True):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        gate, up, down = (reader.tensor(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down"))
        x = hidden[token]
        expected = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_experts_come_and_go(tmp_path: Path) -> None:
    reader = RecordingReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    store = ExpertStore(reader, {1: [2]}, torch.float32)
    hidden, pairs = torch.ones(1, 32), (torch.tensor([0, 0]), torch.tensor([2, 5]))
    assert store.run(1, hidden, *pairs) is None, "expert 5 is not here"
    store.load(1, 5)
    assert store.held == {1: [2, 5]}
    both = store.run(1, hidden, *pairs)
    assert both is not None
    read = len(reader.read)
    store.load(1, 5)
    assert len(reader.read) == read, "an expert that is here is not read again"
    store.drop(1, 2)
    assert store.held == {1: [5]}
    assert store.run(1, hidden, *pairs) is None
    alone = store.run(1, hidden, torch.tensor([0]), torch.tensor([5]))
    assert alone is not None
    assert torch.equal(alone[0], both[1])


def test_no_pairs_no_rows(tmp_path: Path) -> None:
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    store = ExpertStore(reader, {1: range(8)}, torch.float32)
    nothing = torch.empty(0, dtype=torch.int64)
    assert store.run(1, torch.ones(3, 32), nothing, nothing).shape == (0, 32)


def test_nan_in_an_expert_names_the_tensor(tmp_path: Path) -> None:
    directory = write_nan_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        ExpertStore(CheckpointReader(directory), {1: [3]}, torch.float32)


def write_nan_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that was damaged after it was written: the writer itself refuses NaN."""
    directory = write_random_checkpoint(tmp_path / "whole", tiny_config())
    reader = CheckpointReader(directory)
    marker = torch.full((16, 32), 0.12345678)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = [(other, marker if other == name else reader.tensor(other)) for other in reader.names]
    save_checkpoint(tmp_path / "damaged", tiny_config(), tensors)
    (file,) = (tmp_path / "damaged").glob("*.safetensors")
    content = file.read_bytes()
    assert marker.numpy().tobytes() in content
    broken = marker.clone()
    broken[3, 4] = torch.nan
    file.write_bytes(content.replace(marker.numpy().tobytes(), broken.numpy().tobytes()))
    return tmp_path / "damaged"


def packed_by(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Experts that a store packs, from now on."""
    packed: list[tuple[int, int]] = []
    pack = store._pack

    def watch(layer: int, expert: int) -> PackedExpert:
        packed.append((layer, expert))
        return pack(layer, expert)

    monkeypatch.setattr(store, "_pack", watch)
    return packed


@pytest.mark.parametrize("shared_files", [False, True])
def test_many_are_loaded_once_each_and_are_those_loaded_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_files: bool
) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path / "cache"))
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    alone = ExpertStore(reader, {}, torch.float32)
    together = ExpertStore(reader, {}, torch.float32, shared_files=shared_files)
    wanted = [(layer, expert) for layer in (1, 2) for expert in (0, 3, 5, 7)]
    together.load(*wanted[2])
    packed = packed_by(together, monkeypatch)
    for _ in together.load_all(wanted):
        pass
    assert packed == [*wanted[:2], *wanted[3:]]
    assert together.held == {1: [0, 3, 5, 7], 2: [0, 3, 5, 7]}
    for layer, expert in wanted:
        alone.load(layer, expert)
        assert torch.equal(together.weights_of(layer, expert), alone.weights_of(layer, expert))
    another = ExpertStore(reader, {}, torch.float32, shared_files=shared_files)
    packed = packed_by(another, monkeypatch)
    for _ in another.load_all(wanted):
        pass
    assert packed == ([] if shared_files else wanted), "files are found"


def test_loading_many_may_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path / "cache"))
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    store = ExpertStore(reader, {}, torch.float32, shared_files=True)
    loading = store.load_all((1, expert) for expert in range(8))
    next(loading)
    next(loading)
    loading.close()
    assert store.held == {1: [0, 1]}, "what was packed is here"


def test_an_expert_that_cannot_be_written_is_held_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path / "cache"))
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    store = ExpertStore(reader, {}, torch.float32, shared_files=True)
    monkeypatch.setattr(PackedFiles, "write", lambda *arguments: None)
    for _ in store.load_all([(1, 0), (1, 1)]):
        pass
    assert store.held == {1: [0, 1]}
