"""API keys: who may use the API. Only digests are kept, so that no key can be read from memory dumps, logs or Serve."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deepseek_ray.errors import ConfigError
from deepseek_ray.serving.errors import HttpError

ENVIRONMENT_VARIABLE = "DEEPSEEK_RAY_API_KEY"
OPEN_PATHS = frozenset({"/health", "/ready"})
"""Asked by load balancers, which have no key."""


@dataclass(frozen=True)
class ApiKeys:
    """Digests of the keys that clients may use; without any the API is open."""

    digests: tuple[bytes, ...] = ()
    """SHA-256 of each key."""

    @classmethod
    def of(
        cls, keys: Iterable[str], file: str | Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Self:
        """From given keys, a file of one key a line (empty lines and lines with # are comments), and the environment.

        ConfigError for a file that cannot be read or holds no key, and for a key that no client could send. Messages
        never quote a key.
        """
        wanted = list(keys)
        if file is not None:
            wanted += _read_keys(Path(file))
        if environment and ENVIRONMENT_VARIABLE in environment:
            wanted.append(environment[ENVIRONMENT_VARIABLE])
        return cls(tuple(sorted({_digest(_checked(key)) for key in wanted})))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def check(self, path: str, authorization: str) -> None:
        """HttpError 401 when keys are set, `path` needs one and the Authorization header brings none of them."""
        if not self.digests or path in OPEN_PATHS:
            return
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("this server asks for an API key; send it as Authorization: Bearer KEY")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every key is compared, whole, whatever the outcome of the others: the time taken tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        if not any(matches):
            raise _unauthorized("the API key is not one of this server's; check the key that the client sends")


def _read_keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"the API key file {path} cannot be read ({reason}); give a text file of one key a line"
        ) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"the API key file {path} holds no key; write one a line, or leave the option out")
    return keys


def _checked(key: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("an API key must be printable ASCII without spaces, and not empty; choose another one")
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _unauthorized(message: str) -> HttpError:
    return HttpError(401, message, "invalid_api_key", {"www-authenticate": "Bearer"})
