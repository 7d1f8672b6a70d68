"""Which files a corpus has, how they are cut, and what is wrong with them."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.config.data import DataConfig
from deepseek_ray.data.corpus import CorpusFile, ReadUnit, corpus_digest, find_files, plan_units
from deepseek_ray.data.readers import Document, read_unit
from deepseek_ray.errors import ConfigError, DataError


def texts_of(config: DataConfig) -> list[str]:
    units = plan_units(config, find_files(config))
    return [document.text for unit in units for document in read_unit(unit, config.text_field).documents]


def write_lines(path: Path, values: list[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "text"}, "source text needs paths"),
        ({"source": "stdlib", "paths": ["x"]}, r"stdlib takes no paths, but paths is \['x'\]"),
        ({"vocab_size": 300}, "vocab_size is 300"),
        ({"vocabsize": 3000}, "did you mean 'vocab_size'"),
        ({"validation_fraction": 0}, "validation_fraction is 0"),
    ],
)
def test_config_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig.parse(values, "run.yaml")


def test_stdlib_is_the_library_itself() -> None:
    names = {file.name for file in find_files(DataConfig())}
    assert {"json/decoder.py", "asyncio/tasks.py", "this.py"} <= names
    assert not any(word in f"/{name}" for name in names for word in ("site-packages", "/_sysconfigdata", "/test/"))
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "json/decoder.py").read_text() in texts_of(
        DataConfig(source="source_tree", paths=(str(root / "json"),))
    )


def test_source_tree_folders_globs_and_suffixes(tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.py", "sub/c.txt", ".git/d.py", "__pycache__/e.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    (tmp_path / "empty.py").write_text("")
    whole = DataConfig(source="source_tree", paths=(str(tmp_path),))
    assert [f.name for f in find_files(whole)] == ["a.py", "empty.py", "sub/b.py"]
    assert texts_of(whole) == ["a.py", "sub/b.py"]
    both = whole.model_copy(update={"suffixes": (".py", ".txt")})
    assert texts_of(both) == ["a.py", "sub/b.py", "sub/c.txt"]
    matched = DataConfig(source="source_tree", paths=(str(tmp_path / "**" / "*.txt"), str(tmp_path / "sub")))
    assert [f.name for f in find_files(matched)] == ["b.py", "sub/c.txt"]
    twice = DataConfig(source="source_tree", paths=(str(tmp_path), str(tmp_path / "*.py")))
    assert len(find_files(twice)) == 3


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\n\n", "ü\n".encode()]), max_size=20), step=st.integers(1, 7)
)
def test_ranges_give_every_line_once(tmp_path_factory: pytest.TempPathFactory, data: list[bytes], step: int) -> None:
    path = tmp_path_factory.mktemp("ranges") / "f.txt"
    path.write_bytes(b"".join(data))
    config = DataConfig(source="text", paths=(str(path),), document_bytes=step)
    texts = texts_of(config)
    assert "".join(texts).encode() == path.read_bytes()
    assert all(text.endswith("\n") for text in texts[:-1])


def test_documents_stay_on_their_side(tmp_path: Path) -> None:
    keys = [f"folder/file{n}.py" for n in range(2000)]
    chosen = {key for key in keys if Document(key, "").is_validation(0.1)}
    assert 150 < len(chosen) < 250
    assert chosen <= {key for key in keys if Document(key, "").is_validation(0.2)}
    # sha256("folder/file0.py") begins with this fraction of 2**64 (golden: the split must not move between releases)
    assert not Document("folder/file0.py", "").is_validation(0.612482 - 1e-4)
    assert Document("folder/file0.py", "").is_validation(0.612482 + 1e-4)


def test_names_not_places_key_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f.py").write_text("x = 1\n")
    keys, digests = [], []
    for folder in ("one", "two"):
        config = DataConfig(source="source_tree", paths=(str(tmp_path / folder),))
        files = find_files(config)
        digests.append(corpus_digest(files))
        keys += [d.key for unit in plan_units(config, files) for d in read_unit(unit, "text").documents]
    assert keys == ["f.py", "f.py"]
    assert digests[0] == digests[1]
    (tmp_path / "two" / "f.py").write_text("x = 2\n")
    assert corpus_digest(find_files(config)) != digests[0]


def test_invalid_utf8_files_are_skipped_and_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\n")
    config = DataConfig(source="text", paths=(str(tmp_path),))
    (unit,) = plan_units(config, find_files(config))
    content = read_unit(unit, "text")
    assert (content.documents, content.skipped) == ([], ["bad.txt#0"])


def test_json_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"body": "one"}, {"body": "zwei ü"}, {"body": ""}])
    path.write_text(path.read_text() + "\n  \n" + json.dumps({"body": "three"}), encoding="utf-8")
    assert texts_of(DataConfig(source="jsonl", paths=(str(path),), text_field="body")) == ["one", "zwei ü", "three"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'["x"]', "a JSON list, not an object"),
        (b'{"body": "x", "id": 1}', r"no field 'text' \(fields: body, id\)"),
        (b'{"text": 3}', "holds int, not a string"),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
    ],
)
def test_broken_json_lines_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 3 + line + b"\n" + good)
    unit = ReadUnit("json_lines", "a.jsonl", str(path), len(good) + 1, path.stat().st_size, 0)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 4: .*{message}"):
        read_unit(unit, "text")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", None, "", "two", "three"], "n": [1, 2, 3, 4, 5]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    config = DataConfig(source="parquet", paths=(str(tmp_path),))
    assert len(plan_units(config, find_files(config))) == 3
    assert texts_of(config) == ["one", "two", "three"]
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; set text_field to one of text, n"):
        texts_of(config.model_copy(update={"text_field": "body"}))
    with pytest.raises(DataError, match="column 'n' holds int64, not strings"):
        texts_of(config.model_copy(update={"text_field": "n"}))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        texts_of(config)


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.txt: no such file or folder"):
        find_files(DataConfig(source="text", paths=(str(tmp_path / "missing.txt"),)))
    with pytest.raises(DataError, match=r"\*\.txt: matches no file"):
        find_files(DataConfig(source="text", paths=(str(tmp_path / "*.txt"),)))
    with pytest.raises(DataError, match=r"source text: no files ending in \.txt \.md in"):
        find_files(DataConfig(source="text", paths=(str(tmp_path),)))
    with pytest.raises(DataError, match="cannot be read"):
        corpus_digest([CorpusFile("gone.txt", tmp_path / "gone.txt", 3)])
