"""Texts that a model is only measured on, as token blocks: every token counts, also those that fill no whole sample."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepseek_ray.config.data import DataConfig, SourceKind
from deepseek_ray.config.evaluation import BUILT_IN
from deepseek_ray.data.blocks import TokenBlocks
from deepseek_ray.data.corpus import find_files, plan_units
from deepseek_ray.data.encoding import DocumentEncoder
from deepseek_ray.data.packing import BlockWriter, PackedDocuments
from deepseek_ray.data.prepare import progress_bars
from deepseek_ray.data.readers import read_unit
from deepseek_ray.errors import DataError

_SOURCES: dict[str, SourceKind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def source_of(path: str) -> SourceKind:
    """What kind of corpus a path is, by its ending; plain text when that says nothing."""
    return "stdlib" if path == BUILT_IN else _SOURCES.get(Path(path).suffix, "text")


def write_held_out(
    config: DataConfig, model_dir: Path, directory: Path, show_progress: bool | None = None
) -> TokenBlocks:
    """Tokenise `config`'s texts with the model's tokenizer into blocks in the new folder `directory`.

    Of the built-in corpus the validation split is taken, of anything else all. A sample is `config.sequence_length`
    tokens; the last one is filled up with padding that does not count. DataError: no text, unreadable files.
    """
    encoder = DocumentEncoder.from_dir(model_dir)
    total = 0
    with BlockWriter(directory, encoder.vocab_size, masked=True) as writer:
        for documents in _encoded(config, encoder, show_progress):
            total += len(documents.tokens)
            writer.append(documents)
        if total < 2:
            raise DataError(f"{', '.join(config.paths) or config.source}: no text in it; give files that hold some")
        if missing := -(total - 1) % config.sequence_length:
            writer.append(_padding(missing, encoder.eos_id))
        writer.finish()
    return TokenBlocks.open(directory)


def _encoded(config: DataConfig, encoder: DocumentEncoder, show_progress: bool | None) -> Iterator[PackedDocuments]:
    units = plan_units(config, find_files(config))
    with progress_bars(sys.stderr.isatty() if show_progress is None else show_progress) as start_bar:
        advance = start_bar("tokenising", sum(unit.num_bytes for unit in units))
        for unit in units:
            documents = read_unit(unit, config.text_field).documents
            if config.source == "stdlib":
                documents = [one for one in documents if one.is_validation(config.validation_fraction)]
            packed = encoder.encode(documents)
            yield replace(packed, loss_mask=np.ones(len(packed.tokens), dtype=bool))
            advance(unit.num_bytes)


def _padding(size: int, token_id: int) -> PackedDocuments:
    return PackedDocuments(
        tokens=np.full(size, token_id, dtype=np.uint32),
        lengths=np.array([size], dtype=np.int64),
        num_bytes=0,
        loss_mask=np.zeros(size, dtype=bool),
    )
