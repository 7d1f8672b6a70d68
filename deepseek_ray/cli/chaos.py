"""`deepseek-ray chaos`: strike a deployment of its own in mid-generation, and check every token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import ConfigError, DeploymentError

if TYPE_CHECKING:
    from deepseek_ray.chaos.cells import Cell
    from deepseek_ray.chaos.host_cluster import HostCluster
    from deepseek_ray.chaos.run import ChaosSettings, RunResult

_MOST_CASES = 28
"""Streams take them in turn."""
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
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the longest prompt.", min=1)] = 24,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each stream.", min=8)] = 80,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "float32",
    speculative: Annotated[
        str | None, typer.Option(help="Let the struck engines draft tokens: mtp or ngram.", show_default="none")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses targets and times.")] = 0,
    deadline: Annotated[float, typer.Option(help="Seconds that each request may take.", min=1)] = 300.0,
    history: Annotated[
        Path | None, typer.Option(help="Directory for what every client saw, one file a run.", show_default="none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Kill, stop and move processes under streams in mid-generation, and compare every token with an undisturbed run.

    Starts a deployment of its own on this machine (or on RAY_ADDRESS) for each fault; faults of hosts, on a cluster of
    network namespaces, as root. Exit code 1 when a request failed, or a token was lost, repeated or wrong.

    [bold]Examples[/bold]

      deepseek-ray chaos runs/quickstart/model --cell kill-shard --runs 3\n
      deepseek-ray chaos runs/quickstart/model --cell cut-off-shard-5\n
      deepseek-ray chaos runs/quickstart/model --streams 200 --history /tmp/chaos --json
    """
    _choose_token()
    from deepseek_ray.chaos.cells import CELLS
    from deepseek_ray.chaos.run import ChaosSettings

    chosen = cell or _possible_here()
    for name in chosen:
        if name not in CELLS:
            raise ConfigError(f"there is no fault {name!r}; there are {', '.join(CELLS)}")
    config = DeploymentConfig.parse(
        {
            "model_dir": str(model_dir.absolute()),
            "dtype": dtype,
            "request_timeout_seconds": deadline,
            "engine": {
                "max_num_seqs": max(64, streams + streams // 4),  # some come while those still run
                "speculative": speculative and {"method": speculative},
            },
        },
        "chaos",
    )
    if history is not None:
        history.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout
        settings = ChaosSettings(
            streams=streams,
            runs=runs,
            seed=seed,
            longest_prompt=prompt_tokens,
            max_tokens=max_tokens,
            deadline_seconds=deadline,
            history_dir=history,
        )
        rows = _run(config, chosen, settings)
    print(json.dumps(rows)) if as_json else _print_table(rows)
    if any(row["failed"] or row["wrong"] or row["left_over"] for row in rows):
        raise typer.Exit(1)


def _choose_token() -> None:
    """The token of clusters that are started here. Ray looks for one when it is imported, and not again."""
    if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _possible_here() -> list[str]:
    """All faults, less those between hosts where this process cannot make hosts; says so."""
    from deepseek_ray.chaos.cells import CELLS
    from deepseek_ray.chaos.hosts import require_hosts

    try:
        require_hosts()
    except ConfigError as error:
        _say(f"without the faults of hosts: {error}")
        return [name for name in CELLS if not CELLS[name].hosts]
    return list(CELLS)


def _run(config: DeploymentConfig, chosen: list[str], settings: ChaosSettings) -> list[dict[str, Any]]:
    """Rows of all faults. Those of hosts run in processes of their own, as each joins another cluster."""
    from deepseek_ray.chaos.cells import CELLS

    alone = len(chosen) == 1 and "RAY_ADDRESS" not in os.environ
    here = chosen if alone else [name for name in chosen if not CELLS[name].hosts]
    rows = {row["cell"]: row for row in _run_here(config, here, settings)}
    for name in chosen:
        if name not in rows:
            rows[name] = _run_apart(config, name, settings)
    return [rows[name] for name in chosen]


def _run_here(config: DeploymentConfig, names: list[str], settings: ChaosSettings) -> list[dict[str, Any]]:
    from deepseek_ray.chaos.cases import make_cases, make_references
    from deepseek_ray.chaos.cells import CELLS
    from deepseek_ray.chaos.run import run_cell, summarise

    if not names:
        return []
    count = min(settings.streams, _MOST_CASES)
    _say(f"computing what {count} requests must give")
    cases = make_cases(Path(config.model_dir), count, settings.longest_prompt, settings.max_tokens)
    references = make_references(Path(config.model_dir), config.dtype, cases)
    rows = []
    with _joined_cluster(CELLS[names[0]]) as hosts:
        for name in names:
            _say(f"{name}: {CELLS[name].title}")
            named = config.model_copy(update={"name": f"chaos-{name}"})
            results = run_cell(CELLS[name], named, cases, references, settings, _say_result, hosts)
            rows.append({"cell": name, **summarise(CELLS[name].title, results)})
    return rows


@contextlib.contextmanager
def _joined_cluster(cell: Cell) -> Iterator[HostCluster | None]:
    """This process joined to a cluster: of several hosts, or RAY_ADDRESS, or of this machine alone."""
    from deepseek_ray.actors.cluster import join_or_start
    from deepseek_ray.chaos.host_cluster import host_cluster

    with contextlib.ExitStack() as stack:
        hosts = None
        if cell.hosts:
            _say(f"starting a Ray cluster of {1 + len(cell.hosts)} hosts")
            hosts = stack.enter_context(host_cluster(cell.hosts, cell.tight_health_checks))
        stack.callback(join_or_start(hosts.address if hosts else None).leave)
        yield hosts


def _run_apart(config: DeploymentConfig, name: str, settings: ChaosSettings) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "deepseek_ray.cli.main", "chaos", config.model_dir, "--json", f"--cell={name}",
        f"--runs={settings.runs}", f"--streams={settings.streams}", f"--prompt-tokens={settings.longest_prompt}",
        f"--max-tokens={settings.max_tokens}", f"--dtype={config.dtype}", f"--seed={settings.seed}",
        f"--deadline={settings.deadline_seconds}",
    ]  # fmt: skip
    if config.engine.speculative is not None:
        command.append(f"--speculative={config.engine.speculative.method}")
    if settings.history_dir is not None:
        command.append(f"--history={settings.history_dir}")
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if not done.stdout:
        raise DeploymentError(f"the run of {name} ended with exit code {done.returncode}; see above")
    (row,) = json.loads(done.stdout)
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_result(result: RunResult) -> None:
    kept = "every promise kept" if not result.violations else f"{len(result.violations)} promises broken"
    _say(f"  seed {result.seed}: {result.calls} calls, {result.in_flight} struck in mid-generation, {kept}")
    for violation in result.violations[:5]:
        _say(f"    {violation.kind} {violation.where}: {violation.detail}")


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
