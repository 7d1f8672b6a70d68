"""`deepseek-ray complete`: continue a text."""

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
from deepseek_ray.cli.source import open_source


def complete(
    target: Target,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue.", show_default="standard input")
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    dtype: Dtype = DEFAULT_DTYPE,
    threads: Threads = None,
) -> None:
    """Continue a text, word by word as it comes.

    [bold]Examples[/bold]

      deepseek-ray complete http://127.0.0.1:8000 "def fibonacci(n):"\n
      deepseek-ray complete runs/quickstart/model "import os" --temperature 0 --echo\n
      cat story.txt | deepseek-ray complete http://127.0.0.1:8000 --max-tokens 300
    """
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a PROMPT, or send one on standard input", param_hint="PROMPT")
        prompt = read_text(sys.stdin.buffer.read())
    params = read_params(max_tokens, temperature, top_p, seed, stop)
    source = open_source(target, dtype, threads)
    if echo:
        print(prompt, end="", flush=True)
    for text in source.complete(prompt, params):
        print(text, end="", flush=True)
    print()


def read_text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"standard input is not UTF-8 (byte {error.start}); convert it", param_hint="PROMPT"
        ) from None
