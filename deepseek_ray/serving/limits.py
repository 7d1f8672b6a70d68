"""How much one client may ask for at once. Everything a client can make long or deep has a bound here."""

from __future__ import annotations

from pydantic import Field

from deepseek_ray.config.base import FrozenConfig


class ApiLimits(FrozenConfig):
    """Bounds of the HTTP API; beyond one the answer is an error that names it."""

    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Longest request body; a longer one is refused while it is read (413)."""
    max_json_depth: int = Field(default=64, ge=4)
    """Deepest nesting of lists and objects in a body; a JSON schema takes two levels for each of its own."""
    max_messages: int = Field(default=1024, ge=1)
    """Messages of one conversation."""
    max_prompts: int = Field(default=64, ge=1)
    """Prompts of one completions request."""
    max_choices: int = Field(default=128, ge=1)
    """Prompts times `n` of one request: how many sequences it may start."""
    max_concurrent_requests: int = Field(default=512, ge=1)
    """Requests that may generate at once here; beyond it the answer is 429 with Retry-After."""
    request_timeout_seconds: float = Field(default=600.0, gt=0)
    """Deadline of every request. No header or field of a client changes it."""
    body_timeout_seconds: float = Field(default=30.0, gt=0)
    """How long a client may take to send its body."""
    ready_timeout_seconds: float = Field(default=2.0, gt=0)
    """How long `/ready` waits for the backend before it says no."""
