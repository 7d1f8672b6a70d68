"""Every error of the project.

One base class, few children. A message says the thing, its value, the limit and the remedy. Errors cross process
boundaries (Ray actors, Ray Train workers), so each survives pickling with its extra fields.
"""

from __future__ import annotations

from typing import Any


class DeepSeekRayError(Exception):
    """Base of every error raised on purpose by deepseek_ray."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(kind: type[DeepSeekRayError], state: dict[str, Any]) -> DeepSeekRayError:
    error = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class ConfigError(DeepSeekRayError):
    """A run file, a `config.json`, a flag or an argument holds something that cannot be honoured."""


class CheckpointError(DeepSeekRayError):
    """A checkpoint directory is missing something, holds something forbidden, or disagrees with its config."""


class DataError(DeepSeekRayError):
    """A corpus, a tokenizer or packed token blocks cannot be read or do not fit together."""


class TrainingError(DeepSeekRayError):
    """A training run cannot start, or cannot go on (non-finite loss, no room for a checkpoint)."""


class SweepError(DeepSeekRayError):
    """A sweep cannot start, cannot go on, or has nothing to show (no trial fits, every trial failed)."""


class RequestError(DeepSeekRayError):
    """A client's request is wrong. `param` names the field, `code` is a stable machine-readable word."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFoundError(RequestError):
    """A request names a model that is not served here."""


class OverloadedError(DeepSeekRayError):
    """Admission is full. The request was not started; try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceededError(DeepSeekRayError):
    """A request ran past its deadline and was stopped by the engine."""


class GenerationError(DeepSeekRayError):
    """One request cannot go on (non-finite logits, no token left to choose); others are not affected."""


class ExpertsCrashedError(DeepSeekRayError):
    """Computing one token has crashed the process that computes its experts, twice. `row` is its place in the batch."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class UnavailableError(DeepSeekRayError):
    """Nothing can serve this request now (deployment starting, draining or gone)."""


class DeploymentError(DeepSeekRayError):
    """A deployment cannot be started, joined or stopped as asked (name taken, port in use, cluster too small)."""


class LinkError(DeepSeekRayError):
    """A frame cannot be sent or understood: bad magic, too large, wrong secret."""


class LinkClosedError(LinkError):
    """The peer is gone (end of file on the socket) or the link was closed here."""


class LinkLostError(LinkClosedError):
    """No packet reaches the peer any more: its host is cut off or has vanished. Its process may be well."""
