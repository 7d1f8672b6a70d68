"""`deepseek-ray chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deepseek_ray.cli.sampling import (
    DEFAULT_DTYPE,
    Dtype,
    MaxTokens,
    Seed,
    Stop,
    Target,
    Temperature,
    Threads,
    TopP,
    read_params,
)
from deepseek_ray.cli.source import Message, TextSource, open_source
from deepseek_ray.errors import DeepSeekRayError
from deepseek_ray.messages import SamplingParams

_COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves"


def chat(
    target: Target,
    message: Annotated[
        str | None, typer.Argument(metavar="[MESSAGE]", help="One message to answer.", show_default="a conversation")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions before the conversation.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = DEFAULT_DTYPE,
    threads: Threads = None,
) -> None:
    """Talk to a model. Without MESSAGE every line that you type is a turn.

    [bold]Examples[/bold]

      deepseek-ray chat http://127.0.0.1:8000\n
      deepseek-ray chat http://127.0.0.1:8000 "What is a mixture of experts?"\n
      deepseek-ray chat ./DeepSeek-V2-Lite-Chat --system "Answer in French."
    """
    params = read_params(max_tokens, temperature, top_p, seed, stop)
    source = open_source(target, dtype, threads)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    if message is not None:
        _answer(source, [*opening, {"role": "user", "content": message}], params)
    else:
        _converse(source, opening, params)


def _converse(source: TextSource, opening: list[Message], params: SamplingParams) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(_COMMANDS, file=sys.stderr)
    messages = list(opening)
    while (line := _read_line(is_terminal)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            turn: Message = {"role": "user", "content": line}
            try:
                answer = _answer(source, [*messages, turn], params)
            except DeepSeekRayError as error:
                if not is_terminal:
                    raise
                print(f"deepseek-ray: {error}", file=sys.stderr)
                continue
            messages += [turn, {"role": "assistant", "content": answer}]


def _read_line(is_terminal: bool) -> str | None:
    """The next line; None at the end."""
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return None


def _answer(source: TextSource, messages: list[Message], params: SamplingParams) -> str:
    """Print the answer while it comes, and return it."""
    pieces = []
    for text in source.chat(messages, params):
        pieces.append(text)
        print(text, end="", flush=True)
    print()
    return "".join(pieces)
