"""Structured outputs through `LLM`, by a model that was really trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from deepseek_ray import LLM, SamplingParams, StructuredOutputsParams
from deepseek_ray.errors import RequestError

FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
        "arguments": {"type": "array", "items": {"enum": ["self", "None", "True"]}, "maxItems": 3},
        "line": {"type": "integer", "minimum": 1, "maximum": 9999},
    },
    "required": ["name", "arguments", "line"],
    "additionalProperties": False,
}


def params(temperature: float = 0.8, **structure: object) -> SamplingParams:
    shape = StructuredOutputsParams(**structure)  # type: ignore[arg-type]
    return SamplingParams(max_tokens=400, temperature=temperature, seed=1, structured_outputs=shape)


def test_shapes_from_python(trained_model: Path) -> None:
    with LLM(trained_model, dtype="float32", threads=1) as llm:
        prompts = ["def ", "import os\n", "class Path", "    return"]
        outputs = llm.generate(
            prompts,
            [
                params(json=FUNCTION),
                params(temperature=0.0, json=json.dumps(FUNCTION)),
                params(regex=r"\d{3}-[a-z]{2,8}ß"),
                params(choice=["yes", "no", "perhaps"]),
            ],
        )
        texts = [output.outputs[0].text for output in outputs]
        assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}, texts
        jsonschema.validate(json.loads(texts[0]), FUNCTION)
        jsonschema.validate(json.loads(texts[1]), FUNCTION)
        assert re.fullmatch(r"\d{3}-[a-z]{2,8}ß", texts[2])
        assert texts[3] in ("yes", "no", "perhaps")
        with pytest.raises(RequestError, match=r"prompt 1: structured_outputs.regex cannot be used"):
            llm.generate(["a", "b"], [SamplingParams(), params(regex="(")])
        with pytest.raises(RequestError, match="structured_outputs"):
            llm.generate("a", SamplingParams(structured_outputs="json"))  # type: ignore[arg-type]
