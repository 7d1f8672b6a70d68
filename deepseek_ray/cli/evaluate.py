"""`deepseek-ray evaluate`: how well a checkpoint predicts texts or answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_ray.cli.from_config import only_given, with_options
from deepseek_ray.config.evaluation import EvaluationConfig


@with_options(EvaluationConfig)
def evaluate(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Checkpoint in the Hugging Face layout.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    **given: Any,
) -> None:
    """Measure a checkpoint: nats per token, perplexity, bits per byte, and the load of its experts.

    One process on one machine, on its GPU if it has one; no cluster is needed.

    [bold]Examples[/bold]

      deepseek-ray evaluate runs/quickstart/model\n
      deepseek-ray evaluate runs/quickstart/model --data texts.jsonl --text-field body --json\n
      deepseek-ray evaluate runs/finetune/model --chat --data gsm8k_test.jsonl --prompt-field question \
--completion-field answer
    """
    config = EvaluationConfig.parse(only_given(given), "arguments")
    from deepseek_ray.training.evaluate_model import evaluate_model  # torch, after the options are known to be good

    measured = evaluate_model(model_dir, config)
    print(json.dumps(measured.to_dict()) if as_json else measured.describe(), flush=True)
