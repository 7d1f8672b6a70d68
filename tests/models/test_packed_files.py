"""Packed experts in files: the same bits mapped as packed, never those of another checkpoint, and never half a file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from deepseek_ray.kernels.quantize import QUANTIZATIONS, Quantization
from deepseek_ray.kernels.select import default_kernels
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore
from deepseek_ray.models.packed_files import PackedFiles
from tests.checkpoints import tiny_config, write_random_checkpoint

HIDDEN, PAIRS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), (torch.arange(3), torch.full((3,), 5))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; the built kernels stay where they are."""
    if default_kernels().layout is None:
        pytest.skip("without a compiler nothing is packed")
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", tiny_config())


def store(
    model: Path, dtype: torch.dtype = torch.float32, shared_files: bool = True, quantization: Quantization | None = None
) -> ExpertStore:
    return ExpertStore(
        CheckpointReader(model), {1: [2, 5]}, dtype, shared_files=shared_files, quantization=quantization
    )


def rows(store: ExpertStore, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    result = store.run(1, HIDDEN.to(dtype), *PAIRS)
    assert result is not None
    return result


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
def test_mapped_experts_give_the_bits_of_packed_ones(
    model: Path, cache: Path, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    expected = rows(store(model, dtype, shared_files=False, quantization=quantization), dtype)
    assert not cache.exists()
    for what in ("written", "mapped"):
        assert torch.equal(rows(store(model, dtype, quantization=quantization), dtype), expected), what
        assert [path.name for path in files(cache)] == ["1-2", "1-5"]


def test_what_was_mapped_ahead_is_there_when_it_is_wanted(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows(store(model))
    standby = ExpertStore(CheckpointReader(model), {}, torch.float32, shared_files=True)
    (size,) = {path.stat().st_size for path in files(cache)}
    standby.map_ahead(most_bytes=1.5 * size)
    standby.map_ahead(most_bytes=1.5 * size)
    shutil.rmtree(cache)
    monkeypatch.setattr(CheckpointReader, "tensor", lambda *arguments: pytest.fail("a tensor was read"))
    standby.load(1, 2)
    with pytest.raises(pytest.fail.Exception, match="a tensor was read"):
        standby.load(1, 5)  # beyond what was allowed
    assert standby.held == {1: [2]}
    monkeypatch.undo()
    standby.load(1, 5)
    assert torch.equal(rows(standby), expected)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what is in memory")
def test_what_was_loaded_is_in_memory_before_the_first_call(model: Path, cache: Path) -> None:
    kept = [store(model), store(model)]  # one has written, the other found
    assert kept
    assert resident_parts(cache) == {"1-2": [1.0, 1.0], "1-5": [1.0, 1.0]}


def resident_parts(folder: Path) -> dict[str, list[float]]:
    """File name -> of each mapping of it in this process, the part that is in its page table."""
    found: dict[str, list[float]] = {}
    name, size = "", 1
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key:  # the first line of a mapping
            name = Path(values[-1]).name if str(folder) in line else ""
        elif name and key == "Size:":
            size = int(values[0])
        elif name and key == "Rss:":
            found.setdefault(name, []).append(int(values[0]) / size)
    return found


def test_a_second_store_reads_no_tensor(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(model)
    monkeypatch.setattr(CheckpointReader, "tensor", lambda *arguments: pytest.fail("a tensor was read"))
    assert store(model).held == {1: [2, 5]}


def test_another_checkpoint_at_the_same_place_has_other_files(model: Path, cache: Path) -> None:
    before = rows(store(model))
    shutil.rmtree(model)
    write_random_checkpoint(model, tiny_config(), seed=1)
    after = rows(store(model))
    assert not torch.equal(after, before)
    assert torch.equal(after, rows(store(model, shared_files=False)))


@pytest.mark.parametrize("damage", ["cut", "magic", "empty"])
def test_a_damaged_file_is_written_again(model: Path, cache: Path, damage: str) -> None:
    expected = rows(store(model))
    (path,) = (path for path in files(cache) if path.name == "1-5")
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-64], "magic": b"XXXX" + content[4:], "empty": b""}[damage])
    assert torch.equal(rows(store(model)), expected)
    assert path.read_bytes() == content


def test_writing_to_mapped_weights_changes_no_file_and_reloading_trusts_none(model: Path, cache: Path) -> None:
    expected = rows(store(model))
    broken = store(model)
    broken.weights_of(1, 5).fill_(torch.nan)
    assert torch.equal(rows(store(model)), expected)
    (path,) = (path for path in files(cache) if path.name == "1-5")
    path.write_bytes(path.read_bytes()[:64] + bytes(path.stat().st_size - 64))  # as bad memory would leave it
    broken.reload(1, 5)
    assert torch.equal(rows(broken), expected)
    assert torch.equal(rows(store(model)), expected), "the file was written anew"


def test_the_folders_unused_for_longest_go(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number in range(10):
        (root / f"old{number}").mkdir(parents=True)
        os.utime(root / f"old{number}", (number, number))
    PackedFiles(CheckpointReader(model), "layout", torch.float32, root=root)
    left = {path.name for path in root.iterdir()}
    assert len(left) == 8
    assert {f"old{number}" for number in range(3, 10)} < left


def test_a_cache_that_cannot_be_written_is_said_and_ignored(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = rows(store(model, shared_files=False))
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the way")
    assert torch.equal(rows(store(model)), expected)
    assert "not kept" in caplog.text


def test_a_mapped_expert_keeps_no_descriptor_open(model: Path, cache: Path) -> None:
    """A shard of a large model maps thousands of files; a process may have a thousand open."""
    store(model)
    before = len(os.listdir("/proc/self/fd"))
    mapped = [store(model) for _ in range(8)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert rows(mapped[-1]).isfinite().all()
