"""A model's chat template: messages in, prompt text out, as `transformers` renders it, without importing transformers.

Templates come with checkpoints, so they run in jinja2's immutable sandbox and see only plain data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_ray.errors import CheckpointError, RequestError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For a model without a template: `role: content` and an empty line per message, then `assistant:` to be continued."""


class ChatTemplate:
    """A compiled template. `source` is what it came from, for error messages."""

    def __init__(self, template: str, source: str) -> None:
        self._source = source
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"{source}: the chat template does not compile (line {error.lineno}: {error.message}); "
                "correct it, or remove it to get the plain default"
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text. RequestError when there are no messages or the template refuses them.

        Keys of a message whose value is None are dropped, as transformers does: clients send `content: null`.
        """
        if not messages:
            raise RequestError("messages is empty; send at least one message", param="messages")
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(messages=plain, **{"tools": None, "documents": None, **variables})
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise RequestError(
                f"the chat template of {self._source} cannot render these messages: {error}", param="messages"
            ) from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training masks; for a prompt it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
