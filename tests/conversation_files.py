"""Small conversation files for tests, and where the shared GSM8K files are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_DATA = Path(os.environ.get("DEEPSEEK_RAY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "text"
WORDS = ("for", "line", "in", "file", "if", "value", "is", "not", "none", "return")


def sums(first: int, count: int) -> list[dict[str, Any]]:
    """Conversations whose answers repeat the word of the question: easy to learn."""
    lines = []
    for number in range(first, first + count):
        word = WORDS[number % len(WORDS)]
        messages = [
            {"role": "user", "content": f"say {word} {number}"},
            {"role": "assistant", "content": f"the word is {word}, and again {word}"},
        ]
        lines.append({"messages": messages})
    return lines


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def gsm8k(directory: Path, num_train: int, num_test: int) -> tuple[Path, Path]:
    """The first questions of both of GSM8K's files; skips the test where they are not."""
    written = []
    for name, count in (("gsm8k_train.jsonl", num_train), ("gsm8k_test.jsonl", num_test)):
        if not (_DATA / name).is_file():
            pytest.skip(f"{_DATA / name} is not there; set DEEPSEEK_RAY_TEST_DATA to the folder of the test data")
        with (_DATA / name).open(encoding="utf-8") as lines:
            (directory / name).write_text("".join(next(lines) for _ in range(count)), encoding="utf-8")
        written.append(directory / name)
    return written[0], written[1]
