"""Reading and tokenising a corpus in parallel with Ray Data: the only file of this folder that imports ray.

Workers read units and hand back token arrays; the caller writes them in corpus order, whatever the number of workers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow
import ray
import ray.data

from deepseek_ray.config.data import DataConfig
from deepseek_ray.data.corpus import ReadUnit
from deepseek_ray.data.encoding import DocumentEncoder
from deepseek_ray.data.packing import PackedDocuments
from deepseek_ray.data.readers import read_unit
from deepseek_ray.errors import DataError

TASK_BYTES = 2 * 2**20
"""A task reads about this much, so that small corpora use all cores and a task's result stays small."""
MAX_TASKS = 4096


@dataclass(frozen=True)
class EncodedUnit:
    """What became of one unit of the corpus."""

    train: PackedDocuments
    validation: PackedDocuments
    skipped: list[str]
    """Names of documents that are not UTF-8 text."""
    num_bytes: int
    """Bytes of the unit's part of its file, for progress."""


def encode_units(units: Sequence[ReadUnit], encoder: DocumentEncoder, config: DataConfig) -> Iterator[EncodedUnit]:
    """Encode every unit, in order. Uses the Ray this process is connected to, else starts a local one for the while.

    DataError of a unit (a broken JSON line) is raised here, in the caller's process.
    """
    with connected(), quiet():
        total = sum(unit.num_bytes for unit in units)
        num_tasks = min(len(units), total // TASK_BYTES + 1, MAX_TASKS)
        rows = [asdict(unit) for unit in units]
        dataset = ray.data.from_items(rows, override_num_blocks=num_tasks).map_batches(
            partial(_encode_rows, encoder=encoder, config=config), batch_size=None, batch_format="pyarrow"
        )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(table, pyarrow.Table)
            for row in table.to_pylist():
                if row["error"]:
                    raise DataError(row["error"])
                yield EncodedUnit(_unpack(row["train"]), _unpack(row["validation"]), row["skipped"], row["unit_bytes"])


_PACKED = pyarrow.struct(
    [("tokens", pyarrow.large_binary()), ("lengths", pyarrow.large_binary()), ("num_bytes", pyarrow.int64())]
)
_ROW = pyarrow.schema(
    [
        ("train", _PACKED),
        ("validation", _PACKED),
        ("skipped", pyarrow.list_(pyarrow.string())),
        ("unit_bytes", pyarrow.int64()),
        ("error", pyarrow.string()),
    ]
)


def _encode_rows(rows: pyarrow.Table, encoder: DocumentEncoder, config: DataConfig) -> pyarrow.Table:
    # A task owns one CPU; the library would start a thread for every core of the machine in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    units = [ReadUnit(**row) for row in rows.to_pylist()]
    return pyarrow.Table.from_pylist([_encode_row(unit, encoder, config) for unit in units], schema=_ROW)


def _encode_row(unit: ReadUnit, encoder: DocumentEncoder, config: DataConfig) -> dict[str, Any]:
    row: dict[str, Any] = {"unit_bytes": unit.num_bytes}
    try:
        content = read_unit(unit, config.text_field)
    except DataError as error:  # as a value: Ray would wrap it in its own error, with a worker's traceback
        return row | {"error": error.message}
    except OSError as error:
        remedy = "keep the corpus on storage that every node reads under the same path"
        return row | {"error": f"{unit.path}: a worker cannot read it ({error.strerror or error}); {remedy}"}
    sides: dict[bool, list] = {False: [], True: []}
    for document in content.documents:
        sides[document.is_validation(config.validation_fraction)].append(document)
    return row | {
        "train": _pack(encoder.encode(sides[False])),
        "validation": _pack(encoder.encode(sides[True])),
        "skipped": content.skipped,
    }


def _pack(documents: PackedDocuments) -> dict[str, Any]:
    return {
        "tokens": documents.tokens.astype("<u4").tobytes(),
        "lengths": documents.lengths.astype("<i8").tobytes(),
        "num_bytes": documents.num_bytes,
    }


def _unpack(packed: dict[str, Any]) -> PackedDocuments:
    tokens, lengths = np.frombuffer(packed["tokens"], "<u4"), np.frombuffer(packed["lengths"], "<i8")
    return PackedDocuments(tokens, lengths, packed["num_bytes"])


@contextmanager
def connected() -> Iterator[None]:
    """Ray for the while: what this process is connected to, else the cluster of RAY_ADDRESS, else a local one.

    Without RAY_ADDRESS a plain init would join any cluster that somebody started on this machine. What Ray's libraries
    write in other processes stays in their log files.
    """
    if ray.is_initialized():
        yield
        return
    address = None if "RAY_ADDRESS" in os.environ else "local"
    ray.init(
        address=address,
        include_dashboard=False if address else None,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def quiet() -> Iterator[None]:
    """Ray Data without its own bars and log lines, in corpus order; settings and log level as before afterwards."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a warning says that the bars are off
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
