"""Packed experts as files of this node, mapped into every process that needs them.

Whoever packs an expert first writes it down; everybody after that - a replica, a standby, the next process of a shard -
maps the file, in milliseconds, and all share its pages. One file per expert: a header, the packed gate and up
projection, the packed down projection; each is its data and, if they are integers, its scales.

The folder is named after everything that the contents depend on: layout, dtype, the checkpoint's files, and this boot
of the machine. A file is renamed into place when it is whole, but not forced to disk, so after a power cut it may not
be; files of an earlier boot are therefore never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_ray.kernels.base import PackedWeight
from deepseek_ray.kernels.build import cache_directory
from deepseek_ray.kernels.quantize import Quantization
from deepseek_ray.models.checkpoint import CheckpointReader

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<4sI12q")
"""Magic, version, then of each of the two weights: bytes and dtype of its data, of its scales, outputs, inputs."""
_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.int32)
_MAGIC, _VERSION = b"DSRP", 2
_ALIGNMENT = 128
"""Of the header, too."""
_MOST_FOLDERS = 8
"""Checkpoints whose packed experts are kept; the one unused for longest goes first."""
_LEAST_FREE = 0.1
"""Part of the disk that stays free: with less, nothing is written."""


class PackedExpert(NamedTuple):
    gate_up: PackedWeight
    down: PackedWeight

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    @property
    def parts(self) -> list[Tensor]:
        return [*self.gate_up.parts, *self.down.parts]

    def to(self, device: torch.device) -> PackedExpert:
        return PackedExpert(self.gate_up.to(device), self.down.to(device))


class PackedFiles:
    """The packed experts of one checkpoint, in one layout and dtype, on this node."""

    def __init__(
        self,
        reader: CheckpointReader,
        layout: str,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        root: Path | None = None,
    ) -> None:
        """`layout` names how the kernels pack; another layout has other files."""
        root = root or cache_directory() / "packed"
        self._folder = root / _key(reader, layout, quantization or str(dtype))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)
            _prune(root)
        except OSError as error:
            logger.warning("packed experts are not kept in %s: %s", root, error)

    def read(self, layer: int, expert: int) -> PackedExpert | None:
        """Map an expert; None when it was not written yet, or is not what it should be."""
        path = self._path(layer, expert)
        try:
            # Private: who writes to the weights changes no file. Unlike Python's mmap, torch keeps no descriptor open
            # for it: a shard of a large model maps more files than a process may have open.
            content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            magic, version, *sizes = _HEADER.unpack(content[: _HEADER.size].numpy().tobytes())
        except (OSError, RuntimeError, ValueError, struct.error):
            return None
        whole = _ALIGNMENT + sum(_aligned(sizes[place]) for place in (0, 2, 6, 8))
        if (magic, version) != (_MAGIC, _VERSION) or whole != len(content):
            return None
        parts = _Parts(content)
        return PackedExpert(*(parts.weight(*sizes[first : first + 6]) for first in (0, 6)))

    def write(self, layer: int, expert: int, packed: PackedExpert) -> None:
        """Keep an expert for others. A disk that is full or read-only is said and otherwise ignored."""
        path = self._path(layer, expert)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            usage = shutil.disk_usage(self._folder)
            if usage.free < _LEAST_FREE * usage.total:
                return
            with scratch.open("wb") as file:
                file.write(_header(packed))
                for part in packed.parts:
                    raw = part.contiguous().view(torch.uint8).numpy().reshape(-1)
                    file.write(raw.data)
                    file.write(b"\0" * (_aligned(raw.nbytes) - raw.nbytes))
            os.replace(scratch, path)
        except OSError as error:
            with suppress(OSError):
                scratch.unlink()
            logger.warning("packed expert %d of layer %d is not kept: %s", expert, layer, error)

    def written(self) -> set[tuple[int, int]]:
        """(layer, expert) of the files that are there."""
        try:
            names = os.listdir(self._folder)
        except OSError:
            return set()
        layers_and_experts = (name.split("-") for name in names if not name.startswith("."))
        return {(int(layer), int(expert)) for layer, expert in layers_and_experts}

    def forget(self, layer: int, expert: int) -> None:
        """The file is not to be trusted; processes that have mapped it keep what they see."""
        self._path(layer, expert).unlink(missing_ok=True)

    def _path(self, layer: int, expert: int) -> Path:
        return self._folder / f"{layer}-{expert}"


class _Parts:
    """The tensors of a mapped file, one after the other."""

    def __init__(self, content: Tensor) -> None:
        self._content = content
        self._start = _ALIGNMENT

    def weight(
        self, data_bytes: int, data_dtype: int, scale_bytes: int, scale_dtype: int, num_out: int, num_in: int
    ) -> PackedWeight:
        data = self._next(data_bytes, data_dtype).unsqueeze(0)
        scales = self._next(scale_bytes, scale_dtype) if scale_bytes else None
        return PackedWeight(data, 1, num_out, num_in, scales)

    def _next(self, count: int, dtype: int) -> Tensor:
        part = self._content[self._start : self._start + count].view(_DTYPES[dtype])
        self._start += _aligned(count)
        return part


def _header(packed: PackedExpert) -> bytes:
    sizes: list[int] = []
    for weight in packed:
        for part in (weight.data, weight.scales):
            sizes += (0, 0) if part is None else (part.nbytes, _DTYPES.index(part.dtype))
        sizes += [weight.num_out, weight.num_in]
    return _HEADER.pack(_MAGIC, _VERSION, *sizes).ljust(_ALIGNMENT, b"\0")


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _key(reader: CheckpointReader, layout: str, kind: str) -> str:
    parts: Sequence[object] = (layout, kind, _VERSION, _boot(), reader.identity())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"no boot id, process {os.getpid()}"  # then nothing is shared


def _prune(root: Path) -> None:
    folders = sorted(root.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in folders[_MOST_FOLDERS:]:
        shutil.rmtree(folder, ignore_errors=True)
