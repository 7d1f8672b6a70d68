"""Parts, rows and output files without Ray: what is there is not made again, what is bad says so in its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepseek_ray.batch import outputs
from deepseek_ray.batch.generate import BatchGenerator
from deepseek_ray.batch.outputs import open_output, output_path
from deepseek_ray.batch.prompts import plan_parts, read_part
from deepseek_ray.config.batch import BatchConfig
from deepseek_ray.engine.request_output import CompletionOutput, RequestOutput
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DataError, RequestError
from deepseek_ray.llm import LLM
from deepseek_ray.messages import SamplingParams


class Echo:
    """Answers a prompt with itself in capitals; refuses a batch with a long one, as `LLM` does."""

    def __init__(self) -> None:
        self.generated: list[str] = []
        self.seeds: list[int | None] = []

    def generate(
        self, prompts: list[Any], sampling_params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        for index, prompt in enumerate(prompts):
            if len(prompt) > 20:
                raise RequestError(f"prompt {index}: too long")
        self.generated += prompts
        self.seeds += [params.seed for params in sampling_params]
        return [
            RequestOutput("r", prompt, [1, 2], [CompletionOutput(0, prompt.upper(), [7], finish_reason="stop")])
            for prompt in prompts
        ]


def settings(tmp_path: Path, *inputs: Path, **changes: Any) -> BatchConfig:
    values = {"model_dir": "m", "input": [str(path) for path in inputs], "output": str(tmp_path / "out")}
    return BatchConfig.parse({**values, "rows_per_file": 3, "seed": 100, **changes})


def generate_missing(config: BatchConfig, llm: Any, tokenizer: Tokenizer | None = None) -> list[Any]:
    generator = BatchGenerator(config, llm, tokenizer)
    return [generator.run(part) for part in open_output(config, plan_parts(config))]


def written(config: BatchConfig) -> list[dict[str, Any]]:
    files = sorted(Path(config.output).glob("part-*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(8)))
    return path


def test_every_row_is_answered_in_order(tmp_path: Path, eight: Path) -> None:
    config, llm = settings(tmp_path, eight), Echo()
    results = generate_missing(config, llm)
    assert [(result.rows, result.bad_rows, result.tokens) for result in results] == [(3, 0, 3), (3, 0, 3), (2, 0, 2)]
    assert [(row["row"], row["text"]) for row in written(config)] == [(n, f"PROMPT {n}") for n in range(8)]
    assert (
        written(config)[4] | {"row": 4, "finish_reason": "stop", "token_ids": [7], "error": None} == written(config)[4]
    )
    assert llm.seeds == [100 + n for n in range(8)]


def test_what_is_there_is_not_generated_again(tmp_path: Path, eight: Path) -> None:
    config = settings(tmp_path, eight)
    generate_missing(config, Echo())
    before = written(config)
    output_path(config, plan_parts(config)[1]).unlink()
    again = Echo()
    generate_missing(config, again)
    assert again.generated == ["prompt 3", "prompt 4", "prompt 5"]
    assert written(config) == before
    assert generate_missing(config, again) == []


def test_files_appear_whole(tmp_path: Path, eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death before the rename leaves nothing under the file's name, and the part is generated again."""
    config = settings(tmp_path, eight)
    open_output(config, plan_parts(config))

    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(outputs.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            generate_missing(config, Echo())
    assert [path.name for path in Path(config.output).iterdir()] == ["job.json"]
    assert len(generate_missing(config, Echo())) == 3


def test_bad_rows_are_told_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = ['{"prompt": "one"}', "broken", '{"other": 1}', '{"prompt": 5}', '{"prompt": "%s"}' % ("x" * 30), "",
             '{"prompt": "two"}']  # fmt: skip
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    config, llm = settings(tmp_path, path, rows_per_file=20), Echo()
    (result,) = generate_missing(config, llm)
    assert (result.rows, result.bad_rows) == (8, 6)
    assert [row["text"] for row in written(config)] == ["ONE", None, None, None, None, None, "TWO", None]
    errors = [row["error"] for row in written(config)]
    for place, part in {1: "not JSON", 2: "no field 'prompt' (other)", 3: "prompt is 5, not a text", 4: "too long",
                        5: "not JSON", 7: "not UTF-8"}.items():  # fmt: skip
        assert part in errors[place]
    assert llm.generated == ["one", "two"]


def test_text_and_parquet(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("first\nsecond\n")
    parquet = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p0", "p1", None, "p3"]}), parquet, row_group_size=2)
    config = settings(tmp_path, text, parquet, format="parquet")
    parts = plan_parts(config)
    assert [(part.kind, part.start, part.num_rows, part.first_row) for part in parts] == [
        ("text", 0, 2, 0), ("parquet", 0, 3, 2), ("parquet", 3, 1, 5)]  # fmt: skip
    assert [row.prompt for part in parts for row in read_part(part, config)] == [
        "first",
        "second",
        "p0",
        "p1",
        None,
        "p3",
    ]
    generate_missing(config, Echo())
    tables = [pyarrow.parquet.read_table(output_path(config, part)) for part in parts]
    assert pyarrow.concat_tables(tables).column("text").to_pylist() == ["FIRST", "SECOND", "P0", "P1", None, "P3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 7}, r"belongs to another job \(max_tokens was 128, is 7\)"),
        ({"rows_per_file": 4}, r"rows_per_file was 3, is 4"),
    ],
)
def test_a_folder_of_another_job_is_refused(tmp_path: Path, eight: Path, changes: dict[str, Any], message: str) -> None:
    generate_missing(settings(tmp_path, eight), Echo())
    with pytest.raises(DataError, match=message):
        generate_missing(settings(tmp_path, eight, **changes), Echo())


def test_changed_input_is_refused(tmp_path: Path, eight: Path) -> None:
    generate_missing(settings(tmp_path, eight), Echo())
    eight.write_text('{"prompt": "only"}\n')
    with pytest.raises(DataError, match="the input files had other rows"):
        generate_missing(settings(tmp_path, eight), Echo())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file or folder"),
        ("empty.jsonl", b"", "holds no rows"),
        ("bad.parquet", b"no", "not a readable Parquet file"),
    ],
)
def test_unusable_input_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        plan_parts(settings(tmp_path, tmp_path / name))


def test_a_real_model_answers_chats(tmp_path: Path, trained_model: Path) -> None:
    """One row alone and in company has the same answer; a prompt beyond the context is refused by itself."""
    rows = [{"prompt": "hello"}, {"prompt": [{"role": "user", "content": "hello"}]}, {"prompt": "long " * 600}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(tmp_path, path, chat=True, max_tokens=6, dtype="float32")
    with LLM(trained_model, dtype="float32", threads=1) as llm:
        generate_missing(config, llm, Tokenizer.from_dir(trained_model))
    first, second, third = written(config)
    assert first["token_ids"] == second["token_ids"] != []
    assert first["prompt_tokens"] == second["prompt_tokens"] > 2
    assert third["finish_reason"] == "error"
    assert "context holds 512" in third["error"]
