"""What one worker does: it owns a model and turns parts of the input into output files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from deepseek_ray.batch.outputs import OutputRow, write_output
from deepseek_ray.batch.prompts import Part, Row, read_part
from deepseek_ray.config.batch import BatchConfig
from deepseek_ray.engine.request_output import RequestOutput
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import SamplingParams


class Generates(Protocol):
    """What is needed of `LLM`."""

    def generate(
        self, prompts: list[str | list[int]], sampling_params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]: ...


@dataclass(frozen=True)
class PartResult:
    """What became of a part; plain values."""

    index: int
    rows: int
    bad_rows: int
    tokens: int
    """Generated."""


class BatchGenerator:
    """Generates part after part with one model."""

    def __init__(self, config: BatchConfig, llm: Generates, tokenizer: Tokenizer | None) -> None:
        self._config = config
        self._llm = llm
        self._tokenizer = tokenizer
        self._params = SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop=list(config.stop) or None,
        )

    def run(self, part: Part) -> PartResult:
        """Read, generate, and publish the part's file. A row that cannot be generated says so in its own place."""
        rows = read_part(part, self._config)
        outputs = {row.number: OutputRow(row.number, None, finish_reason="error", error=row.error) for row in rows}
        prompts = {}
        for row in rows:
            if row.prompt is not None:
                try:
                    prompts[row.number] = self._prompt(row)
                except RequestError as error:
                    outputs[row.number] = _failed(row, error)
        self._generate([row for row in rows if row.number in prompts], prompts, outputs)
        write_output(self._config, part, [outputs[row.number] for row in rows])
        return PartResult(
            index=part.index,
            rows=len(rows),
            bad_rows=sum(output.error is not None for output in outputs.values()),
            tokens=sum(len(output.token_ids or ()) for output in outputs.values()),
        )

    def _prompt(self, row: Row) -> str | list[int]:
        if not self._config.chat:
            assert isinstance(row.prompt, str)
            return row.prompt
        if self._tokenizer is None:
            raise RequestError("chat needs a tokenizer beside the model's weights, and there is none")
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        assert messages is not None
        return self._tokenizer.encode(self._tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def _generate(
        self, rows: Sequence[Row], prompts: dict[int, str | list[int]], outputs: dict[int, OutputRow]
    ) -> None:
        """All rows together. A prompt that is refused (too long, say) is refused before anything is generated: then
        each half goes on by itself, until the refused row is alone."""
        if not rows:
            return
        params = [msgspec.structs.replace(self._params, seed=self._config.seed + row.number) for row in rows]
        try:
            results = self._llm.generate([prompts[row.number] for row in rows], params, use_tqdm=False)
        except RequestError as error:
            if len(rows) == 1:
                outputs[rows[0].number] = _failed(rows[0], error)
                return
            half = len(rows) // 2
            self._generate(rows[:half], prompts, outputs)
            self._generate(rows[half:], prompts, outputs)
            return
        for row, result in zip(rows, results, strict=True):
            outputs[row.number] = _finished(row, result)


def _finished(row: Row, result: RequestOutput) -> OutputRow:
    output = result.outputs[0]
    done = OutputRow(
        row=row.number,
        prompt=_shown(row),
        text=output.text,
        token_ids=output.token_ids,
        prompt_tokens=len(result.prompt_token_ids),
        finish_reason=output.finish_reason,
    )
    return replace(done, error=output.error) if output.error else done


def _failed(row: Row, error: RequestError) -> OutputRow:
    return OutputRow(row.number, _shown(row), finish_reason="error", error=error.message)


def _shown(row: Row) -> str | None:
    return row.prompt if isinstance(row.prompt, str) or row.prompt is None else json.dumps(row.prompt)
