"""Constraints made to hurt: each is refused or compiled within the bounds, and the process lives on."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from deepseek_ray.engine import grammar_check
from deepseek_ray.engine.grammar_check import CPU_SECONDS, GrammarChecker
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import StructuredOutputsParams


@pytest.fixture(scope="module")
def checker() -> GrammarChecker:
    return GrammarChecker()


def test_a_good_one_passes_and_is_remembered(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "integer"}}})
    checker.check(schema)
    monkeypatch.setattr(grammar_check, "_try_out", lambda encoded: pytest.fail("tried out again"))
    checker.check(schema)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        # llguidance itself counts nothing while it prepares this; one digit more and it takes minutes and gigabytes.
        ({"json": {"type": "integer", "multipleOf": 99_999_989}}, "takes more than 2 s or 1024 MiB"),
        ({"json": {"allOf": [{"type": "string", "pattern": f".*{c}.{{20}}"} for c in "abcdefgh"]}}, "cannot be used"),
        ({"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000}, "too deeply nested"),
        ({"regex": "(" * 300 + "a" + ")" * 300}, "cannot be used"),
        ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, "recursion limit"),
        ({"regex": "("}, "unclosed group"),
    ],
    ids=[
        "multiple-of",
        "conjunction",
        "deep-grammar",
        "deep-regex",
        "deep-schema",
        "wrong",
    ],
)
def test_hostile_ones_are_refused_in_time(checker: GrammarChecker, params: dict[str, object], words: str) -> None:
    structure = StructuredOutputsParams(**params)  # type: ignore[arg-type]
    started = time.process_time()
    with pytest.raises(RequestError, match=words) as caught:
        checker.check(structure)
    assert caught.value.param == structure.field
    assert time.process_time() - started < CPU_SECONDS, "the work was done here, not in a process of its own"


@pytest.mark.parametrize(
    "regex", ["(a+)+b", "((a{1,100}){1,100}){1,100}", "(a|b)*a(a|b){30}", r"(\p{L}|\p{N}){1,5000}"]
)
def test_ones_that_only_look_hostile_pass(checker: GrammarChecker, regex: str) -> None:
    checker.check(StructuredOutputsParams(regex=regex))


def test_it_loads_no_torch() -> None:
    program = "import sys; import deepseek_ray.engine.grammar_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
