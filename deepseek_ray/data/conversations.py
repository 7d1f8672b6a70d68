"""Conversations from JSONL files, checked line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepseek_ray.config.finetune import ConversationsConfig
from deepseek_ray.data.corpus import CorpusFile
from deepseek_ray.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in order, at least one of them the assistant's."""

    messages: tuple[Message, ...]
    source: str
    """`file, line n`, for error messages."""
    num_bytes: int
    """Of its line, for progress."""

    @property
    def key(self) -> str:
        """What decides the side of the split: the text, so that the same conversation never lies on both."""
        return json.dumps(self.messages, sort_keys=True)


def read_conversations(file: CorpusFile, config: ConversationsConfig) -> Iterator[Conversation]:
    """Every conversation of a file, empty lines left out. DataError names file and line of a broken one."""
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                source = f"{file.path}, line {number}"
                messages = _messages(_json_object(line, source), config, source)
                yield Conversation(tuple(_with_system_prompt(messages, config)), source, len(line))


def _json_object(line: bytes, source: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"))
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise DataError(f"{source}: holds a lone surrogate, which no text can; correct the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON ({error}); correct or remove the line") from None
    if not isinstance(values, dict):
        raise DataError(f"{source}: a JSON {type(values).__name__}, not an object; write one conversation a line")
    return values


def _messages(values: dict[str, Any], config: ConversationsConfig, source: str) -> list[Message]:
    if config.messages_field in values:
        return _checked_messages(values[config.messages_field], config.messages_field, source)
    pair = (config.prompt_field, config.completion_field)
    missing = [name for name in pair if name not in values]
    if missing:
        known = ", ".join(map(str, values)) or "none"
        raise DataError(
            f"{source}: neither field {config.messages_field!r} nor {missing[0]!r} (fields: {known}); set "
            "data.messages_field, or data.prompt_field and data.completion_field, to fields of the file"
        )
    for name in pair:
        if not isinstance(values[name], str) or not values[name]:
            raise DataError(f"{source}: field {name!r} holds {values[name]!r:.40}, not a text; correct the line")
    return [{"role": "user", "content": values[pair[0]]}, {"role": "assistant", "content": values[pair[1]]}]


def _checked_messages(messages: Any, field: str, source: str) -> list[Message]:
    if not isinstance(messages, list):
        raise DataError(f"{source}: field {field!r} holds {type(messages).__name__}, not a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(
                f'{source}: message {index} is {message!r:.60}; a message is {{"role": text, "content": text}}'
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{source}: no message of the role 'assistant', so there is nothing to learn; remove the line")
    return messages


def _with_system_prompt(messages: list[Message], config: ConversationsConfig) -> list[Message]:
    if config.system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": config.system_prompt}, *messages]
