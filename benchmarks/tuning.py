"""Does a sweep find something? The best of 16 trials against the run file as it is, at equal training tokens, 3 seeds.

    python -m benchmarks.tuning [--seeds 3] [--trials 16] [--tokens 65536]

The default is configs/tiny.yaml with the learning rate, batch and warm-up that it ships with. Trials and default start
from the same weights and read the same data per seed; what is compared is the loss on the validation split, on which
nothing was trained. The best of many trials is chosen by that loss, so a part of its lead is luck; `retrained` trains
the chosen configuration again, from other weights and on another order of the data, and the default likewise.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from deepseek_ray.config.load import load_pretrain_config
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.ingest import connected
from deepseek_ray.training.trainer import pretrain
from deepseek_ray.tuning.search import search_hyperparameters
from deepseek_ray.tuning.settings import budgeted
from tune_spaces.pretraining import space

CONFIG = Path("configs/tiny.yaml")
OTHER_SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dr-") as directory, connected():
        rows = [_row(seed, arguments.trials, arguments.tokens, directory) for seed in range(arguments.seeds)]
    result = {
        "config": str(CONFIG),
        "space": "tune_spaces.pretraining:space(lr=(1e-4, 3e-2), batch_sizes=(4, 8, 16, 32))",
        "trials": arguments.trials,
        "tokens_per_trial": arguments.tokens,
        "rows": rows,
        "median_gain_nats": statistics.median(row["default"] - row["best"] for row in rows),
        "median_gain_nats_retrained": statistics.median(
            row["retrained_default"] - row["retrained_best"] for row in rows
        ),
    }
    write_results("tuning", result)


def _row(seed: int, trials: int, tokens: int, directory: str) -> dict[str, Any]:
    base = _seeded(budgeted(load_pretrain_config(CONFIG), tokens), seed)
    started = time.monotonic()
    result = search_hyperparameters(
        base,
        space(lr=(1e-4, 3e-2), batch_sizes=(4, 8, 16, 32)),
        num_trials=trials,
        budget_tokens=tokens,
        storage=directory,
        name=f"seed{seed}",
        seed=seed,
    )
    seconds = time.monotonic() - started
    best = result.best_trial
    row = {
        "seed": seed,
        "default": _train(base, f"default{seed}", directory),
        "best": best.metrics["validation_loss"],
        "retrained_default": _train(_seeded(base, seed + OTHER_SEED), f"again-default{seed}", directory),
        "retrained_best": _train(_seeded(result.best_config, seed + OTHER_SEED), f"again-best{seed}", directory),
        "best_sample": best.sample,
        "finished": sum(trial.status == "finished" for trial in result.trials),
        "stopped": sum(trial.status == "stopped" for trial in result.trials),
        "failed": sum(trial.status == "failed" for trial in result.trials),
        "tokens_of_all_trials": sum(trial.tokens for trial in result.trials),
        "sweep_seconds": seconds,
    }
    print({key: value for key, value in row.items() if key != "best_sample"}, flush=True)
    return row


def _seeded(config: PretrainConfig, seed: int) -> PretrainConfig:
    """Other initial weights and another order of the data."""
    values = config.model_dump(mode="json")
    values["training"]["seed"] = values["data"]["seed"] = seed
    return PretrainConfig.parse(values)


def _train(config: PretrainConfig, name: str, directory: str) -> float:
    values = config.model_dump(mode="json") | {"name": name, "storage_path": directory}
    values["training"] |= {"threads_per_worker": 1, "validation_interval": 0, "checkpoint_interval": 0}
    return pretrain(PretrainConfig.parse(values), io.StringIO()).validation_loss


if __name__ == "__main__":
    main()
