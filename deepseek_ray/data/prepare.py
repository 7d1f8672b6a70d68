"""From a `data:` section to a tokenizer and token blocks, once per content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_ray.config.data import DataConfig
from deepseek_ray.data.blocks import FORMAT_VERSION, TokenBlocks, file_sha256
from deepseek_ray.data.corpus import CorpusFile, ReadUnit, corpus_digest, find_files, plan_units
from deepseek_ray.data.encoding import DocumentEncoder
from deepseek_ray.data.packing import BlockWriter, disk_errors
from deepseek_ray.data.readers import read_unit
from deepseek_ray.data.tokenizer_training import save_tokenizer, train_tokenizer
from deepseek_ray.errors import DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SUMMARY_FILE = "prepared.json"
_MAX_NAMED = 20
# What changes the tokens. The rest (order, sample length, where the cache is) is decided when they are read.
_CONTENT_FIELDS = ("source", "text_field", "document_bytes", "validation_fraction", "tokenizer_training_bytes")


@dataclass(frozen=True)
class PreparedData:
    """A corpus ready for training."""

    directory: Path
    """Folder of the cache that holds it all."""
    train: TokenBlocks
    validation: TokenBlocks
    num_files: int
    num_skipped: int
    """Documents left out because they are not UTF-8 text."""
    skipped: tuple[str, ...]
    """Names of the first of them."""

    @property
    def tokenizer_dir(self) -> Path:
        """Hugging Face tokenizer files, to be copied beside the weights of a checkpoint."""
        return self.directory / "tokenizer"

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer; a model's vocabulary must be at least this large."""
        return self.train.metadata.vocab_size

    @property
    def bytes_per_token_validation(self) -> float:
        """UTF-8 bytes per predicted validation token: bits per byte = nats per token / (ln 2 * this)."""
        return self.validation.bytes_per_token


def prepare_data(config: DataConfig, show_progress: bool | None = None) -> PreparedData:
    """The prepared data of `config`, from the cache when these files were prepared before.

    `show_progress` None shows bars when standard error is a terminal. DataError: no files, unreadable or broken ones
    (with file and line), no text on one side of the split, a damaged cache, a full disk.
    """
    files = find_files(config)
    cache_dir = Path(config.cache_dir).expanduser().absolute()
    target = cache_dir / _content_key(config, files)
    if not target.is_dir():
        units = plan_units(config, files)
        show = sys.stderr.isatty() if show_progress is None else show_progress
        with new_directory(cache_dir, target) as work:
            _prepare_into(work, config, units, len(files), show)
    return _open(target, verify=config.verify)


def _content_key(config: DataConfig, files: list[CorpusFile]) -> str:
    content: dict[str, Any] = {name: getattr(config, name) for name in _CONTENT_FIELDS}
    content["format"] = FORMAT_VERSION
    content["files"] = corpus_digest(files)
    if config.tokenizer is None:
        content["vocab_size"] = config.vocab_size
    else:
        folder = _tokenizer_folder(config.tokenizer)
        content["tokenizer"] = {
            name: file_sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()
        }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{config.source}-{digest[:24]}"


def _tokenizer_folder(tokenizer: str) -> Path:
    folder = Path(tokenizer).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"tokenizer {tokenizer}: no such folder; give one with a tokenizer.json, or null to train one")
    return folder


def _prepare_into(work: Path, config: DataConfig, units: Sequence[ReadUnit], num_files: int, show: bool) -> None:
    total = sum(unit.num_bytes for unit in units)
    with progress_bars(show) as start_bar:
        if config.tokenizer is None:
            advance = start_bar("training tokenizer", min(total, config.tokenizer_training_bytes))
            backend = train_tokenizer(_training_texts(units, config, advance), config.vocab_size)
            with disk_errors(work):
                save_tokenizer(backend, work / "tokenizer")
        else:
            with disk_errors(work):
                _copy_tokenizer(_tokenizer_folder(config.tokenizer), work / "tokenizer")
        encoder = DocumentEncoder.from_dir(work / "tokenizer")
        skipped = _write_blocks(work, config, units, encoder, start_bar("tokenising", total))
    for side, remedy in (("train", "lower"), ("validation", "raise")):
        if TokenBlocks.open(work / side).num_documents == 0:
            raise DataError(
                f"no document of the corpus falls on the {side} side with validation_fraction "
                f"{config.validation_fraction}; {remedy} it, or add documents (text: lower document_bytes)"
            )
    summary = {"num_files": num_files, "num_skipped": len(skipped), "skipped": skipped[:_MAX_NAMED]}
    with disk_errors(work):
        (work / _SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _write_blocks(
    work: Path,
    config: DataConfig,
    units: Sequence[ReadUnit],
    encoder: DocumentEncoder,
    advance: Callable[[int], None],
) -> list[str]:
    from deepseek_ray.data.ingest import encode_units  # here: opening cached data does not load Ray

    skipped: list[str] = []
    with (
        BlockWriter(work / "train", encoder.vocab_size) as train,
        BlockWriter(work / "validation", encoder.vocab_size) as validation,
    ):
        for encoded in encode_units(units, encoder, config):
            train.append(encoded.train)
            validation.append(encoded.validation)
            skipped += encoded.skipped
            advance(encoded.num_bytes)
        train.finish()
        validation.finish()
    return skipped


def _training_texts(units: Sequence[ReadUnit], config: DataConfig, advance: Callable[[int], None]) -> Iterator[str]:
    """Texts for the tokenizer: training documents only, units in an order by hash until there are enough bytes."""
    left = config.tokenizer_training_bytes
    for unit in sorted(units, key=lambda unit: hashlib.sha256(f"{unit.name}#{unit.start}".encode()).digest()):
        for document in read_unit(unit, config.text_field).documents:
            if left > 0 and not document.is_validation(config.validation_fraction):
                left -= len(document.text.encode())
                yield document.text
        advance(unit.num_bytes)
        if left <= 0:
            return


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _open(directory: Path, verify: bool) -> PreparedData:
    try:
        summary = json.loads((directory / _SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory / _SUMMARY_FILE}: cannot be read ({error}); delete the folder and prepare the data again"
        ) from None
    return PreparedData(
        directory=directory,
        train=TokenBlocks.open(directory / "train", verify),
        validation=TokenBlocks.open(directory / "validation", verify),
        num_files=summary["num_files"],
        num_skipped=summary["num_skipped"],
        skipped=tuple(summary["skipped"]),
    )


@contextmanager
def new_directory(cache_dir: Path, target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well, and is gone when it does not.

    When another process was first, its result stays: the name says that the content is the same.
    """
    with disk_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".preparing-", dir=cache_dir))
    try:
        yield work
        with disk_errors(cache_dir):
            work.chmod(0o755)  # mkdtemp makes it private; the cache may be shared
            try:
                os.rename(work, target)
            except OSError:
                if not target.is_dir():
                    raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def progress_bars(show: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields a function that starts a bar of so many bytes and returns the function that advances it."""
    columns = (TextColumn("{task.description:>20}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:

        def start(description: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(description, total=total)
            return lambda num_bytes: progress.advance(task, num_bytes)

        yield start
