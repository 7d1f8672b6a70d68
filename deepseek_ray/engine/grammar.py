"""Outputs of a given shape: which tokens may come next under a JSON schema, a regex, a list or a grammar.

The work is llguidance's (https://github.com/guidance-ai/llguidance). All that a constrained output is at any moment
follows from its `StructuredOutputsParams` and its tokens so far: an engine that takes a sequence over compiles the
first, feeds in the second, and stands where the last engine stood. No torch.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import llguidance
import msgspec
import numpy as np
from numpy.typing import NDArray

from deepseek_ray.errors import RequestError
from deepseek_ray.messages import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

    # engine/grammar_check.py starts a process for every new constraint, and that has no use for a tokenizer
    from deepseek_ray.engine.tokenizer import Tokenizer

_WHITESPACE = r"( |\n[ \t]{0,32})"
"""Between the parts of JSON unless a request says otherwise: what a pretty-printer writes. Bounded, since a model that
has lost its way pads for ever."""
_MAX_COMPILED = 16
"""Compiled constraints that are kept, the most recently used ones."""


def parser_limits() -> llguidance.LLParserLimits:
    """Bounds of one constraint's work: about 20 ms to build its lexer, 15 ms per token, 50 MB of lexer states.

    llguidance does not count everything (`multipleOf` of a large number, for one), hence engine/grammar_check.py.
    """
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=25_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def grammar_source(params: StructuredOutputsParams) -> str:
    """The constraint in llguidance's own notation. RequestError when it is not even well-formed."""
    if params.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        return llguidance.LLMatcher.grammar_from_lark(f"start: {choices}")
    if params.grammar is not None:
        return llguidance.LLMatcher.grammar_from_lark(params.grammar)
    schema = '{"type": "object"}' if params.json is None else params.json
    assert isinstance(schema, str), "a schema is kept as text"
    overrides: JsonCompileOptions = {"whitespace_pattern": params.whitespace_pattern or _WHITESPACE}
    if params.disable_any_whitespace:
        overrides = {"whitespace_flexible": False}
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
    except ValueError as error:
        raise RequestError(f"the schema cannot be read: {error}", "structured_outputs.json") from None


def compile_matcher(params: StructuredOutputsParams, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher that stands at the start. RequestError names the field and what is wrong with it."""
    matcher = llguidance.LLMatcher(tokenizer, grammar_source(params), limits=parser_limits(), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # what nothing can satisfy shows here
    if matcher.is_error():
        raise RequestError(f"{params.field} cannot be used: {_reason(matcher)}", params.field)
    return matcher


class Grammars:
    """Compiled constraints for one tokenizer. Safe to use from several threads; compiling releases the GIL."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """`vocab_size`: width of the logits. The first use, or `load`, takes about 5 us per token of the tokenizer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()

    def load(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance has it. RequestError when it cannot be had of this tokenizer."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            return self._vocabulary

    def start(self, params: StructuredOutputsParams) -> GrammarState:
        """The state of an output that has no token yet. RequestError names the field and what is wrong with it."""
        vocabulary = self.load()
        key = msgspec.msgpack.encode(params)
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            compiled = compile_matcher(params, vocabulary)
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
            # Copied under the lock: the copy reads what a copy elsewhere might be reading too.
            return GrammarState(compiled.deep_copy(), self._vocab_size, self._eos_token_ids)

    def _read_vocabulary(self) -> llguidance.LLTokenizer:
        if not self._eos_token_ids:
            raise RequestError(
                "structured outputs need an end-of-sequence token and this model names none; set eos_token_id in its "
                "generation_config.json",
                "structured_outputs",
            )
        width = max(self._vocab_size, self._tokenizer.vocab_size)
        try:
            return llguidance.LLTokenizer(
                self._tokenizer.to_json(), n_vocab=width, eos_token=sorted(self._eos_token_ids)
            )
        except ValueError as error:
            raise RequestError(
                f"structured outputs are not possible with this model's tokenizer: {error}", "structured_outputs"
            ) from None


class GrammarState:
    """How far one output has come under its constraint."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def allowed(self, ends: frozenset[int], not_yet: frozenset[int]) -> NDArray[np.bool_]:
        """[vocab_size]: True for the tokens that may come next.

        `ends` are the ids that may end this output where its shape is complete; of those, the ones `not_yet` allowed
        are left out. An end-of-sequence token beyond `ends` (a request may ignore them) comes only when nothing else
        can. RequestError when the constraint has become too hard to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RequestError(
                f"the structured output is too hard to follow here: {_reason(self._matcher)}; "
                "simplify the schema, regex or grammar"
            )
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if self._matcher.is_accepting():
            allowed[list(ends)] = True
        held_back = list(not_yet | (self._eos_token_ids - ends))
        closing = [token_id for token_id in self._eos_token_ids if allowed[token_id]]
        allowed[held_back] = False
        if not allowed.any():
            allowed[closing] = True
        return allowed

    def accept(self, token_id: int) -> bool:
        """Take the next token; True when the output is complete: nothing can follow it.

        RequestError for a token that the constraint does not allow and that does not end a complete output.
        """
        if self._matcher.is_accepting() and not self._matcher.validate_tokens([token_id]):
            return True  # a stop token of the request
        if not self._matcher.consume_token(token_id):
            raise RequestError(f"the output does not follow its structure: token {token_id} is not allowed there")
        return self._matcher.is_stopped()


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Why a matcher gave up, on one line: llguidance quotes the grammar at length."""
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    if text == "NoExtensionBias":
        return "no text satisfies it"
    return text if len(text) <= 300 else text[:300] + " ..."
