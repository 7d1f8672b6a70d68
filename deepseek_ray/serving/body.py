"""A request body to plain values: strict JSON, so that no two readers of a body can disagree about it."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from deepseek_ray.errors import RequestError


def parse_body(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in `body`.

    RequestError for invalid UTF-8 or JSON, NaN and infinities, duplicate keys, lone surrogates, nesting deeper than
    `max_depth`, and anything but an object.
    """
    if not body:
        raise _invalid("the body is empty; send a JSON object")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8 (byte {error.start}); send JSON encoded as UTF-8") from None
    try:
        values = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys
        )
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError as error:
        raise _invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise _invalid(f"the body is a JSON {_JSON_NAMES[type(values)]}; send an object")
    _check_values(values, max_depth)
    return values


_JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def _check_values(values: dict[str, Any], max_depth: int) -> None:
    level: list[Any] = [values]
    for _ in range(max_depth):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node.keys()
                below += node.values()
            elif isinstance(node, list):
                below += node
            elif isinstance(node, str) and not node.isascii():
                _check_surrogates(node)
        if not below:
            return
        level = below
    if any(isinstance(node, dict | list) for node in level):
        raise _too_deep(max_depth)
    for node in level:
        if isinstance(node, str):
            _check_surrogates(node)


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _invalid(
            f"a string of the body holds the lone surrogate U+{ord(text[error.start]):04X}; send valid Unicode"
        ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!a} occurs twice in one object")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:80]} is too large")
    return value


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_json")


def _too_deep(max_depth: int) -> RequestError:
    return _invalid(f"the body nests lists and objects deeper than {max_depth} levels; flatten it")
