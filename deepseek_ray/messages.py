"""What crosses a process boundary outside the per-layer path, typed field by field.

msgspec structs: encoded as MessagePack on links (never pickle), validated while decoding.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from deepseek_ray.errors import RequestError


class StructuredOutputsParams(msgspec.Struct, kw_only=True, frozen=True):
    """What the output must look like: exactly one of the first five. Names are vLLM's."""

    json: str | dict[str, Any] | None = None
    """A JSON schema, as an object or as text; kept as text. The output is one JSON value that it accepts."""
    regex: str | None = None
    """The whole output matches it. Syntax of Rust's `regex` crate: no look-around, no back-references."""
    choice: list[str] | None = None
    """The output is one of these."""
    grammar: str | None = None
    """A context-free grammar in llguidance's variant of Lark; its rule `start` is the output."""
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without spaces and line breaks between its parts. Else the model may put some there, a few at a time."""
    whitespace_pattern: str | None = None
    """A regex for what may stand between the parts of JSON."""

    def __post_init__(self) -> None:
        # As text the schema keeps its order and its numbers on every wire, and is a key to look up a compiled one.
        if isinstance(self.json, dict):
            try:
                text = json.dumps(self.json)
            except (TypeError, ValueError, RecursionError) as error:
                raise RequestError(f"the schema cannot be written as JSON: {error}", _JSON_FIELD) from None
            msgspec.structs.force_setattr(self, "json", text)

    @property
    def constraints(self) -> list[str]:
        """Names of the constraints that are given; a valid request has one."""
        return [name for name in _CONSTRAINTS if getattr(self, name) not in (None, False)]

    @property
    def field(self) -> str:
        """Where the constraint stands in a request, for errors."""
        return f"structured_outputs.{self.constraints[0]}"

    def validate(self) -> None:
        """Raise RequestError naming the field unless one constraint is given and its size is within bounds."""
        if len(self.constraints) != 1:
            found = ", ".join(self.constraints) or "none"
            raise RequestError(
                f"structured_outputs needs exactly one of {', '.join(_CONSTRAINTS)}; it has {found}",
                "structured_outputs",
            )
        for text in self.choice or ():
            if not text:
                raise RequestError("a choice is empty; each needs at least one character", "structured_outputs.choice")
        for name, longest in _LONGEST_CONSTRAINTS.items():
            value = getattr(self, name)
            length = sum(map(len, value)) if isinstance(value, list) else len(value or "")
            if length > longest:
                raise RequestError(
                    f"{name} has {length} characters; at most {longest}: simplify it", f"structured_outputs.{name}"
                )
        if self.choice is not None and not 0 < len(self.choice) <= MAX_CHOICES:
            raise RequestError(
                f"choice lists {len(self.choice)} strings; list 1 to {MAX_CHOICES}", "structured_outputs.choice"
            )


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How to choose tokens; names, defaults and meanings are vLLM's. `validate()` is called by whoever accepts one."""

    n: int = 1
    max_tokens: int | None = 16
    """Most tokens to generate; None means up to the context length."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 keep the whole vocabulary."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of most likely tokens to report beside the chosen one; None reports nothing, 0 only the chosen one."""
    logit_bias: dict[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must look like; None leaves it free. The output ends when nothing more can follow."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise RequestError naming the field, its value and the limit. Ids are checked when `vocab_size` is given."""
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails both comparisons
                raise RequestError(f"{name} is {value}; it must be between {low:g} and {high:g}", param=name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; lower it", param="min_tokens"
            )
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop_strings)} strings; at most {MAX_STOP_STRINGS}", param="stop")
        for text in self.stop_strings:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"a stop string has {len(text)} characters; it needs 1 to {MAX_STOP_LENGTH}", param="stop"
                )
        if self.structured_outputs is not None:
            self.structured_outputs.validate()
        if vocab_size is not None:
            self._validate_ids(vocab_size)

    def _validate_ids(self, vocab_size: int) -> None:
        for name in ("stop_token_ids", "logit_bias"):
            ids = getattr(self, name) or ()
            if len(ids) > MAX_LISTED_IDS:
                raise RequestError(f"{name} lists {len(ids)} token ids; at most {MAX_LISTED_IDS}", param=name)
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name} holds token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}", param=name
                    )
        for bias in (self.logit_bias or {}).values():
            if not -100 <= bias <= 100:
                raise RequestError(f"logit_bias holds {bias}; biases lie between -100 and 100", param="logit_bias")


MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LISTED_IDS = 1024
MAX_CHOICES = 1024
_JSON_FIELD = "structured_outputs.json"
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")
_LONGEST_CONSTRAINTS = {"json": 65536, "regex": 8192, "choice": 65536, "grammar": 32768, "whitespace_pattern": 256}
"""In characters. What fits may still be too hard to compile: see engine/grammar.py."""
_RANGES = (
    ("n", 1, 16),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("temperature", 0, 100),
    ("top_p", 1e-6, 1),
    ("top_k", -1, 2**31 - 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 1e-3, 1e3),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, 20),
)


class GenerateRequest(msgspec.Struct, kw_only=True, frozen=True, tag="generate"):
    """One sequence to generate. `n > 1` is expanded by the caller into n requests with their own ids and seeds."""

    request_id: str
    attempt: int = 0
    """0 for the first try; one more each time the request is sent to another attention worker."""
    prompt_token_ids: list[int]
    output_token_ids: list[int] = []
    """Tokens the client already has (non-empty on a retry); generation goes on after them."""
    params: SamplingParams
    deadline_seconds: float | None = None
    """Time left when the request was sent, a duration: clocks of two processes are never compared."""
    prompt_logprobs: int | None = None
    """Report the prompt's own tokens too, as `SamplingParams.logprobs` does the output's; None reports nothing."""
    cache_salt: str | None = None
    """Requests share cached prefixes only with those of the same salt."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of a chosen token, and the most likely tokens at its place, most likely first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []
    rank: int = 1
    """Place of the chosen token by probability, 1 for the most likely one."""


class RequestTiming(msgspec.Struct, kw_only=True, frozen=True):
    """Where a finished output's time went in the engine that finished it."""

    queue_seconds: float
    """From its arrival to the first step that computed something of it."""
    prefill_seconds: float
    """From then to its first token there."""
    decode_seconds: float
    """From then to its last one."""


class TokenEvent(msgspec.Struct, kw_only=True, frozen=True):
    """What one engine step added to one request. Events of a request, in order, concatenate to its output."""

    request_id: str
    attempt: int
    index: int
    """Position in the output of the first token of `token_ids`; readers drop what they have already seen."""
    token_ids: list[int] = []
    text: str = ""
    """Text that became final with this event: whole characters only, never part of a possible stop string."""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """Entries of the prompt's second token on, with the event of index 0, when the request asked for them."""
    num_cached_tokens: int | None = None
    """With the event of index 0: prompt tokens that were found in the prefix cache."""
    finish_reason: str | None = None
    """None while running; then "stop", "length", "abort" or "error"."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the output, None for end-of-sequence."""
    timing: RequestTiming | None = None
    """With the last token of an output."""
    error: str | None = None
    """With finish_reason "error": one sentence for the client. `error_kind` is the name of the error class."""
    error_kind: str | None = None


class AbortRequest(msgspec.Struct, kw_only=True, frozen=True, tag="abort"):
    """The client is gone: stop the work and free its cache blocks."""

    request_id: str


class TokenEvents(msgspec.Struct, frozen=True):
    """All events of one engine step for one client: one frame per step and client, whatever the number of requests."""

    events: list[TokenEvent]


ClientMessage = GenerateRequest | AbortRequest
"""What a client sends to an attention worker; the answer is a stream of TokenEvents."""
