"""`deepseek-ray chaos`: strike a deployment of its own in mid-generation, and check every token."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import ConfigError

_CASES = 28
_COLUMNS = (
    ("fault", "fault"),
    ("runs", "runs"),
    ("in_flight", "in flight"),
    ("failed", "failed"),
    ("wrong", "wrong"),
    ("stall_median", "stall"),
    ("stall_worst", "worst"),
    ("first_token_worst", "new"),
)


def chaos(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Checkpoint to serve.")],
    cell: Annotated[
        list[str] | None, typer.Option(help="Fault to try; repeat it for several.", show_default="all")
    ] = None,
    runs: Annotated[int, typer.Option(help="How often each fault strikes.", min=1)] = 1,
    streams: Annotated[int, typer.Option(help="Streams at once.", min=1)] = 28,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each stream.", min=8)] = 80,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "float32",
    seed: Annotated[int, typer.Option(help="Chooses targets and times.")] = 0,
    deadline: Annotated[float, typer.Option(help="Seconds that each request may take.", min=1)] = 300.0,
    history: Annotated[
        Path | None, typer.Option(help="Directory for what every client saw, one file a run.", show_default="none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Kill, stop and move processes under streams in mid-generation, and compare every token with an undisturbed run.

    Starts a deployment of its own on this machine (or on RAY_ADDRESS) for each fault. Exit code 1 when a request
    failed, or a token was lost, repeated or wrong.

    [bold]Examples[/bold]

      deepseek-ray chaos runs/quickstart/model --cell kill-shard --runs 3\n
      deepseek-ray chaos runs/quickstart/model --streams 200 --history /tmp/chaos --json
    """
    from deepseek_ray.chaos.cells import CELLS

    chosen = cell or list(CELLS)
    for name in chosen:
        if name not in CELLS:
            raise ConfigError(f"there is no fault {name!r}; there are {', '.join(CELLS)}")
    config = DeploymentConfig.parse(
        {
            "model_dir": str(model_dir.absolute()),
            "dtype": dtype,
            "request_timeout_seconds": deadline,
            "engine": {"max_num_seqs": max(64, streams)},
        },
        "chaos",
    )
    if history is not None:
        history.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout
        rows = _run(config, chosen, max_tokens, runs, streams, seed, deadline, history)
    print(json.dumps(rows)) if as_json else _print_table(rows)
    if any(row["failed"] or row["wrong"] or row["left_over"] for row in rows):
        raise typer.Exit(1)


def _run(
    config: DeploymentConfig,
    chosen: list[str],
    max_tokens: int,
    runs: int,
    streams: int,
    seed: int,
    deadline: float,
    history: Path | None,
) -> list[dict[str, Any]]:
    from deepseek_ray.actors.cluster import join_or_start
    from deepseek_ray.chaos.cases import make_cases, make_references
    from deepseek_ray.chaos.cells import CELLS
    from deepseek_ray.chaos.run import ChaosSettings, RunResult, run_cell, summarise

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def on_run(result: RunResult) -> None:
        kept = "every promise kept" if not result.violations else f"{len(result.violations)} promises broken"
        say(f"  seed {result.seed}: {result.calls} calls, {result.in_flight} struck in mid-generation, {kept}")
        for violation in result.violations[:5]:
            say(f"    {violation.kind} {violation.where}: {violation.detail}")

    say(f"computing what {_CASES} requests must give")
    model_dir = Path(config.model_dir)
    cases = make_cases(model_dir, _CASES, max_tokens)
    references = make_references(model_dir, config.dtype, cases)
    settings = ChaosSettings(streams=streams, runs=runs, seed=seed, deadline_seconds=deadline, history_dir=history)
    cluster = join_or_start()
    try:
        rows = []
        for name in chosen:
            say(f"{name}: {CELLS[name].title}")
            named = config.model_copy(update={"name": f"chaos-{name}"})
            results = run_cell(CELLS[name], named, cases, references, settings, on_run)
            rows.append({"cell": name, **summarise(CELLS[name].title, results)})
        return rows
    finally:
        cluster.leave()


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="stall and time to the first token of new requests in seconds", title_justify="left")
    for _, title in _COLUMNS:
        table.add_column(title, justify="left" if title == "fault" else "right", no_wrap=title != "fault")
    for row in rows:
        values = (row[name] for name, _ in _COLUMNS)
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)
