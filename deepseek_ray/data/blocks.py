"""Packed token blocks: a corpus as one memory-mapped array of token ids, with the places where documents begin.

A folder holds
- `tokens.bin`: token ids of all documents, one after another, little-endian uint16 (uint32 above 65,536 ids);
- `documents.bin`: where each document begins in it, then the number of tokens: little-endian int64;
- `loss_mask.bin`, only where not every token is trained on: one byte per token, 1 where it is to be predicted;
- `metadata.json`: counts, element type, and size and sha256 of the other files. It is written last.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_ray.errors import DataError

FORMAT = "deepseek_ray token blocks"
FORMAT_VERSION = 1
TOKENS_FILE, DOCUMENTS_FILE, METADATA_FILE = "tokens.bin", "documents.bin", "metadata.json"
LOSS_MASK_FILE = "loss_mask.bin"
DOCUMENT_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class BlocksMetadata:
    """What `metadata.json` holds."""

    format: str
    version: int
    dtype: str
    """numpy name of the tokens' element type, `<u2` or `<u4`."""
    vocab_size: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents' text; of the text to be predicted where there is a loss mask."""
    files: dict[str, dict[str, Any]]
    """File name -> `{"size": bytes, "sha256": hex}`."""
    num_targets: int | None = None
    """Tokens to be predicted where there is a loss mask; None: all but the first of every document."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


class TokenBlocks:
    """Token blocks opened for reading. Windows of any sequence length are cut when they are read."""

    def __init__(self, directory: Path, metadata: BlocksMetadata) -> None:
        self.directory = directory
        self.metadata = metadata
        self._tokens = _map(directory / TOKENS_FILE, np.dtype(metadata.dtype))
        self._starts = _map(directory / DOCUMENTS_FILE, DOCUMENT_DTYPE)
        masked = LOSS_MASK_FILE in metadata.files
        self._loss_mask = _map(directory / LOSS_MASK_FILE, np.dtype(np.uint8)) if masked else None

    @classmethod
    def open(cls, directory: str | Path, verify: bool = False) -> TokenBlocks:
        """Open a folder of blocks. DataError names a missing, truncated or (with `verify`) altered file."""
        directory = Path(directory)
        metadata = _read_metadata(directory / METADATA_FILE)
        for name, recorded in metadata.files.items():
            _check_file(directory / name, recorded, verify)
        return cls(directory, metadata)

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenBlocks, (self.directory, self.metadata))  # workers map the files again

    @property
    def num_tokens(self) -> int:
        return self.metadata.num_tokens

    @property
    def num_documents(self) -> int:
        return self.metadata.num_documents

    @property
    def num_bytes(self) -> int:
        return self.metadata.num_bytes

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token (the first of a document, its BOS, is given, not predicted).

        Bits per byte of a model is its mean loss in nats per predicted token / (ln 2 * bytes_per_token).
        """
        return self.num_bytes / self.num_targets

    @property
    def num_targets(self) -> int:
        """Tokens to be predicted."""
        masked = self.metadata.num_targets
        return self.num_tokens - self.num_documents if masked is None else masked

    def num_samples(self, sequence_length: int) -> int:
        """Number of samples: windows of `sequence_length` predictions; the last tokens that fill none are left out."""
        return max(0, (self.num_tokens - 1) // sequence_length)

    def sample(self, index: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64, document_ids int32), both [sequence_length + 1].

        Neighbouring samples share one token, so that each token is predicted once. `document_ids` counts the documents
        of the sample from 0.
        """
        num_samples = self.num_samples(sequence_length)
        if not 0 <= index < num_samples:
            raise IndexError(f"sample {index} of {num_samples} in {self.directory}")
        start = index * sequence_length
        return self._window(start, start + sequence_length + 1)

    def samples(self, indices: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Several samples: (tokens int64, document_ids int32), both [len(indices), sequence_length + 1]."""
        tokens = np.empty((len(indices), sequence_length + 1), dtype=np.int64)
        document_ids = np.empty_like(tokens, dtype=np.int32)
        for row, index in enumerate(indices):
            tokens[row], document_ids[row] = self.sample(int(index), sequence_length)
        return tokens, document_ids

    def loss_masks(self, indices: np.ndarray, sequence_length: int) -> np.ndarray | None:
        """[len(indices), sequence_length + 1] bool, True where the sample's token is to be predicted; None: all are."""
        if self._loss_mask is None:
            return None
        places = np.asarray(indices)[:, None] * sequence_length + np.arange(sequence_length + 1)
        return self._loss_mask[places].astype(bool)

    def stream(self) -> tuple[np.ndarray, np.ndarray]:
        """Everything at once, in memory: (tokens int64, document_ids int32), both [num_tokens]."""
        return self._window(0, self.num_tokens)

    def _window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first = np.searchsorted(self._starts, start, side="right")
        last = np.searchsorted(self._starts, stop, side="left")
        begins = np.zeros(stop - start, dtype=np.int32)
        begins[self._starts[first:last] - start] = 1  # no document is empty, so no two begin at one place
        return self._tokens[start:stop].astype(np.int64), np.cumsum(begins, dtype=np.int32)


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r")


def _read_metadata(path: Path) -> BlocksMetadata:
    remedy = "delete the folder and prepare the data again"
    try:
        metadata = BlocksMetadata(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path.parent}: no {path.name}, so these are no finished token blocks; {remedy}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None
    if (metadata.format, metadata.version) != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{path}: format {metadata.format!r} version {metadata.version}, but this release reads {FORMAT!r} "
            f"version {FORMAT_VERSION}; {remedy}"
        )
    return metadata


def _check_file(path: Path, recorded: dict[str, Any], verify: bool) -> None:
    remedy = "delete the folder and prepare the data again"
    size = path.stat().st_size if path.is_file() else None
    if size != recorded["size"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DataError(f"{path}: {found}, {recorded['size']} bytes were written; {remedy}")
    if verify and (sha256 := file_sha256(path)) != recorded["sha256"]:
        raise DataError(f"{path}: sha256 is {sha256}, {recorded['sha256']} was recorded: the file changed; {remedy}")
