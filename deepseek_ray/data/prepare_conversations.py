"""From conversations to token blocks with a loss mask, once per content: what `prepare.py` is to texts."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from deepseek_ray.config.finetune import ConversationsConfig
from deepseek_ray.data.blocks import FORMAT_VERSION, TokenBlocks, file_sha256
from deepseek_ray.data.chat_encoding import (
    DEFAULT_TEMPLATE,
    EncodedConversation,
    encode_conversation,
    pack_whole,
    padding,
)
from deepseek_ray.data.conversations import read_conversations
from deepseek_ray.data.corpus import CorpusFile, corpus_digest, find_files
from deepseek_ray.data.packing import BlockWriter, PackedDocuments, disk_errors
from deepseek_ray.data.prepare import TOKENIZER_FILES, PreparedData, new_directory, progress_bars
from deepseek_ray.data.readers import Document
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DataError

_COPIED = (*TOKENIZER_FILES, "generation_config.json")
_SUMMARY_FILE = "prepared.json"
_PACKED_AT_A_TIME = 32_768
"""Conversations that share rows; bounds the memory of packing."""
_CONTENT_FIELDS = ("messages_field", "prompt_field", "completion_field", "system_prompt", "validation_fraction",
                   "sequence_length")  # fmt: skip


@dataclass(frozen=True)
class ConversationCounts:
    """What became of the conversations."""

    train: int = 0
    validation: int = 0
    truncated: int = 0
    """Longer than a sample; their end was left out."""
    dropped: int = 0
    """Nothing of an answer was left after that."""

    def describe(self) -> str:
        return (
            f"{self.train:,} conversations to learn from, {self.validation:,} held out; {self.truncated:,} truncated "
            f"to data.sequence_length, {self.dropped:,} dropped because no answer was left"
        )


@dataclass(frozen=True)
class ConversationData(PreparedData):
    """Conversations ready for training."""

    counts: ConversationCounts = ConversationCounts()


def prepare_conversations(
    config: ConversationsConfig, model_dir: Path, show_progress: bool | None = None
) -> ConversationData:
    """The prepared conversations of `config` in the words of the model's tokenizer and chat template.

    From the cache when the same was prepared before. `show_progress` None shows a bar when standard error is a
    terminal. DataError: broken lines (with file and line), nothing on one side, a full disk.
    """
    train = find_files(config)
    held_out = (
        find_files(config.model_copy(update={"paths": config.validation_paths})) if config.validation_paths else []
    )
    cache_dir = Path(config.cache_dir).expanduser().absolute()
    target = cache_dir / _content_key(config, model_dir, train, held_out)
    if not target.is_dir():
        show = sys.stderr.isatty() if show_progress is None else show_progress
        with new_directory(cache_dir, target) as work:
            with disk_errors(work):
                save_tokenizer_with_template(model_dir, work / "tokenizer", _template_text(config))
            _Writer(work, config, show).write(train, held_out)
    return _open(target, config.verify, len(train) + len(held_out))


def save_tokenizer_with_template(model_dir: Path, target: Path, template: str | None) -> None:
    """Copy the tokenizer files of a checkpoint; a given template, or the default for one without, is written in."""
    own = Tokenizer.from_dir(model_dir)
    target.mkdir()
    for name in _COPIED:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, target / name)
    if template is None and own.has_chat_template:
        return
    settings = target / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    values["chat_template"] = template or DEFAULT_TEMPLATE
    settings.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (target / "chat_template.jinja").unlink(missing_ok=True)  # it would win over the settings


def pack_held_out(
    config: ConversationsConfig, model_dir: Path, work: Path, show_progress: bool
) -> tuple[TokenBlocks, ConversationCounts]:
    """All conversations of `config`, none for training, as blocks below the folder `work`. DataError as above."""
    with disk_errors(work):
        save_tokenizer_with_template(model_dir, work / "tokenizer", _template_text(config))
    return _Writer(work, config, show_progress).write_held_out(find_files(config))


class _Writer:
    """Encodes, splits and packs conversations into the two folders of blocks."""

    def __init__(self, work: Path, config: ConversationsConfig, show: bool) -> None:
        self._work = work
        self._config = config
        self._show = show
        self._tokenizer = Tokenizer.from_dir(work / "tokenizer")
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"{work / 'tokenizer'}: the tokenizer names no eos_token; add it to tokenizer_config.json")
        self._padding_id = self._tokenizer.eos_token_id
        self._counts = {"train": 0, "validation": 0, "truncated": 0, "dropped": 0}

    def write(self, train: Sequence[CorpusFile], held_out: Sequence[CorpusFile]) -> None:
        total = sum(file.size for file in (*train, *held_out)) * (1 if held_out else 2)
        with progress_bars(self._show) as start_bar:
            advance = start_bar("conversations", total)
            for side in ("train", "validation"):
                files = held_out if side == "validation" and held_out else train
                self._write_side(side, self._encoded(side, files, advance, split=not held_out))
        for side, remedy in (("train", "lower"), ("validation", "raise")):
            if not self._counts[side]:
                raise DataError(
                    f"no conversation is left on the {side} side; {remedy} validation_fraction "
                    f"({self._config.validation_fraction}), give other files, or raise sequence_length "
                    f"({self._counts['dropped']} were too long)"
                )
        with disk_errors(self._work):
            (self._work / _SUMMARY_FILE).write_text(json.dumps(self._counts, indent=2) + "\n", encoding="utf-8")

    def write_held_out(self, files: Sequence[CorpusFile]) -> tuple[TokenBlocks, ConversationCounts]:
        with progress_bars(self._show) as start_bar:
            advance = start_bar("conversations", sum(file.size for file in files))
            self._write_side("validation", self._encoded("validation", files, advance, split=False))
        if not self._counts["validation"]:
            raise DataError(
                f"{', '.join(self._config.paths)}: no conversation whose answer fits a sample; raise its length"
            )
        return TokenBlocks.open(self._work / "validation"), ConversationCounts(**self._counts)

    def _write_side(self, side: str, encoded: Iterator[EncodedConversation]) -> None:
        length = self._config.sequence_length
        with BlockWriter(self._work / side, self._tokenizer.vocab_size, masked=True) as writer:
            while some := list(islice(encoded, _PACKED_AT_A_TIME)):
                writer.append(pack_whole(some, length, self._padding_id))
            writer.append(_as_document(padding(1, self._padding_id)))  # a sample holds one token more than it predicts
            writer.finish()

    def _encoded(
        self, side: str, files: Sequence[CorpusFile], advance: Callable[[int], None], split: bool
    ) -> Iterator[EncodedConversation]:
        for file in files:
            for conversation in read_conversations(file, self._config):
                advance(conversation.num_bytes)
                document = Document(conversation.key, "")
                if split and document.is_validation(self._config.validation_fraction) != (side == "validation"):
                    continue
                encoded = self._fitted(encode_conversation(conversation, self._tokenizer))
                if encoded is not None:
                    self._counts[side] += 1
                    yield encoded

    def _fitted(self, encoded: EncodedConversation) -> EncodedConversation | None:
        length = self._config.sequence_length
        if len(encoded.tokens) > length:
            encoded = encoded.cut_to(length, self._tokenizer)
            self._counts["truncated" if encoded.learned.any() else "dropped"] += 1
        return encoded if encoded.learned.any() else None


def _as_document(encoded: EncodedConversation) -> PackedDocuments:
    return pack_whole([encoded], len(encoded.tokens), 0)


def _template_text(config: ConversationsConfig) -> str | None:
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template is {config.chat_template!r}, which cannot be read ({error}); give the path of a Jinja "
            "file, or leave it out to use the checkpoint's own template"
        ) from None


def _content_key(
    config: ConversationsConfig, model_dir: Path, train: list[CorpusFile], held_out: list[CorpusFile]
) -> str:
    content: dict[str, Any] = {name: getattr(config, name) for name in _CONTENT_FIELDS}
    content["format"] = FORMAT_VERSION
    content["files"] = [corpus_digest(train), corpus_digest(held_out)]
    content["template"] = [_template_text(config), DEFAULT_TEMPLATE]
    content["tokenizer"] = {name: file_sha256(model_dir / name) for name in _COPIED if (model_dir / name).is_file()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"conversations-{digest[:24]}"


def _open(directory: Path, verify: bool, num_files: int) -> ConversationData:
    try:
        counts = ConversationCounts(**json.loads((directory / _SUMMARY_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{directory / _SUMMARY_FILE}: cannot be read ({error}); delete the folder and prepare the data again"
        ) from None
    return ConversationData(
        directory=directory,
        train=TokenBlocks.open(directory / "train", verify),
        validation=TokenBlocks.open(directory / "validation", verify),
        num_files=num_files,
        num_skipped=counts.dropped,
        skipped=(),
        counts=counts,
    )
