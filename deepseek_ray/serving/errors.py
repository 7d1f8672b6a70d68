"""Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from deepseek_ray.errors import (
    DeadlineExceededError,
    GenerationError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
)

_MAX_MESSAGE_LENGTH = 1000
UNAVAILABLE_RETRY_SECONDS = 2.0


class HttpError(RequestError):
    """A request that is wrong as HTTP (route, method, size, media type), with the status that says so."""

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = headers or {}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


@dataclass(frozen=True)
class ErrorReply:
    """What a client gets to see of an error."""

    status: int
    body: ErrorBody
    headers: dict[str, str] = field(default_factory=dict)


def describe_error(error: BaseException, request_id: str) -> ErrorReply:
    """Map an exception to a reply. What is not an error of ours becomes a 500 that tells nothing but the request id."""
    match error:
        case HttpError():
            return _reply(error.status, error.message, "invalid_request_error", None, error.code, error.headers)
        case ModelNotFoundError():
            return _reply(404, error.message, "invalid_request_error", error.param, error.code or "model_not_found")
        case RequestError():
            return _reply(400, error.message, "invalid_request_error", error.param, error.code)
        case OverloadedError():
            headers = _retry_after(error.retry_after_seconds)
            return _reply(429, error.message, "rate_limit_error", None, "overloaded", headers)
        case UnavailableError():
            headers = _retry_after(UNAVAILABLE_RETRY_SECONDS)
            return _reply(503, error.message, "server_error", None, "unavailable", headers)
        case DeadlineExceededError():
            return _reply(504, error.message, "timeout_error", None, "deadline_exceeded")
        case GenerationError():
            return _reply(500, error.message, "server_error", None, "generation_failed")
        case _:
            message = f"the server failed to handle this request; its log has the reason under request id {request_id}"
            return _reply(500, message, "server_error", None, "internal_error")


def _reply(
    status: int, message: str, kind: str, param: str | None, code: str | None, headers: dict[str, str] | None = None
) -> ErrorReply:
    detail = ErrorDetail(_printable(message), kind, None if param is None else _printable(param), code)
    return ErrorReply(status, ErrorBody(detail), headers or {})


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}  # whole seconds, RFC 9110 section 10.2.3


def _printable(text: str) -> str:
    """Messages quote what the client sent: bounded, and lone surrogates escaped, which no UTF-8 reply can hold."""
    if len(text) > _MAX_MESSAGE_LENGTH:
        text = text[:_MAX_MESSAGE_LENGTH] + " ..."
    return text.encode("utf-8", "backslashreplace").decode()
