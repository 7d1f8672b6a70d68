"""Token blocks: what is written is read back, and damage is noticed."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.data import packing
from deepseek_ray.data.blocks import TokenBlocks, file_sha256
from deepseek_ray.data.packing import BlockWriter, PackedDocuments, token_dtype
from deepseek_ray.errors import DataError


def packed(documents: list[list[int]], num_bytes: int = 0) -> PackedDocuments:
    tokens = np.array([token for document in documents for token in document], dtype=np.int64)
    return PackedDocuments(tokens, np.array([len(document) for document in documents]), num_bytes)


def write(directory: Path, documents: list[list[int]], vocab_size: int = 100, num_bytes: int = 0) -> TokenBlocks:
    with BlockWriter(directory, vocab_size) as writer:
        writer.append(packed(documents, num_bytes))
        writer.finish()
    return TokenBlocks.open(directory)


def slow_sample(documents: list[list[int]], index: int, sequence_length: int) -> tuple[list[int], list[int]]:
    """The obvious version: lay everything out, cut the window, number its documents from 0."""
    flat = [(token, number) for number, document in enumerate(documents) for token in document]
    window = flat[index * sequence_length : index * sequence_length + sequence_length + 1]
    return [token for token, _ in window], [number - window[0][1] for _, number in window]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=12),
    sequence_length=st.integers(1, 7),
)
def test_samples_equal_the_obvious_version(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], sequence_length: int
) -> None:
    blocks = write(tmp_path_factory.mktemp("blocks") / "b", documents)
    total = sum(map(len, documents))
    num_samples = blocks.num_samples(sequence_length)
    assert num_samples == (total - 1) // sequence_length
    tokens, document_ids = blocks.samples(np.arange(num_samples), sequence_length)
    assert (tokens.dtype, document_ids.dtype) == (np.int64, np.int32)
    for index in range(num_samples):
        expected = slow_sample(documents, index, sequence_length)
        assert (tokens[index].tolist(), document_ids[index].tolist()) == expected


def test_every_token_is_predicted_once(tmp_path: Path) -> None:
    documents = [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    blocks = write(tmp_path / "b", documents)
    targets = [token for index in range(4) for token in blocks.sample(index, 2)[0][1:].tolist()]
    assert targets == documents[0][1:]


def test_appends_in_parts_equal_one_append(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", [[1, 2], [3], [4, 5]], num_bytes=9)
    with BlockWriter(tmp_path / "parts", 100) as writer:
        writer.append(packed([[1, 2]], 4))
        writer.append(packed([], 0))
        writer.append(packed([[3], [4, 5]], 5))
        assert writer.finish() == whole.metadata


def test_counts_and_bits_per_byte(tmp_path: Path) -> None:
    blocks = write(tmp_path / "b", [[0, 5, 6, 1], [0, 7, 1]], num_bytes=15)
    assert (blocks.num_tokens, blocks.num_documents, blocks.num_bytes) == (7, 2, 15)
    assert blocks.bytes_per_token == 15 / 5  # the two BOS are given, not predicted
    tokens, document_ids = blocks.stream()
    assert tokens.tolist() == [0, 5, 6, 1, 0, 7, 1]
    assert document_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_element_types(tmp_path: Path) -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32
    big = write(tmp_path / "big", [[70_000, 3]], vocab_size=70_001)
    assert big.stream()[0].tolist() == [70_000, 3]
    assert (tmp_path / "big" / "tokens.bin").stat().st_size == 8


def test_blocks_travel_between_processes_by_name(tmp_path: Path) -> None:
    blocks = write(tmp_path / "b", [[1, 2, 3]])
    again = pickle.loads(pickle.dumps(blocks))
    assert again.sample(0, 2)[0].tolist() == [1, 2, 3]


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with (
        BlockWriter(tmp_path / "b", 100) as writer,
        pytest.raises(DataError, match="token id 100 in a vocabulary of 100"),
    ):
        writer.append(packed([[100]]))


def test_sample_outside_the_set(tmp_path: Path) -> None:
    blocks = write(tmp_path / "b", [[1, 2, 3]])
    for index in (-1, 1):
        with pytest.raises(IndexError, match="of 1 in"):
            blocks.sample(index, 2)


def test_altered_tokens_are_noticed(tmp_path: Path) -> None:
    blocks = write(tmp_path / "b", [[1, 2, 3]])
    file = blocks.directory / "tokens.bin"
    data = bytearray(file.read_bytes())
    data[2] ^= 1
    file.write_bytes(data)
    TokenBlocks.open(blocks.directory)  # sizes are right, and the check of every byte was not asked for
    with pytest.raises(DataError, match=r"tokens\.bin: sha256 is .* the file changed; delete the folder"):
        TokenBlocks.open(blocks.directory, verify=True)


def test_truncated_missing_and_unfinished_files_are_noticed(tmp_path: Path) -> None:
    blocks = write(tmp_path / "b", [[1, 2, 3]])
    assert blocks.metadata.files["documents.bin"]["sha256"] == file_sha256(blocks.directory / "documents.bin")
    (blocks.directory / "documents.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"documents\.bin: has 4 bytes, 16 bytes were written"):
        TokenBlocks.open(blocks.directory)
    (blocks.directory / "tokens.bin").unlink()
    with pytest.raises(DataError, match=r"tokens\.bin: is missing|documents\.bin"):
        TokenBlocks.open(blocks.directory)
    with BlockWriter(tmp_path / "unfinished", 10) as writer:
        writer.append(packed([[1]]))
    with pytest.raises(DataError, match=r"no metadata\.json"):
        TokenBlocks.open(tmp_path / "unfinished")


@pytest.mark.parametrize(("change", "message"), [({"version": 2}, "version 2"), ({"extra": 1}, "cannot be read")])
def test_foreign_metadata(tmp_path: Path, change: dict[str, int], message: str) -> None:
    blocks = write(tmp_path / "b", [[1, 2, 3]])
    file = blocks.directory / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        TokenBlocks.open(blocks.directory)


def test_a_full_disk_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing._HashedFile, "write", no_room)
    with (
        BlockWriter(tmp_path / "b", 100) as writer,
        pytest.raises(DataError, match="No space left on device; free space there or set cache_dir"),
    ):
        writer.append(packed([[1]]))
