"""Writing token blocks: documents go in one after another, and the folder is whole or is not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from deepseek_ray.data.blocks import (
    DOCUMENT_DTYPE,
    DOCUMENTS_FILE,
    FORMAT,
    FORMAT_VERSION,
    LOSS_MASK_FILE,
    METADATA_FILE,
    TOKENS_FILE,
    BlocksMetadata,
)
from deepseek_ray.errors import DataError


@dataclass(frozen=True)
class PackedDocuments:
    """Tokenised documents laid end to end."""

    tokens: np.ndarray
    """[total tokens] integers."""
    lengths: np.ndarray
    """[documents] tokens of each document, none of them 0; they add up to the total."""
    num_bytes: int
    """UTF-8 bytes of the documents' text; of the text to be predicted where there is a loss mask."""
    loss_mask: np.ndarray | None = None
    """[total tokens] bool, True where a token is to be predicted; None: everywhere. A document's first never counts."""


class BlockWriter:
    """Appends documents to the files of a new folder; `finish()` makes it readable. Used as a context manager.

    The caller writes into a folder that nobody reads yet and renames it into place afterwards (see `prepare.py`).
    """

    def __init__(self, directory: Path, vocab_size: int, masked: bool = False) -> None:
        """masked: every `append` brings a loss mask, which is stored beside the tokens."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._num_tokens = self._num_documents = self._num_bytes = self._num_targets = 0
        with disk_errors(directory):
            directory.mkdir(parents=True)
            self._tokens = _HashedFile(directory / TOKENS_FILE)
            self._documents = _HashedFile(directory / DOCUMENTS_FILE)
            self._loss_mask = _HashedFile(directory / LOSS_MASK_FILE) if masked else None

    def append(self, documents: PackedDocuments) -> None:
        """Add documents in order. DataError when the disk is full or an id lies outside the vocabulary."""
        if len(documents.lengths) == 0:
            return
        if (highest := int(documents.tokens.max())) >= self._vocab_size:
            raise DataError(
                f"token id {highest} in a vocabulary of {self._vocab_size}; the tokenizer does not fit its vocab_size"
            )
        starts = self._num_tokens + np.cumsum(documents.lengths, dtype=np.int64) - documents.lengths
        with disk_errors(self._directory):
            self._documents.write(starts.astype(DOCUMENT_DTYPE).tobytes())
            self._tokens.write(documents.tokens.astype(self._dtype).tobytes())
            if self._loss_mask is not None:
                assert documents.loss_mask is not None, "a masked writer takes masked documents"
                mask = documents.loss_mask.astype(np.uint8)
                mask[starts - self._num_tokens] = 0
                self._loss_mask.write(mask.tobytes())
                self._num_targets += int(mask.sum())
        self._num_tokens += len(documents.tokens)
        self._num_documents += len(documents.lengths)
        self._num_bytes += documents.num_bytes

    def finish(self) -> BlocksMetadata:
        """Write the metadata: from here on the folder can be opened."""
        with disk_errors(self._directory):
            self._documents.write(np.array([self._num_tokens], dtype=DOCUMENT_DTYPE).tobytes())
            files = {TOKENS_FILE: self._tokens.close(), DOCUMENTS_FILE: self._documents.close()}
            if self._loss_mask is not None:
                files[LOSS_MASK_FILE] = self._loss_mask.close()
            metadata = BlocksMetadata(
                format=FORMAT,
                version=FORMAT_VERSION,
                dtype=self._dtype.str,
                vocab_size=self._vocab_size,
                num_tokens=self._num_tokens,
                num_documents=self._num_documents,
                num_bytes=self._num_bytes,
                files=files,
                num_targets=None if self._loss_mask is None else self._num_targets,
            )
            (self._directory / METADATA_FILE).write_text(metadata.to_json(), encoding="utf-8")
        return metadata

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._documents, self._loss_mask):
            if file is not None:
                file.release()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest element type of token files that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turns a failing disk (full, read-only, not ours) into a DataError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {directory}: {error.strerror or error}; free space there or set cache_dir "
            "to another disk"
        ) from error


class _HashedFile:
    """A file that knows its sha256 and size while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        self._file.close()
        return {"size": self._size, "sha256": self._sha256.hexdigest()}

    def release(self) -> None:
        with suppress(OSError):  # the disk was full: the error that brought us here is the one to tell
            self._file.close()
