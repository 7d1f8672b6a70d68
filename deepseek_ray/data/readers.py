"""From a unit of a corpus to its documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from deepseek_ray.data.corpus import ReadUnit
from deepseek_ray.errors import DataError


@dataclass(frozen=True)
class Document:
    """A text, and the key whose hash decides whether it is for training or for validation."""

    key: str
    text: str

    def is_validation(self, fraction: float) -> bool:
        """The same for the same key on every machine: sha256 of the key, as a number in [0, 1), is below `fraction`."""
        digest = hashlib.sha256(self.key.encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class UnitDocuments:
    """The documents of a unit, empty ones left out, and the names of those that are not UTF-8 text."""

    documents: list[Document]
    skipped: list[str]


def read_unit(unit: ReadUnit, text_field: str) -> UnitDocuments:
    """Read one unit. DataError names file and line of a JSON line that is broken or lacks its text.

    Files keep their name as key, so a file stays on its side of the split when it is edited; lines and rows, which
    have no name, are keyed by their text.
    """
    match unit.format:
        case "file":
            return _decoded(unit.name, Path(unit.path).read_bytes())
        case "text_lines":
            lines = _lines_in_range(unit)
            return _decoded(f"{unit.name}#{unit.start}", b"".join(line for _, line in lines))
        case "json_lines":
            texts = [_json_text(unit, offset, line, text_field) for offset, line in _lines_in_range(unit)]
        case "row_group":
            texts = _row_texts(unit, text_field)
    return UnitDocuments([Document(text, text) for text in texts if text], [])


def _decoded(name: str, data: bytes) -> UnitDocuments:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return UnitDocuments([], [name])
    return UnitDocuments([Document(name, text)] if text else [], [])


def _lines_in_range(unit: ReadUnit) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins in [start, end); a line belongs to one range, however they are cut."""
    with open(unit.path, "rb") as file:
        offset = unit.start
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        while offset < unit.end and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _json_text(unit: ReadUnit, offset: int, line: bytes, text_field: str) -> str:
    if not line.strip():
        return ""
    problem = None
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
    except ValueError as error:
        problem = f"not JSON ({error}); correct or remove the line"
    else:
        if not isinstance(values, dict):
            problem = f"a JSON {type(values).__name__}, not an object; put the text in an object's {text_field!r}"
        elif text_field not in values:
            known = ", ".join(map(str, values)) or "none"
            problem = f"no field {text_field!r} (fields: {known}); set text_field or add it"
        elif not isinstance(values[text_field], str):
            problem = f"field {text_field!r} holds {type(values[text_field]).__name__}, not a string; correct the line"
        elif not _is_unicode(values[text_field]):
            problem = f"field {text_field!r} holds a lone surrogate, which no text can; correct the line"
        else:
            return values[text_field]
    raise DataError(f"{unit.path}, line {_line_number(unit.path, offset)}: {problem}")


def _line_number(path: str, offset: int) -> int:
    """Line number, from 1, of the byte `offset`; only an error pays for counting."""
    count = 1
    with open(path, "rb") as file:
        while offset > 0 and (data := file.read(min(offset, 2**20))):
            count += data.count(b"\n")
            offset -= len(data)
    return count


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row_texts(unit: ReadUnit, text_field: str) -> list[str]:
    """Texts of a Parquet row group; rows without a text are left out like empty ones."""
    try:
        with pyarrow.parquet.ParquetFile(unit.path) as parquet:
            column = parquet.read_row_group(unit.start, columns=[text_field]).column(text_field)
    except pyarrow.ArrowException as error:
        raise DataError(f"{unit.path}, row group {unit.start}: cannot be read ({error}); replace the file") from None
    return [text for text in column.to_pylist() if text is not None]
