"""The offline face: `LLM(model_dir).generate(prompts)`, in this process or through the actors of a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.engine.grammar_check import GrammarChecker
from deepseek_ray.engine.request_output import CompletionOutput, RequestOutput
from deepseek_ray.engine.requests import check_needs_no_tokenizer, check_request, expand_request
from deepseek_ray.errors import CheckpointError, ConfigError, RequestError, UnavailableError
from deepseek_ray.messages import GenerateRequest, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from deepseek_ray.engine.offline import OfflineBackend

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams"]

Prompt = str | list[int]


def _open_local(config: DeploymentConfig) -> OfflineBackend:
    from deepseek_ray.engine.offline import LocalBackend  # torch is loaded after the arguments are checked

    return LocalBackend(config)


def _open_actors(config: DeploymentConfig) -> OfflineBackend:
    from deepseek_ray.actors.offline import ActorsBackend

    return ActorsBackend(config)


_BACKENDS: dict[str, Callable[[DeploymentConfig], OfflineBackend]] = {"local": _open_local, "actors": _open_actors}


class LLM:
    """A loaded model that generates text for lists of prompts.

    Close it with `shutdown()` or use it as a context manager. One thread at a time.
    """

    def __init__(
        self,
        model_dir: str | Path,
        dtype: str = "bfloat16",
        backend: str = "local",
        attention_workers: int = 1,
        expert_shards: int = 2,
        threads: int | None = None,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        seed: int = 0,
        deterministic: bool = True,
        quantization: str | None = None,
        attention_device: str = "cpu",
        expert_device: str = "cpu",
        speculative: str | None = None,
        num_speculative_tokens: int = 1,
    ) -> None:
        """ConfigError for a bad argument, CheckpointError for a model that cannot be read, before weights are loaded.

        `attention_workers` and `expert_shards` count for `backend="actors"`. `threads`: cores the whole engine may use.
        `seed` decides the samples of requests that bring no seed: the same calls give the same outputs.
        `deterministic`: the output does not depend on the batch, the shards or a failure; False is torch's own speed.
        `quantization`: "int8" or "int4" keeps experts and linear layers in a half or a quarter of bfloat16's memory.
        `attention_device`, `expert_device`: "cpu" or "cuda", each for itself; "cuda" needs `deterministic=False`.
        `speculative`: "mtp" or "ngram" drafts up to `num_speculative_tokens` tokens, which one step then checks; what
        comes out stays the same.
        """
        self._backend: OfflineBackend | None = None
        if backend not in _BACKENDS:
            raise ConfigError(f"backend is {backend!r}; it must be one of: {', '.join(sorted(_BACKENDS))}")
        engine = {
            "max_model_len": max_model_len,
            "kv_cache_bytes": kv_cache_bytes,
            "seed": seed,
            "deterministic": deterministic,
            "speculative": speculative and {"method": speculative, "num_tokens": num_speculative_tokens},
        }
        values = {
            "model_dir": str(model_dir),
            "dtype": dtype,
            "quantization": quantization,
            "attention_device": attention_device,
            "expert_device": expert_device,
            "attention_workers": attention_workers,
            "expert_shards": expert_shards,
            "threads": threads,
            "engine": engine,
        }
        config = DeploymentConfig.parse(values, "LLM")
        if not Path(model_dir).is_dir():
            raise CheckpointError(
                f"model_dir {str(model_dir)!r} is not a directory; give the path of a checkpoint in the Hugging Face "
                "layout (config.json and *.safetensors)"
            )
        self._model_dir = str(model_dir)
        self._num_requests = 0
        self._grammar_checker = GrammarChecker()
        self._backend = _BACKENDS[backend](config)

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is a text or a list of token ids.

        `sampling_params`: one for all prompts or one for each; None takes the defaults. `use_tqdm` shows progress when
        stderr is a terminal. Text prompts and stop strings need a tokenizer beside the weights; without one, outputs
        hold token ids and no text. RequestError names what is wrong before anything is generated; what goes wrong with
        one request afterwards ends it with finish_reason "error" and `error`.
        """
        if self._backend is None:
            raise UnavailableError("this LLM was shut down; make a new one")
        listed = _prompt_list(prompts)
        results: list[RequestOutput] = []
        requests: list[GenerateRequest] = []
        for index, (prompt, params) in enumerate(zip(listed, _params_list(sampling_params, len(listed)), strict=True)):
            with _naming_prompt(index, len(listed)):
                result, expanded = self._prepare(self._backend, str(self._num_requests + index), prompt, params)
            results.append(result)
            requests += expanded
        self._num_requests += len(listed)
        _collect(self._backend, requests, results, use_tqdm and sys.stderr.isatty())
        return results

    def shutdown(self) -> None:
        """Free the model. Calling it again does nothing."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _prepare(
        self, backend: OfflineBackend, request_id: str, prompt: Prompt, params: SamplingParams
    ) -> tuple[RequestOutput, list[GenerateRequest]]:
        """Tokenise and check one prompt: its (empty) result, and a request per output."""
        if (isinstance(prompt, str) or params.stop_strings) and backend.tokenizer is None:
            what = "text prompts" if isinstance(prompt, str) else "stop strings"
            raise RequestError(
                f"{what} need a tokenizer and {self._model_dir} has no tokenizer.json; copy the model's tokenizer "
                "files there, or give lists of token ids and stop_token_ids",
                param="prompt" if isinstance(prompt, str) else "stop",
            )
        if isinstance(prompt, str):
            assert backend.tokenizer is not None
            token_ids, text = backend.tokenizer.encode(prompt), prompt
        else:
            token_ids, text = prompt, None
        params.validate(backend.vocab_size)
        if params.structured_outputs is not None:
            if backend.tokenizer is None:
                check_needs_no_tokenizer(params)
            self._grammar_checker.check(params.structured_outputs)
        expanded = expand_request(GenerateRequest(request_id=request_id, prompt_token_ids=token_ids, params=params))
        check_request(expanded[0], backend.vocab_size, backend.max_model_len)
        outputs = [CompletionOutput(index) for index in range(params.n)]
        return RequestOutput(request_id, text, token_ids, outputs), expanded


def _prompt_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if _is_ids(prompts) and len(prompts):
        return [list(prompts)]
    if isinstance(prompts, (list, tuple)):
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) and not _is_ids(prompt):
                raise RequestError(
                    f"prompt {index} is of type {type(prompt).__name__}; give a text or a list of token ids (int)",
                    param="prompt",
                )
        return [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    raise RequestError(
        f"prompts is of type {type(prompts).__name__}; give a text, a list of token ids, or a list of these",
        param="prompt",
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in value
    )


def _params_list(params: Any, num_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [_checked_types(params or SamplingParams())] * num_prompts
    if not isinstance(params, (list, tuple)) or not all(isinstance(entry, SamplingParams) for entry in params):
        raise RequestError("sampling_params must be a SamplingParams or a list of them", param="sampling_params")
    if len(params) != num_prompts:
        raise RequestError(
            f"there are {len(params)} sampling_params for {num_prompts} prompts; give one, or one for each prompt",
            param="sampling_params",
        )
    return [_checked_types(entry) for entry in params]


def _checked_types(params: SamplingParams) -> SamplingParams:
    """A struct made by calling it holds whatever it was given; converting it checks the type of every field."""
    try:
        return msgspec.convert(msgspec.to_builtins(params), SamplingParams)
    except (msgspec.ValidationError, TypeError) as error:
        raise RequestError(f"sampling_params: {error}", param="sampling_params") from None


@contextmanager
def _naming_prompt(index: int, num_prompts: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except RequestError as error:
        if num_prompts == 1:
            raise
        raise RequestError(f"prompt {index}: {error.message}", error.param, error.code) from None


def _collect(
    backend: OfflineBackend, requests: list[GenerateRequest], results: list[RequestOutput], show_progress: bool
) -> None:
    """Run the requests and append their events to `results`, in which they stand in the same order."""
    outputs = (output for result in results for output in result.outputs)
    output_of = {request.request_id: output for request, output in zip(requests, outputs, strict=True)}
    with _progress_bar(len(requests), show_progress) as advance:
        for event in backend.run(requests):
            output_of[event.request_id].add(event, backend.tokenizer)
            advance(event.finish_reason is not None, len(event.token_ids))


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[bool, int], None]]:
    if not show:
        yield lambda finished, num_tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[num_tokens]} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, num_tokens=0)

        def advance(finished: bool, num_tokens: int) -> None:
            shown = progress.tasks[0].fields["num_tokens"] + num_tokens
            progress.update(task, advance=int(finished), num_tokens=shown)

        yield advance
