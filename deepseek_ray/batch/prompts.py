"""The rows of the input files, in parts of equal size; a bad row is a value, not an exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from deepseek_ray.config.batch import BatchConfig
from deepseek_ray.errors import DataError

Kind = Literal["jsonl", "parquet", "text"]
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_IN_FOLDERS = (*_KINDS, ".txt")


@dataclass(frozen=True)
class Part:
    """Rows of one file whose outputs share a file; plain values, for workers."""

    index: int
    path: str
    kind: Kind
    start: int
    """Byte where the first line begins; in Parquet the number of the first row in its file."""
    num_rows: int
    first_row: int
    """Number of the first row in the whole input."""


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    number: int
    """In the whole input, from 0."""
    prompt: str | list[dict[str, Any]] | None
    """A text or messages; None for a bad row."""
    error: str | None = None
    """What is wrong with a bad row."""


def plan_parts(config: BatchConfig) -> list[Part]:
    """All parts, in input order. DataError for files that are missing, empty or not readable."""
    parts: list[Part] = []
    first_row = 0
    for path in _files(config):
        kind = _KINDS.get(path.suffix, "text")
        for start, count in _ranges(path, kind, config):
            parts.append(Part(len(parts), str(path), kind, start, count, first_row))
            first_row += count
    if not parts:
        raise DataError(f"input {', '.join(config.input)} holds no rows; give files with prompts")
    return parts


def read_part(part: Part, config: BatchConfig) -> list[Row]:
    """The rows of a part. A row without a usable prompt says why."""
    if part.kind == "parquet":
        values = _parquet_rows(part, config.prompt_column)
        return [_checked(part.first_row + place, value, config) for place, value in enumerate(values)]
    return [_line_row(part.first_row + place, line, part.kind, config) for place, line in enumerate(_lines(part))]


def _files(config: BatchConfig) -> list[Path]:
    found: list[Path] = []
    for name in config.input:
        path = Path(name).expanduser().absolute()
        if not path.exists():
            raise DataError(f"input {name}: no such file or folder (relative paths start at {Path.cwd()})")
        found += sorted(p for p in path.rglob("*") if p.suffix in _IN_FOLDERS) if path.is_dir() else [path]
    return found


def _ranges(path: Path, kind: Kind, config: BatchConfig) -> Iterator[tuple[int, int]]:
    """(start, rows) of each part of a file."""
    size = config.rows_per_file
    if kind == "parquet":
        try:
            with pyarrow.parquet.ParquetFile(path) as parquet:
                columns, num_rows = parquet.schema_arrow.names, parquet.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error}); remove or replace it") from None
        if config.prompt_column not in columns:
            raise DataError(
                f"{path}: no column {config.prompt_column!r}; set prompt_column to one of {', '.join(columns)}"
            )
        for start in range(0, num_rows, size):
            yield start, min(size, num_rows - start)
        return
    start = position = count = 0
    with path.open("rb") as file:
        for line in file:
            if count == size:
                yield start, count
                start, count = position, 0
            count += 1
            position += len(line)
    if count:
        yield start, count


def _lines(part: Part) -> Iterator[bytes]:
    with open(part.path, "rb") as file:
        file.seek(part.start)
        for _ in range(part.num_rows):
            yield file.readline()


def _parquet_rows(part: Part, column: str) -> list[Any]:
    with pyarrow.parquet.ParquetFile(part.path) as parquet:
        return parquet.read(columns=[column]).column(column).slice(part.start, part.num_rows).to_pylist()


def _line_row(number: int, line: bytes, kind: Kind, config: BatchConfig) -> Row:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        if kind == "text":
            return _checked(number, text, config)
        values = json.loads(text)
    except UnicodeDecodeError as error:
        return Row(number, None, f"not UTF-8 (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return Row(number, None, f"not JSON ({error})")
    if not isinstance(values, dict) or config.prompt_column not in values:
        known = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        return Row(number, None, f"no field {config.prompt_column!r} ({known})")
    return _checked(number, values[config.prompt_column], config)


def _checked(number: int, value: Any, config: BatchConfig) -> Row:
    if isinstance(value, str) and value:
        return Row(number, value)
    if config.chat and isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return Row(number, value)
    wanted = "a text or a list of messages" if config.chat else "a text"
    return Row(number, None, f"{config.prompt_column} is {value!r:.40}, not {wanted}")
