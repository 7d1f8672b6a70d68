"""What drafting tokens brings: how many drafts are right, and how much faster decoding gets.

    python -m benchmarks.speculation [--rounds 5]

The quickstart model, trained with a multi-token-prediction layer (once, into runs/mtp), continues source text that it
was not trained on, in turns without drafts, with that layer's and with n-grams. What a draft costs a large model is
measured with bench-mini, whose weights are random and whose drafts are made from what it is known to say: all right,
or all wrong. What lies between is a straight line.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench_model import bench_mini_dir
from benchmarks.quantization import held_out
from benchmarks.results_file import write_results
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.offline import LocalBackend
from deepseek_ray.engine.scheduler import ScheduledStep
from deepseek_ray.engine.speculation import Speculator, can_draft
from deepseek_ray.messages import GenerateRequest, SamplingParams

SEQUENCES = (1, 8)
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "mtp": {"method": "mtp"},
    "ngram": {"method": "ngram", "num_tokens": 3},
}
_PROMPT_TOKENS, _OUTPUT_TOKENS = 192, 128
_MINI_PROMPT, _MINI_OUTPUT = 32, 32


class Known(Speculator):
    """Drafts one token from outputs that are known: right, or wrong."""

    def __init__(self, outputs: dict[str, list[int]], right: bool) -> None:
        self._outputs, self._right = outputs, right

    def draft(self, step: ScheduledStep) -> None:
        for sequence in (item.sequence for item in step.items):
            if can_draft(sequence):
                done = sequence.num_output_tokens
                coming = self._outputs[sequence.request.request_id][done : done + 1]
                sequence.draft_token_ids = coming if self._right else [(token + 1) % 1000 for token in coming]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trained = measure_trained(_trained_model(), options.rounds)
    write_results("speculation", {"rounds": options.rounds, "trained": trained, "cost": measure_cost(options.rounds)})


def measure_trained(model_dir: Path, rounds: int) -> list[dict[str, Any]]:
    """One row per method and number of sequences: tokens/s (median of rounds), share of drafts that were right."""
    prompts = held_out(model_dir, 100 * 256)[:, :_PROMPT_TOKENS].tolist()
    engines = {
        method: _engine(DeploymentConfig.parse({"model_dir": str(model_dir), "engine": {"speculative": how}}, "engine"))
        for method, how in METHODS.items()
    }
    rows = []
    for count in SEQUENCES:
        rates: dict[str, list[float]] = {method: [] for method in METHODS}
        drafts, accepted = dict.fromkeys(METHODS, 0), dict.fromkeys(METHODS, 0)
        for turn in range(rounds + 1):  # the first warms up
            outputs = {}
            for method, engine in engines.items():
                chosen = prompts[turn * count : (turn + 1) * count]
                before = engine.stats()
                rate, outputs[method] = decode(engine, _requests(chosen, _OUTPUT_TOKENS))
                after = engine.stats()
                if turn:
                    rates[method].append(rate)
                    drafts[method] += after.num_draft_tokens - before.num_draft_tokens
                    accepted[method] += after.num_accepted_tokens - before.num_accepted_tokens
            assert outputs["mtp"] == outputs["none"] == outputs["ngram"], "drafting has changed an output"
        for method in METHODS:
            rate = statistics.median(rates[method])
            right = accepted[method] / drafts[method] if drafts[method] else None
            share = drafts[method] / (rounds * count * (_OUTPUT_TOKENS - 1))
            row = {"sequences": count, "method": method, "tokens_per_second": rate, "right": right}
            rows.append({**row, "drafts_per_token": share, "against_none": rate / statistics.median(rates["none"])})
            print(rows[-1], flush=True)
    return rows


def measure_cost(rounds: int) -> list[dict[str, Any]]:
    """One row per number of sequences: tokens/s of bench-mini without drafts, all right, and all wrong."""
    engine = _engine(DeploymentConfig(model_dir=str(bench_mini_dir())))
    rows = []
    for count in SEQUENCES:
        prompts = [[(37 * n + 11 * place) % 30000 for place in range(_MINI_PROMPT)] for n in range(count)]
        _, known = decode(engine, _requests(prompts, _MINI_OUTPUT))
        rates: dict[str, list[float]] = {"none": [], "right": [], "wrong": []}
        for _ in range(rounds):
            for kind, values in rates.items():
                with _drafting(engine, None if kind == "none" else Known(known, kind == "right")):
                    rate, outputs = decode(engine, _requests(prompts, _MINI_OUTPUT))
                assert outputs == known, "drafting has changed an output"
                values.append(rate)
        medians = {kind: statistics.median(values) for kind, values in rates.items()}
        rows.append({"sequences": count, "tokens_per_second": medians})
        print(rows[-1], flush=True)
    return rows


def decode(
    engine: Engine, requests: list[GenerateRequest], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, dict[str, list[int]]]:
    """Tokens per second from the moment when every request has its first one, and all outputs."""
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    began, tokens = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            outputs[event.request_id] += event.token_ids
        if not began and all(outputs.values()):
            began, tokens = clock(), sum(map(len, outputs.values()))
    return (sum(map(len, outputs.values())) - tokens) / (clock() - began), outputs


def _trained_model() -> Path:
    """`runs/mtp/` of this checkout; trained now, in a few minutes, if it is not there."""
    runs = Path("runs")
    if not list(runs.glob("mtp/checkpoints/*")):
        command = [sys.executable, "jobs/pretrain.py", "--config", "configs/quickstart.yaml"]
        settings = {"name": "mtp", "model.num_nextn_predict_layers": 1, "storage_path": runs.absolute()}
        subprocess.run([*command, *(f"--set={key}={value}" for key, value in settings.items())], check=True)
    return max(runs.glob("mtp/checkpoints/*"))


def _requests(prompts: list[list[int]], output_tokens: int) -> list[GenerateRequest]:
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    return [
        GenerateRequest(request_id=f"{number}", prompt_token_ids=prompt, params=params)
        for number, prompt in enumerate(prompts)
    ]


def _engine(config: DeploymentConfig) -> Engine:
    engine = LocalBackend(config)._engine
    assert engine is not None
    return engine


@contextmanager
def _drafting(engine: Engine, speculator: Speculator | None) -> Iterator[None]:
    engine._speculator = speculator
    yield
    engine._speculator = None


if __name__ == "__main__":
    main()
