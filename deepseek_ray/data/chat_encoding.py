"""A conversation as token ids, and which of them the assistant wrote.

The text between what the template renders before an assistant's message (with its generation prompt) and after it is
what the assistant wrote. Text is tokenised piece by piece, cut at these places: the ids of a prompt are then those that
serving computes for it, and no token lies half inside an answer.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deepseek_ray.data.conversations import Conversation
from deepseek_ray.data.packing import PackedDocuments
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import DataError, RequestError

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For a checkpoint without a template: the plain one of serving (`engine/chat_template.py`), with an end of sequence
after the assistant's messages, without which a model would not learn to stop."""


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of a conversation."""

    tokens: np.ndarray
    """[tokens] uint32."""
    learned: np.ndarray
    """[tokens] bool: the assistant's, its end of sequence included."""
    num_bytes: int
    """UTF-8 bytes of the assistant's text."""

    def cut_to(self, length: int, tokenizer: Tokenizer) -> EncodedConversation:
        """The first `length` tokens; `num_bytes` is then that of the learned tokens' text."""
        tokens, learned = self.tokens[:length], self.learned[:length]
        text = tokenizer.decode(tokens[learned].tolist())
        return EncodedConversation(tokens, learned, len(text.encode()))


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer) -> EncodedConversation:
    """DataError when the template refuses the conversation or does not show where the assistant's part is."""
    try:
        pieces = list(_pieces(conversation, tokenizer))
    except RequestError as error:
        raise DataError(f"{conversation.source}: {error.message}") from None
    ids, learned, num_bytes = [], [], 0
    for text, is_assistants in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False)
        end = _end_of_answer(piece, conversation, tokenizer) if is_assistants else 0
        ids += piece
        learned += [True] * end + [False] * (len(piece) - end)
        num_bytes += len(tokenizer.decode(piece[:end]).encode())
    return EncodedConversation(np.array(ids, dtype=np.uint32), np.array(learned, dtype=bool), num_bytes)


def pack_whole(conversations: list[EncodedConversation], length: int, padding_id: int) -> PackedDocuments:
    """Conversations, none longer than `length`, laid into rows of exactly `length` tokens without cutting any.

    Longest first, each into the fullest row that has room (best fit decreasing, Johnson 1974); the same input gives
    the same rows. What is left of a row is a document of padding that nothing is learned from.
    """
    rows: list[list[EncodedConversation]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for conversation in sorted(conversations, key=lambda one: -len(one.tokens)):
        size = len(conversation.tokens)
        place = bisect_left(room, (size, 0))
        if place == len(room):
            left, row = length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(conversation)
        if left > size:
            insort(room, (left - size, row))
    documents = [document for row in rows for document in _padded(row, length, padding_id)]
    empty = np.empty(0, dtype=np.uint32)
    return PackedDocuments(
        tokens=np.concatenate([document.tokens for document in documents]) if documents else empty,
        lengths=np.array([len(document.tokens) for document in documents], dtype=np.int64),
        num_bytes=sum(document.num_bytes for document in documents),
        loss_mask=np.concatenate([document.learned for document in documents]) if documents else empty.astype(bool),
    )


def padding(size: int, padding_id: int) -> EncodedConversation:
    """A document of `size` tokens that nothing is learned from."""
    return EncodedConversation(np.full(size, padding_id, dtype=np.uint32), np.zeros(size, dtype=bool), 0)


def _padded(row: list[EncodedConversation], length: int, padding_id: int) -> list[EncodedConversation]:
    left = length - sum(len(conversation.tokens) for conversation in row)
    return [*row, padding(left, padding_id)] if left else row


def _pieces(conversation: Conversation, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """(text, is the assistant's) in order; together they are the rendered conversation."""
    messages = conversation.messages
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True) if index else None
        after = tokenizer.apply_chat_template(messages[: index + 1], add_generation_prompt=False)
        if before is None or not after.startswith(before) or not whole.startswith(after):
            raise DataError(
                f"{conversation.source}: the chat template does not show what the assistant wrote in message {index}: "
                f"{'it is the first message' if before is None else 'it renders the messages before it differently'}. "
                "Correct the conversation, or give another template in data.chat_template"
            )
        yield whole[done : len(before)], False
        yield whole[len(before) : len(after)], True
        done = len(after)
    if done < len(whole):
        yield whole[done:], False


def _end_of_answer(piece: list[int], conversation: Conversation, tokenizer: Tokenizer) -> int:
    """Tokens of an assistant's piece that the model writes: up to the first end of sequence, which it is to learn."""
    for place, token_id in enumerate(piece):
        if token_id in tokenizer.eos_token_ids:
            return place + 1
    raise DataError(
        f"{conversation.source}: the chat template writes no end of sequence after an assistant's message, so the "
        "model would never learn to stop; give a template that writes {{ eos_token }} there in data.chat_template"
    )
