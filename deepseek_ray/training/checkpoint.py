"""Where checkpoints live: written to a hidden directory, sealed with a manifest, renamed into place last.

A reader sees a whole checkpoint or none. `manifest.json` holds size and sha256 of every file; a directory without a
manifest that agrees with its files does not count, whatever its name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from deepseek_ray.errors import TrainingError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MANIFEST_FORMAT = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run, `step-00000012` and so on in one directory. One process writes (rank 0)."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, write: Callable[[Path], None], expected_bytes: int) -> Path:
        """Call `write(directory)` on a hidden directory and publish the result as the checkpoint of `step`.

        Keeps the newest `keep` checkpoints. Raises TrainingError when the disk is full or a write fails; then nothing
        of this checkpoint is left behind and the older ones are untouched.
        """
        hidden = self.directory / f".writing-step-{step:08d}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._require_space(step, expected_bytes)
            _remove(hidden)
            hidden.mkdir()
            write(hidden)
            _seal(hidden)
            self._publish(hidden, self.path(step))
        except (OSError, SafetensorError) as error:
            failure = self._save_error(step, expected_bytes, error)  # looks at the disk as the writer found it
            _remove(hidden)
            raise failure from error
        except BaseException:
            _remove(hidden)
            raise
        self._prune()
        return self.path(step)

    def latest(self) -> tuple[int, Path] | None:
        """The newest checkpoint whose files agree with its manifest; warns about each newer one that does not."""
        for step, path in reversed(self._steps()):
            problem = find_damage(path)
            if problem is None:
                return step, path
            logger.warning("ignoring checkpoint %s: %s; going back to the one before it", path, problem)
        return None

    def remove_leftovers(self) -> None:
        """Delete what a killed writer left: hidden directories that were never published."""
        if self.directory.is_dir():
            for path in self.directory.glob(".*-step-*"):
                _remove(path)

    def _steps(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        matches = ((_STEP_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return sorted((int(match.group(1)), path) for match, path in matches if match)

    def _publish(self, hidden: Path, target: Path) -> None:
        if target.exists():  # a damaged checkpoint of the same step, gone back over by this run
            _remove_atomically(target)
        os.rename(hidden, target)
        _sync_directory(self.directory)

    def _prune(self) -> None:
        for _, path in self._steps()[: -self.keep]:
            _remove_atomically(path)

    def _require_space(self, step: int, expected_bytes: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < expected_bytes:
            raise TrainingError(
                f"no room for the checkpoint of step {step}: it needs about {_mib(expected_bytes)}, "
                f"{self.directory} has {_mib(free)} free; {_SPACE_REMEDY}"
            )

    def _save_error(self, step: int, expected_bytes: int, error: Exception) -> TrainingError:
        try:
            free = _mib(shutil.disk_usage(self.directory).free)
        except OSError:
            free = "an unknown amount"
        return TrainingError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({error}); it needs about "
            f"{_mib(expected_bytes)}, {free} is free; earlier checkpoints are intact; {_SPACE_REMEDY}"
        )


_SPACE_REMEDY = (
    "free some space, set a smaller training.keep_checkpoints or another storage_path, then start the run again: "
    "it resumes from the newest checkpoint"
)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint directory, in words; None when every file is as the manifest says."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, (size, digest) in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {size}"
        if _sha256(path) != digest:
            return f"the contents of {name} do not match the sha256 in the manifest"
    return None


def _seal(directory: Path) -> None:
    """Force every file to disk and write the manifest, the last file of a checkpoint."""
    files = {}
    for path in sorted(_files(directory)):
        _sync_file(path)
        name = path.relative_to(directory).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"format": _MANIFEST_FORMAT, "files": files}, indent=2) + "\n")
    _sync_file(manifest)
    for subdirectory in {path.parent for path in _files(directory)}:
        _sync_directory(subdirectory)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path, ignore_errors=True)


def _remove_atomically(path: Path) -> None:
    """Hide first, then delete: a reader never sees half a checkpoint under its public name."""
    hidden = path.with_name(f".removing-{path.name}")
    _remove(hidden)
    os.rename(path, hidden)
    _remove(hidden)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
