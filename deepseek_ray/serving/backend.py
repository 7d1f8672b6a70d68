"""What the API needs of whatever generates: a small protocol, so that it is served and tested without Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from deepseek_ray.messages import GenerateRequest, TokenEvent


class Backend(Protocol):
    """`actors.request_session.DeploymentClient` in a deployment, a local engine in tests."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request, in order and without repetition; the last one has a finish reason.

        Closing the generator stops the work. Raises OverloadedError, UnavailableError, DeadlineExceededError,
        RequestError, GenerationError.
        """
        ...

    async def ready(self) -> bool:
        """True when a request sent now would be answered with tokens."""
        ...


class ServedModel(Protocol):
    """The model behind a backend."""

    @property
    def served_model_name(self) -> str: ...
    @property
    def model_dir(self) -> str: ...
    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of the logits: ids at or above it do not exist."""
        ...

    @property
    def created(self) -> int:
        """Unix seconds."""
        ...
