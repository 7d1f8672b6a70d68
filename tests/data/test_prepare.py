"""From files to token blocks through Ray Data, with the cache around it."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from deepseek_ray.config.data import DataConfig
from deepseek_ray.data import ingest, packing, prepare
from deepseek_ray.data.corpus import find_files, plan_units
from deepseek_ray.data.encoding import DocumentEncoder
from deepseek_ray.data.prepare import prepare_data
from deepseek_ray.data.readers import read_unit
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DataError

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    temp_dir = tempfile.mkdtemp(prefix="ray")  # short: it holds sockets, whose paths are limited to 107 bytes
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=temp_dir, logging_level=logging.ERROR)
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture
def tree(tmp_path: Path) -> DataConfig:
    """60 small files, one of them not UTF-8."""
    for number in range(60):
        file = tmp_path / "tree" / f"package{number % 3}" / f"module{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"def function_{number}(x):\n    return x + {number}  # ü\n" * (number + 1), encoding="utf-8")
    (tmp_path / "tree" / "latin.py").write_bytes(b"# caf\xe9\n")
    return DataConfig(
        source="source_tree",
        paths=(str(tmp_path / "tree"),),
        vocab_size=512,
        validation_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def test_blocks_hold_every_document_in_order(tree: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many tasks, the first of them by far the longest: the others are done before it.
    monkeypatch.setattr(ingest, "TASK_BYTES", 32_768)
    first = Path(tree.paths[0], "package0", "module0.py")
    first.write_text("# a long file ends late\n" * 40_000)
    prepared = prepare_data(tree)
    assert (prepared.num_files, prepared.num_skipped, prepared.skipped) == (61, 1, ("latin.py",))
    tokenizer = Tokenizer.from_dir(prepared.tokenizer_dir)
    assert prepared.vocab_size == tokenizer.vocab_size
    documents = [d for u in plan_units(tree, find_files(tree)) for d in read_unit(u, "text").documents]
    for blocks, is_validation in ((prepared.train, False), (prepared.validation, True)):
        texts = [d.text for d in documents if d.is_validation(0.2) == is_validation]
        tokens, document_ids = blocks.stream()
        streamed = [tokenizer.decode(tokens[document_ids == n]) for n in range(document_ids[-1] + 1)]
        assert streamed == texts
        assert blocks.num_bytes == sum(len(text.encode()) for text in texts)
        assert set(tokens[np.diff(document_ids, prepend=-1) > 0]) == {tokenizer.bos_token_id}
    predicted = prepared.validation.num_tokens - prepared.validation.num_documents
    assert prepared.bytes_per_token_validation == prepared.validation.num_bytes / predicted


def test_the_same_files_are_prepared_once(tree: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_data(tree)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "tree", moved)
    monkeypatch.setattr(prepare, "_prepare_into", None)  # a second preparation would fail
    elsewhere = tree.model_copy(update={"paths": (str(moved),), "seed": 9, "sequence_length": 16})
    assert prepare_data(elsewhere).directory == first.directory
    (moved / "package0" / "module0.py").write_text("changed = 1\n")
    with pytest.raises(TypeError):
        prepare_data(elsewhere)


def test_preparing_twice_gives_the_same_bytes(tree: DataConfig, tmp_path: Path) -> None:
    first = prepare_data(tree)
    second = prepare_data(tree.model_copy(update={"cache_dir": str(tmp_path / "other")}))
    assert first.train.metadata == second.train.metadata
    assert first.validation.metadata == second.validation.metadata


def test_a_given_tokenizer_is_used_and_copied(tree: DataConfig, tmp_path: Path) -> None:
    trained = prepare_data(tree)
    given = tree.model_copy(update={"tokenizer": str(trained.tokenizer_dir), "cache_dir": str(tmp_path / "given")})
    prepared = prepare_data(given)
    assert prepared.train.metadata == trained.train.metadata
    assert (prepared.tokenizer_dir / "tokenizer.json").is_file()
    with pytest.raises(DataError, match="no such folder; give one with a tokenizer"):
        prepare_data(tree.model_copy(update={"tokenizer": str(tmp_path / "missing")}))


def test_json_lines_with_one_broken_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n} says {n * n}"}) for n in range(40)]
    path = tmp_path / "a.jsonl"
    config = DataConfig(
        source="jsonl", paths=(str(path),), vocab_size=512, validation_fraction=0.3, cache_dir=str(tmp_path / "cache")
    )
    path.write_text("\n".join(lines))
    prepared = prepare_data(config)
    assert prepared.train.num_documents + prepared.validation.num_documents == 40
    # The whole way through a Ray worker: the error is ours, not one of Ray's.
    path.write_text("\n".join([*lines[:30], "{", *lines[30:]]))
    encoder = DocumentEncoder.from_dir(prepared.tokenizer_dir)
    with pytest.raises(DataError, match=r"a\.jsonl, line 31: not JSON"):
        list(ingest.encode_units(plan_units(config, find_files(config)), encoder, config))
    with pytest.raises(DataError, match="line 31"):
        prepare_data(config)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [prepared.directory.name]


def test_a_split_without_one_side(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("a few words\n" * 50)
    config = DataConfig(source="text", paths=(str(tmp_path),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"no document .* on the validation side with validation_fraction 0\.05; raise"):
        prepare_data(config)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        prepare_data(config.model_copy(update={"validation_fraction": 0.999999}))
    assert not list((tmp_path / "cache").iterdir())


def test_damage_in_the_cache_is_noticed(tree: DataConfig) -> None:
    prepared = prepare_data(tree)
    file = prepared.directory / "validation" / "tokens.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 255
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"validation/tokens\.bin: sha256 is"):
        prepare_data(tree)
    assert prepare_data(tree.model_copy(update={"verify": False})).train.num_tokens == prepared.train.num_tokens
    (prepared.directory / "prepared.json").write_text("{")
    with pytest.raises(DataError, match=r"prepared\.json: cannot be read"):
        prepare_data(tree)


def test_a_full_disk_leaves_nothing_behind(tree: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing._HashedFile, "write", no_room)
    with pytest.raises(DataError, match="No space left on device; free space there or set cache_dir"):
        prepare_data(tree)
    assert not list((tmp_path / "cache").iterdir())


def test_the_second_of_two_preparing_processes_takes_the_firsts_result(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with prepare.new_directory(tmp_path, target) as work:
        (work / "file").write_text("second")
        target.mkdir()  # another process finished meanwhile
        (target / "file").write_text("first")
    assert (target / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_rays_settings_are_as_before(tree: DataConfig) -> None:
    before = ray.data.DataContext.get_current()
    prepare_data(tree)
    assert ray.data.DataContext.get_current() is before
    assert not before.execution_options.preserve_order


def test_starts_its_own_ray_when_there_is_none(tree: DataConfig, local_ray: None) -> None:
    """Runs last in this file: it needs the module's Ray to be gone."""
    ray.shutdown()
    assert prepare_data(tree).num_files == 61
    assert not ray.is_initialized()
