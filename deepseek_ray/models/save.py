"""Writing a checkpoint directory that other readers and this project load; nothing half-written is ever seen."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.checkpoint import INDEX_FILE, MAX_LISTED, SINGLE_FILE
from deepseek_ray.models.safetensors_file import DTYPES, require_finite, write_safetensors
from deepseek_ray.models.shapes import CORRECTION_BIAS, Shapes, parameter_shapes, repeats_main_model

DEFAULT_SHARD_BYTES = 5_000_000_000


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and safetensors (with an index when there are several) into `directory`.

    tensors: (name, tensor) with the names and shapes of `parameter_shapes(config)`; taken one shard at a time.
    dtype: what to store; None keeps each tensor's own. Correction biases stay float32.

    Files are written beside their place and renamed, config.json last: a checkpoint that is being replaced has no
    config.json for that moment and is refused instead of half read. Other files of the directory stay. Raises
    CheckpointError for a wrong name or shape, NaN or infinity, and a full disk; nothing is left behind then.
    """
    target = Path(directory)
    existed = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as staging:
            writer = _ShardWriter(Path(staging), config, max_shard_bytes, dtype)
            for name, tensor in tensors:
                writer.add(name, tensor)
            _move_into_place(Path(staging), target, writer.finish())
    except (OSError, CheckpointError) as error:
        if not existed:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_write_failure(target, error)) from None


class _ShardWriter:
    """Collects tensors, writes a file into the staging directory whenever one is full."""

    def __init__(self, staging: Path, config: ModelConfig, max_shard_bytes: float, dtype: torch.dtype | None) -> None:
        self._staging = staging
        self._config = config
        self._max_shard_bytes = max_shard_bytes
        self._dtype = dtype
        self._expected: Shapes = parameter_shapes(config)
        self._shards: list[list[str]] = []
        self._pending: list[tuple[str, Tensor]] = []
        self._pending_bytes = 0
        self._total_bytes = 0
        self._stored_dtype = dtype or torch.float32

    def add(self, name: str, tensor: Tensor) -> None:
        expected = self._expected.pop(name, None)
        if expected != tuple(tensor.shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, but config asks for "
                f"{'no such tensor' if expected is None else list(expected)}; save with the model's own config"
            )
        require_finite(name, tensor, self._staging.parent)
        wanted = torch.float32 if name.endswith(CORRECTION_BIAS) else self._dtype or tensor.dtype
        if wanted not in DTYPES.values():
            raise CheckpointError(f"tensor {name} has dtype {wanted}; checkpoints hold {', '.join(DTYPES)}: convert it")
        tensor = tensor.detach().to(wanted)
        if name == "model.embed_tokens.weight":
            self._stored_dtype = tensor.dtype
        size = tensor.numel() * tensor.dtype.itemsize
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._flush()
        self._pending.append((name, tensor))
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> list[str]:
        """Write the rest; returns the weight files' final names. Index and config.json are then in the staging too."""
        missing = [name for name in self._expected if not repeats_main_model(name)]
        if missing:
            listed = ", ".join(missing[:MAX_LISTED])
            raise CheckpointError(f"{self._staging.parent}: {len(missing)} tensors were not given to save: {listed}")
        self._flush()
        num = len(self._shards)
        files = (
            [f"model-{index + 1:05d}-of-{num:05d}.safetensors" for index in range(num)] if num > 1 else [SINGLE_FILE]
        )
        for index, file in enumerate(files):
            os.rename(self._staging / f"{index}.part", self._staging / file)
        if num > 1:
            weight_map = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            metadata = {"total_size": self._total_bytes}
            _write_json(self._staging / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
        values = self._config.to_hf() | {"torch_dtype": str(self._stored_dtype).removeprefix("torch.")}
        _write_json(self._staging / "config.json", values)
        return files

    def _flush(self) -> None:
        write_safetensors(self._staging / f"{len(self._shards)}.part", self._pending)
        self._shards.append([name for name, _ in self._pending])
        self._pending, self._pending_bytes = [], 0


def _move_into_place(staging: Path, target: Path, files: list[str]) -> None:
    (target / "config.json").unlink(missing_ok=True)
    stale = [path for path in target.glob("model*.safetensors*") if path.name not in files]
    for path in stale:
        path.unlink()
    index = [INDEX_FILE] if len(files) > 1 else []
    for name in (*files, *index, "config.json"):
        os.replace(staging / name, target / name)
    _fsync_directory(target)


def _write_failure(target: Path, error: OSError) -> str:
    place = next(path for path in (target, *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    return (
        f"{target}: writing the checkpoint failed ({error.strerror or error}), {free:,} bytes are free there; free "
        "some space or choose another place. Nothing was left behind"
    )


def _write_json(path: Path, values: dict[str, object]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
