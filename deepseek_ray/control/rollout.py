"""What a new configuration means for an engine that runs: it is kept, or replaced by another one beside it.

An engine is a router with its attention workers and expert shards. Which one a configuration means can be read off the
name: `<name>.<digest of everything the engine depends on>`. So an application that is deployed again finds its engine
by name, a changed one starts a second engine under a name of its own, and each runs as long as somebody holds a lease.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from deepseek_ray.config.engine import DeploymentConfig

_API_FIELDS = ("served_model_name", "request_timeout_seconds")
"""What only the HTTP side depends on: the deadline travels with each request."""
_DIGEST_DIGITS = 8
_MAX_NAME_LENGTH = 63  # of DeploymentConfig.name


def engine_config(config: DeploymentConfig) -> DeploymentConfig:
    """`config` as the engine sees it: API fields at their defaults, named after its content."""
    defaults = {name: DeploymentConfig.model_fields[name].default for name in _API_FIELDS}
    bare = config.model_copy(update=defaults)
    digest = hashlib.sha256(bare.model_dump_json().encode()).hexdigest()[:_DIGEST_DIGITS]
    stem = config.name[: _MAX_NAME_LENGTH - 1 - _DIGEST_DIGITS]
    return bare.model_copy(update={"name": f"{stem}.{digest}"})


def engine_change(old: DeploymentConfig, new: DeploymentConfig) -> Literal["keep", "replace"]:
    """Whether the engine of `old` also serves `new`."""
    return "keep" if engine_config(old) == engine_config(new) else "replace"
