"""Output files: each appears whole, under its part's number; a folder belongs to one job."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from deepseek_ray.batch.prompts import Part
from deepseek_ray.config.batch import BatchConfig
from deepseek_ray.errors import DataError

_JOB_FILE = "job.json"
_SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("prompt", pyarrow.string()),
        ("text", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("prompt_tokens", pyarrow.int64()),
        ("finish_reason", pyarrow.string()),
        ("error", pyarrow.string()),
    ]
)


@dataclass(frozen=True)
class OutputRow:
    """What became of one input row."""

    row: int
    prompt: str | None
    """A list of messages as JSON; None for a row that could not be read."""
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    """"stop" or "length"; "error" with `error`."""
    error: str | None = None


def open_output(config: BatchConfig, parts: Sequence[Part]) -> list[Part]:
    """Make the folder this job's and return the parts that it lacks.

    DataError when it belongs to a job with other settings or input: their outputs would be mixed.
    """
    folder = Path(config.output).expanduser()
    job = {"settings": config.identity, "input": [[part.path, part.start, part.num_rows] for part in parts]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _JOB_FILE).is_file():
            _require_same(json.loads((folder / _JOB_FILE).read_text(encoding="utf-8")), job, folder)
        else:
            _write_whole(folder / _JOB_FILE, lambda path: path.write_text(json.dumps(job, indent=2), encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"output {folder} cannot be used ({error}); give another folder") from None
    return [part for part in parts if not output_path(config, part).is_file()]


def output_path(config: BatchConfig, part: Part) -> Path:
    return Path(config.output).expanduser() / f"part-{part.index:06d}.{config.format}"


def write_output(config: BatchConfig, part: Part, rows: Sequence[OutputRow]) -> None:
    """Publish the outputs of a part. DataError when the disk is full or not writable."""
    values = [asdict(row) for row in rows]

    def write(path: Path) -> None:
        if config.format == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values, schema=_SCHEMA), path)
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values), encoding="utf-8")

    target = output_path(config, part)
    try:
        _write_whole(target, write)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror or error}); free space or give another") from None


def _write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Beside its place first, forced to disk, then renamed: a reader sees all of it or nothing."""
    hidden = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        write(hidden)
        with hidden.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(hidden, target)
    finally:
        hidden.unlink(missing_ok=True)


def _require_same(found: dict[str, Any], job: dict[str, Any], folder: Path) -> None:
    before, now = found["settings"], job["settings"]
    what = next(
        (f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]), ""
    )
    if not what and found["input"] != job["input"]:
        what = "the input files had other rows"
    if what:
        raise DataError(f"output {folder} belongs to another job ({what}); give another folder, or delete this one")
