"""Packed experts as files of this node, mapped into every process that needs them.

Whoever packs an expert first writes it down; everybody after that - a replica, a standby, the next process of a shard -
maps the file, in milliseconds, and all share its pages. One file per expert: a header, the packed gate and up
projection, the packed down projection; each is its data and, if they are integers, its scales.

The folder is named after everything that the contents depend on: layout, dtype, the checkpoint's files, and this boot
of the machine. A file is renamed into place when it is whole, but not forced to disk, so after a power cut it may not
be; files of an earlier boot are therefore never read.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from deepseek_ray.kernels.base import PackedWeight
from deepseek_ray.kernels.native import cache_directory
from deepseek_ray.kernels.quantize import Quantization
from deepseek_ray.models.checkpoint import CheckpointReader

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<4sI8q")
"""Magic, version, then (bytes of data, bytes of scales, outputs, inputs) of each of the two weights."""
_MAGIC, _VERSION = b"DSRP", 2
_ALIGNMENT = 128
"""Of the header, too."""
_MOST_FOLDERS = 8
"""Checkpoints whose packed experts are kept; the one unused for longest goes first."""
_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22
_LEAST_FREE = 0.1
"""Part of the disk that stays free: with less, nothing is written."""


class PackedExpert(NamedTuple):
    gate_up: PackedWeight
    down: PackedWeight

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

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
        self._dtype = dtype if quantization is None else torch.int8
        root = root or cache_directory() / "packed"
        self._folder = root / _key(reader, layout, self._dtype)
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
        data_bytes, scale_bytes = (sizes[0], sizes[4]), (sizes[1], sizes[5])
        whole = _ALIGNMENT + sum(map(_aligned, (*data_bytes, *scale_bytes)))
        if (magic, version) != (_MAGIC, _VERSION) or whole != len(content):
            return None
        start, weights = _ALIGNMENT, []
        for num_data, num_scales, num_out, num_in in (sizes[:4], sizes[4:]):
            data = content[start : start + num_data].view(self._dtype).unsqueeze(0)
            start += _aligned(num_data)
            scales = content[start : start + num_scales].view(torch.float32) if num_scales else None
            start += _aligned(num_scales)
            weights.append(PackedWeight(data, 1, num_out, num_in, scales))
        return PackedExpert(*weights)

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
                for part in (part for weight in packed for part in weight.parts):
                    raw = part.contiguous().view(torch.uint8).numpy().reshape(-1)
                    file.write(raw.data)
                    file.write(b"\0" * (_aligned(raw.nbytes) - raw.nbytes))
            os.replace(scratch, path)
        except OSError as error:
            with suppress(OSError):
                scratch.unlink()
            logger.warning("packed expert %d of layer %d is not kept: %s", expert, layer, error)

    def forget(self, layer: int, expert: int) -> None:
        """The file is not to be trusted; processes that have mapped it keep what they see."""
        self._path(layer, expert).unlink(missing_ok=True)

    def _path(self, layer: int, expert: int) -> Path:
        return self._folder / f"{layer}-{expert}"


def bring_into_memory(packed: PackedExpert) -> None:
    """Read a mapped expert's pages and enter them in this process's page table: its first use costs nothing more.

    Only a hint: before Linux 5.14 nothing happens.
    """
    for part in (part for weight in packed for part in weight.parts):
        start = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = part.data_ptr() + part.nbytes - start
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_READ)


def _header(packed: PackedExpert) -> bytes:
    sizes: list[int] = []
    for weight in packed:
        num_scales = 0 if weight.scales is None else weight.scales.nbytes
        sizes += [weight.data.nbytes, num_scales, weight.num_out, weight.num_in]
    return _HEADER.pack(_MAGIC, _VERSION, *sizes).ljust(_ALIGNMENT, b"\0")


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _key(reader: CheckpointReader, layout: str, dtype: torch.dtype) -> str:
    parts: Sequence[object] = (layout, str(dtype), _VERSION, _boot(), reader.identity())
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
