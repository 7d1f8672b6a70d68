"""`deepseek-ray quickstart`: the whole road on this machine, from real text to tokens over HTTP."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from deepseek_ray.training.result import PretrainResult

_PROMPTS = ("import os\nimport ", "def __init__(self, ", "    for i in range(")
_MAX_TOKENS = 48
_STEPS = 5


def quickstart(
    config: Annotated[Path, typer.Option(help="Run file.", exists=True, dir_okay=False)] = Path(
        "configs/quickstart.yaml"
    ),
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, KEY=VALUE; may be repeated.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on.", show_default="8000 or a free one")] = None,
) -> None:
    """Train a small DeepSeek-V3-style model on Python's standard library, serve it, and ask it over HTTP.

    A few minutes on two cores. What it makes stays under runs/quickstart.

    [bold]Examples[/bold]

      deepseek-ray quickstart\n
      deepseek-ray quickstart --set training.steps=400
    """
    started = time.monotonic()
    from deepseek_ray.actors.cluster import join_or_start
    from deepseek_ray.config.load import load_pretrain_config
    from deepseek_ray.training.trainer import pretrain

    run = load_pretrain_config(config, [f"storage_path={Path.cwd() / 'runs'}", *(set_ or [])])
    _step(1, "a local Ray cluster")
    cluster = join_or_start()
    print(f"  running at {cluster.address}")
    try:
        _step(2, "training on real text: the source of this Python's standard library")
        result = pretrain(run)
        _step(3, "what was learned")
        beaten = _report(run, result)
        model_dir = _link_model(result)
        _step(4, "serving it: router, attention worker, two expert shards, OpenAI API")
        _serve_and_ask(model_dir, port)
    finally:
        with _without_farewells():
            cluster.leave()
    _step(5, "done")
    minutes = (time.monotonic() - started) / 60
    print(f"  {minutes:.1f} minutes without the installation\n\ntry next:")
    for command in _next_commands(model_dir):
        print(f"  {command}")
    if not beaten:
        sys.exit("quickstart: the model did not beat the bigram baseline; see the loss curve above")


def _step(number: int, title: str) -> None:
    print(f"\n[{number}/{_STEPS}] {title}", flush=True)


def _report(run: Any, result: PretrainResult) -> bool:
    """Loss curve, baseline and expert load, as text and as PNG files. True if the baseline is beaten."""
    from deepseek_ray.cli.terminal_plots import heat_map, line_chart
    from deepseek_ray.data.prepare import prepare_data
    from deepseek_ray.training import plots
    from deepseek_ray.training.baseline import bigram_baseline
    from deepseek_ray.training.metrics import read_metrics

    run_dir = Path(result.run_dir)
    metrics = read_metrics(run_dir)
    baseline = bigram_baseline(run, prepare_data(run.data))
    counts = next(line["expert_counts"] for line in reversed(metrics) if plots.is_validated(line))
    layers = run.model.moe_layers
    plots.plot_loss_curve(
        metrics, run_dir / plots.LOSS_CURVE_FILE, {"bigram baseline (validation)": baseline.nats_per_token}
    )
    plots.plot_expert_heat_map(counts, layers, run_dir / plots.EXPERT_HEAT_MAP_FILE)
    print(f"  training loss over {result.tokens:,} tokens (nats per token)")
    print(_indented(line_chart([line["loss"] for line in metrics])))
    print("\n  tokens per expert on the validation split")
    print(_indented(heat_map(plots.relative_load(counts), layers)))
    ratio = result.validation_bits_per_byte / baseline.bits_per_byte
    print(f"\n  validation: {result.validation_bits_per_byte:.3f} bits per byte")
    print(f"  Kneser-Ney bigram model on the same tokens: {baseline.bits_per_byte:.3f}; the model needs {ratio:.2f}x")
    print(f"  pictures: {_shown(run_dir / plots.LOSS_CURVE_FILE)}, {_shown(run_dir / plots.EXPERT_HEAT_MAP_FILE)}")
    return ratio < 1


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _shown(path: Path) -> Path:
    """Relative to the working directory where that is shorter to read."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _link_model(result: PretrainResult) -> Path:
    """`runs/<name>/model` always points at the last checkpoint."""
    link = Path(result.run_dir) / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(result.checkpoint).relative_to(result.run_dir))
    print(f"  checkpoint in the Hugging Face layout: {_shown(link)}")
    return link


def _serve_and_ask(model_dir: Path, port: int | None) -> None:
    from deepseek_ray.config.engine import DeploymentConfig
    from deepseek_ray.serving.claim import ServerClaim
    from deepseek_ray.serving.server import ModelServer

    config = DeploymentConfig(name="quickstart", model_dir=str(model_dir), dtype="float32")
    server = ModelServer(config, ServerClaim(config.name, "127.0.0.1", port or _port()))
    server.connect()
    try:
        server.start(lambda text: print(f"  {text}", flush=True))
        print(f"  ready {server.url}")
        for prompt in _PROMPTS:
            _ask(server.url, model_dir.name, prompt)
    finally:
        with _without_farewells():
            server.stop(drain_seconds=5)


def _without_farewells() -> contextlib.AbstractContextManager[Any]:
    """While Serve is shut down Ray reports on stdout that Serve's controller is gone, as if that were news."""
    return contextlib.redirect_stdout(io.StringIO())


def _ask(url: str, model: str, prompt: str) -> None:
    """Stream one completion to the terminal; sampled, since greedy text of so small a model repeats itself."""
    import httpx

    body = {"model": model, "prompt": prompt, "max_tokens": _MAX_TOKENS, "temperature": 0.6, "seed": 1}
    print(f"\n  POST {url}/completions {json.dumps(body)}")
    print(_indented(prompt), end="", flush=True)
    with httpx.stream("POST", f"{url}/completions", json={**body, "stream": True}, timeout=60) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                print(text.replace("\n", "\n  "), end="", flush=True)
    print()


def _port() -> int:
    """8000 if it is free, else any free one."""
    for wanted in (8000, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("binding port 0 cannot fail")


def _next_commands(model_dir: Path) -> list[str]:
    shown, programs = _shown(model_dir), _shown(Path(sys.executable).parent)
    return [
        f"{programs}/deepseek-ray serve {shown}     # the same server, until Ctrl-C",
        f"{programs}/deepseek-ray complete {shown} 'def main('     # one completion here, without a server",
        f"{programs}/python jobs/pretrain.py --config configs/tiny.yaml     # your own run: edit it, or --set k=v",
    ]
