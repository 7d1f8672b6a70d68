"""Text to token ids and back, from a checkpoint's Hugging Face tokenizer files. Imports no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from deepseek_ray.engine.chat_template import PLAIN_TEMPLATE, ChatTemplate
from deepseek_ray.engine.detokenizer import Detokenizer
from deepseek_ray.errors import CheckpointError, RequestError

__all__ = ["Detokenizer", "Tokenizer"]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A byte-level BPE tokenizer (any `tokenizers` model works; byte-level ones stream exactly).

    Give every user of a process the same instance: it is immutable, and `encode` releases the GIL.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int],
        chat_template: str | None,
        source: str,
    ) -> None:
        backend.no_truncation()  # some files carry a maximum length; a silent cut would change the prompt
        backend.no_padding()
        self._backend = backend
        self._named_tokens = dict(named_tokens)
        self._chat_template = ChatTemplate(PLAIN_TEMPLATE if chat_template is None else chat_template, source)
        self.has_chat_template = chat_template is not None
        """False when the model brings no template and the plain default is used."""
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Number of ids the tokenizer knows; a model's own `vocab_size` may be padded above it."""
        self.bos_token_id = self._named_id("bos_token")
        self.pad_token_id = self._named_id("pad_token")
        self.eos_token_id = self._named_id("eos_token")
        own_eos = frozenset() if self.eos_token_id is None else {self.eos_token_id}
        self.eos_token_ids = frozenset(eos_token_ids) | own_eos
        """Ids that end an output: generation_config.json's (else config.json's) and the tokenizer's own."""
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._bytes_of: dict[int, bytes] = {}

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer files beside a checkpoint. CheckpointError names the file that is missing or broken."""
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{directory}: no tokenizer.json; copy the tokenizer files of the model (tokenizer.json, "
                "tokenizer_config.json) beside its weights"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise CheckpointError(f"{file}: not a tokenizer file ({error}); copy it again from the model") from None
        settings = {
            **_read_json(directory / "special_tokens_map.json"),
            **_read_json(directory / "tokenizer_config.json"),
        }
        named = {name: text for name in _NAMED_TOKENS if (text := _token_text(settings.get(name))) is not None}
        return cls(backend, named, _eos_ids(directory), _template_source(directory, settings), str(directory))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids, as in transformers.

        `add_special_tokens` applies the file's post-processor (the BOS token where the model wants one); text from
        `apply_chat_template` already holds its BOS, so encode it with False. RequestError for text that is not Unicode.
        """
        check_unicode(text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; incomplete UTF-8 becomes U+FFFD, ids the tokenizer does not know are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Prompt text of a conversation by the model's template, or by `PLAIN_TEMPLATE` when it has none.

        `variables` reach the template (`tools`, `thinking` ...). RequestError when the template refuses the messages.
        """
        values = {**self._named_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return self._chat_template.render(messages, **values)

    def token_text(self, token_id: int) -> str:
        """What one token looks like on its own, special tokens written out; U+FFFD stands for parts of a character."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to the output (exact for byte-level tokenizers); empty for an unknown id."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._compute_bytes(token_id)
        return known

    def to_json(self) -> str:
        """The tokenizer as the text of a `tokenizer.json`, for libraries that read one."""
        return self._backend.to_str()

    def _compute_bytes(self, token_id: int) -> bytes:
        if not self.is_byte_level:
            return self.token_text(token_id).encode()
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return token.encode()

    def _named_id(self, name: str) -> int | None:
        text = self._named_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def check_unicode(text: str) -> None:
    """RequestError when `text` holds a lone surrogate, which no UTF-8 text can (JSON escapes can smuggle one in)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "send valid Unicode"
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2, Radford et al. 2019, `bytes_to_unicode`):
    printable Latin-1 bytes as themselves, the others as the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy it again from the model") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds {type(values).__name__}, not an object; copy it again from the model")
    return values


def _token_text(value: Any) -> str | None:
    """A special token is written as its text, or as an object with the text under `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _eos_ids(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(token_id, int) for token_id in ids):
                raise CheckpointError(
                    f"{directory / name}: eos_token_id is {value!r}; it must be an id or a list of ids"
                )
            return ids
    return []


def _template_source(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` wins over `tokenizer_config.json`; of several named templates the one called default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}.get(
            "default"
        )
    return template if isinstance(template, str) else None
