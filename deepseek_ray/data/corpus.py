"""What a corpus consists of: the files of a `data:` section, cut into units that one worker reads in one go."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

from deepseek_ray.config.data import DataConfig, SourceKind
from deepseek_ray.data.blocks import file_sha256
from deepseek_ray.errors import DataError

UnitFormat = Literal["file", "text_lines", "json_lines", "row_group"]

JSON_RANGE_BYTES = 8 * 2**20
"""JSONL files are read in ranges of this size, so that one large file keeps many workers busy."""

_SUFFIXES: dict[SourceKind, tuple[str, ...]] = {
    "stdlib": (".py",),
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "source_tree": (".py",),
}
_NOT_STDLIB = frozenset({"site-packages", "dist-packages"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Written when Python was built or installed: full of this machine's paths, different on each.
_BUILD_FILES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus. `name` is its path within the corpus, with slashes: the same on every machine."""

    name: str
    path: Path
    size: int
    """Bytes."""


@dataclass(frozen=True)
class ReadUnit:
    """A part of a file: the lines that begin at bytes [start, end), or the Parquet row groups [start, end)."""

    format: UnitFormat
    name: str
    path: str
    start: int
    end: int
    num_bytes: int
    """Bytes of the file it stands for, for progress and for balancing."""


def find_files(config: DataConfig) -> list[CorpusFile]:
    """Every file of the corpus, ordered by name. DataError when a path is missing or nothing is found."""
    suffixes = config.suffixes or _SUFFIXES[config.source]
    if config.source == "stdlib":
        found = dict(_stdlib_files(suffixes, config.include_tests))
    else:
        found = {path: name for pattern in config.paths for path, name in _matching_files(pattern, suffixes)}
    files = [CorpusFile(name, path, path.stat().st_size) for path, name in found.items()]
    if not files:
        raise DataError(
            f"source {config.source}: no files ending in {' '.join(suffixes)} in "
            f"{', '.join(config.paths) or sysconfig.get_path('stdlib')}; correct paths or suffixes"
        )
    return sorted(files, key=lambda file: (file.name, str(file.path)))


def corpus_digest(files: list[CorpusFile]) -> str:
    """sha256 over names and contents: two machines with the same texts get the same."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{_readable(file.path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def plan_units(config: DataConfig, files: list[CorpusFile]) -> list[ReadUnit]:
    """Cut the files into units, in order. Parquet files without the text column raise DataError here, before work."""
    return [unit for file in files for unit in _units_of(config, file)]


def _units_of(config: DataConfig, file: CorpusFile) -> Iterator[ReadUnit]:
    match config.source:
        case "stdlib" | "source_tree":
            yield ReadUnit("file", file.name, str(file.path), 0, file.size, file.size)
        case "text":
            yield from _ranges("text_lines", file, config.document_bytes)
        case "jsonl":
            yield from _ranges("json_lines", file, JSON_RANGE_BYTES)
        case "parquet":
            yield from _row_groups(file, config.text_field)


def _ranges(kind: UnitFormat, file: CorpusFile, step: int) -> Iterator[ReadUnit]:
    for start in range(0, file.size, step):
        end = min(start + step, file.size)
        yield ReadUnit(kind, file.name, str(file.path), start, end, end - start)


def _row_groups(file: CorpusFile, text_field: str) -> Iterator[ReadUnit]:
    try:
        parquet = pyarrow.parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: not a readable Parquet file ({error}); remove or replace it") from None
    with parquet:
        columns = parquet.schema_arrow.names
        if text_field not in columns:
            raise DataError(f"{file.path}: no column {text_field!r}; set text_field to one of {', '.join(columns)}")
        kind = parquet.schema_arrow.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{file.path}: column {text_field!r} holds {kind}, not strings; set text_field to another")
        for group in range(parquet.num_row_groups):
            size = parquet.metadata.row_group(group).total_byte_size
            yield ReadUnit("row_group", file.name, str(file.path), group, group + 1, size)


def _stdlib_files(suffixes: tuple[str, ...], include_tests: bool) -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = _NOT_STDLIB if include_tests else _NOT_STDLIB | _TEST_FOLDERS
    for path, name in _files_below(root, suffixes, left_out):
        if not name.startswith(_BUILD_FILES):
            yield path, name


def _matching_files(pattern: str, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Files of one entry of `paths`, with names relative to its fixed part."""
    expanded = Path(os.path.expanduser(pattern)).absolute()
    if not glob.has_magic(str(expanded)):
        if not expanded.exists():
            raise DataError(f"{pattern}: no such file or folder; correct paths (relative ones start at {Path.cwd()})")
        yield from _files_at(expanded, expanded.name, suffixes)
        return
    fixed = expanded
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    matches = sorted(glob.glob(str(expanded), recursive=True))
    if not matches:
        raise DataError(f"{pattern}: matches no file; correct paths (relative ones start at {Path.cwd()})")
    for match in map(Path, matches):
        if match.is_file():
            yield match, match.relative_to(fixed).as_posix()


def _files_at(path: Path, name: str, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    if path.is_dir():
        yield from _files_below(path, suffixes)
    else:
        yield path, name


def _files_below(
    root: Path, suffixes: tuple[str, ...], left_out: frozenset[str] = frozenset()
) -> Iterator[tuple[Path, str]]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in left_out]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffixes) and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _readable(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); allow it or leave it out of paths") from None
