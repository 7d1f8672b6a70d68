"""`deepseek-ray batch`: generation for files of prompts."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from deepseek_ray.cli.from_config import only_given, with_options
from deepseek_ray.config.batch import BatchConfig


@with_options(BatchConfig)
def batch(
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, progress on stderr.")] = False,
    **given: Any,
) -> None:
    """Generate for files of prompts, with a pool of models side by side.

    Rows are lines of JSONL, rows of Parquet, or lines of text. Output files appear whole; the same command again
    generates only what is missing. A bad row says so in its own output.

    [bold]Examples[/bold]

      deepseek-ray batch --model-dir runs/quickstart/model --input prompts.txt --output answers --chat\n
      deepseek-ray batch --model-dir /models/mine --input a.jsonl b.jsonl --output /data/answers --workers 4\n
      deepseek-ray batch --model-dir runs/quickstart/model --input prompts.txt --output answers --json | jq .bad_rows
    """
    config = BatchConfig.parse(only_given(given), "arguments")
    from deepseek_ray.batch.pool import generate_files  # torch, after the options are known to be good

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # Ray reports dead workers on stdout
        result = generate_files(config, lambda line: print(line, flush=True))
    print(json.dumps(asdict(result)) if as_json else result.describe(), flush=True)
