"""Checkpoints appear whole or not at all, damage is found, and a full disk leaves the old ones intact."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_ray.errors import TrainingError
from deepseek_ray.training.checkpoint import MANIFEST, CheckpointStore, find_damage


def write_numbers(value: int):
    def write(directory: Path) -> None:
        (directory / "weights").write_bytes(bytes([value]) * 1000)
        (directory / "inner").mkdir()
        (directory / "inner" / "state").write_text(str(value))

    return write


def store_with(tmp_path: Path, *steps: int, keep: int = 5) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=keep)
    for step in steps:
        store.save(step, write_numbers(step), expected_bytes=1000)
    return store


def test_saved_checkpoints_are_complete_and_the_newest_is_found(tmp_path: Path) -> None:
    store = store_with(tmp_path, 3, 12)
    assert store.latest() == (12, store.path(12))
    manifest = json.loads((store.path(12) / MANIFEST).read_text())
    assert set(manifest["files"]) == {"weights", "inner/state"}
    assert manifest["files"]["weights"]["bytes"] == 1000
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-00000003", "step-00000012"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-00000003", "step-00000004"]


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "weights").read_bytes())
    content[500] ^= 1
    (path / "weights").write_bytes(content)


def truncate(path: Path) -> None:
    (path / "weights").write_bytes((path / "weights").read_bytes()[:-1])


def lose_a_file(path: Path) -> None:
    (path / "inner" / "state").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def tear_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:20])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_a_file, lose_the_manifest, tear_the_manifest])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage, caplog) -> None:
    store = store_with(tmp_path, 1, 2)
    damage(store.path(2))
    assert find_damage(store.path(2)) is not None
    assert store.latest() == (1, store.path(1))
    assert "step-00000002" in caplog.text
    store.save(2, write_numbers(7), expected_bytes=1000)
    assert store.latest() == (2, store.path(2))


def test_no_checkpoint_gives_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "never written", keep=1).latest() is None


def test_a_failing_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)

    def write(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise RuntimeError("killed in the middle")

    with pytest.raises(RuntimeError):
        store.save(2, write, expected_bytes=10)
    assert [path.name for path in store.directory.iterdir()] == ["step-00000001"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    (store.directory / ".writing-step-00000002").mkdir()
    (store.directory / ".writing-step-00000002" / "half").write_text("half")
    assert store.latest() == (1, store.path(1))
    store.remove_leftovers()
    assert [path.name for path in store.directory.iterdir()] == ["step-00000001"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    with pytest.raises(TrainingError, match=r"no room for the checkpoint of step 2.*MiB free.*keep_checkpoints"):
        store.save(2, write_numbers(2), expected_bytes=2**60)
    assert store.latest() == (1, store.path(1))


_WRITE_WITH_A_LIMIT = """
import resource, sys
from pathlib import Path
from safetensors.torch import save_file
import torch
from deepseek_ray.errors import TrainingError
from deepseek_ray.training.checkpoint import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), keep=1)
store.save(1, lambda directory: save_file({"a": torch.zeros(64)}, directory / "w.safetensors"), 256)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
try:
    store.save(2, lambda directory: save_file({"a": torch.zeros(2**18)}, directory / "w.safetensors"), 256)
except TrainingError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system has no file size limit")
def test_a_write_that_the_kernel_refuses_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse a write in the middle of a file, as a full disk does."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    command = [sys.executable, "-c", _WRITE_WITH_A_LIMIT, str(store.directory)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "the checkpoint of step 2 could not be written" in answer.stdout
    assert "earlier checkpoints are intact" in answer.stdout
    assert [path.name for path in store.directory.iterdir()] == ["step-00000001"]
    assert store.latest() == (1, store.path(1))
