"""Runs a cell several times: a deployment, streams in mid-generation, a fault, and the check of what came."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import ray

from deepseek_ray.actors.deployment import Deployment, start_deployment
from deepseek_ray.actors.request_session import DeploymentClient
from deepseek_ray.chaos.cells import Cell
from deepseek_ray.chaos.checks import Violation, check, first_token_seconds, gaps_before_and_during, stalls
from deepseek_ray.chaos.clients import Case, Clients
from deepseek_ray.chaos.history import History, Reference
from deepseek_ray.chaos.host_cluster import HostCluster
from deepseek_ray.chaos.nemesis import Nemesis
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.errors import DeploymentError

T = TypeVar("T")
TOKENS_BEFORE_STRIKE = 5
"""The fault comes when every stream has as many."""
LATE_CALLS_PART = 0.1
"""As many calls, of the streams, are sent after the fault, within `LATE_SECONDS`."""
LATE_SECONDS = 3.0
_ARRIVAL_SECONDS = 0.5
_SETTLE_SECONDS = 120.0
_ALONE_SECONDS = 30.0
_REPORT_SECONDS = 1.5
"""Members report twice a second: after this the router's figures are those of the end."""


class RunResult(msgspec.Struct, kw_only=True):
    """What one run showed."""

    seed: int
    calls: int
    in_flight: int
    """Streams that the fault found in mid-generation."""
    violations: list[Violation]
    stalls: list[float]
    first_token_seconds: list[float]
    """Of the calls that were sent after the fault."""
    gap_p90_before: float | None
    """90th percentile of the seconds between tokens, before the fault and while it lasted; None without any."""
    gap_p90_during: float | None
    fault_seconds: float
    """From the beginning of the fault to the nemesis' last act."""


class ChaosSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How hard each run tries."""

    streams: int = 28
    runs: int = 1
    seed: int = 0
    longest_prompt: int = 24
    """Tokens."""
    max_tokens: int = 80
    """Of each stream."""
    deadline_seconds: float = 300.0
    history_dir: Path | None = None
    """Where to keep the history of every run."""


def run_cell(
    cell: Cell,
    config: DeploymentConfig,
    cases: Sequence[Case],
    references: Sequence[Reference],
    settings: ChaosSettings,
    on_run: Callable[[RunResult], None] = lambda result: None,
    cluster: HostCluster | None = None,
) -> list[RunResult]:
    """Start the cell's deployment on the joined cluster, strike it `settings.runs` times, and end it.

    `cluster`: of a cell with hosts. Its members may have moved after a run, so each run has a deployment of its own.
    """
    results: list[RunResult] = []
    while len(results) < settings.runs:
        deployment = start_deployment(config.model_copy(update=dict(cell.config)))
        try:
            for number in range(len(results), len(results) + 1 if cluster else settings.runs):
                _wait_settled(deployment)
                history = asyncio.run(_run_once(deployment, cell, cases, settings, settings.seed + number, cluster))
                if settings.history_dir is not None:
                    history.write(settings.history_dir / f"{config.name}-{history.seed}.json")
                results.append(_judge(history, references))
                on_run(results[-1])
        finally:
            deployment.stop()
    return results


async def _run_once(
    deployment: Deployment,
    cell: Cell,
    cases: Sequence[Case],
    settings: ChaosSettings,
    seed: int,
    cluster: HostCluster | None,
) -> History:
    choose = random.Random(seed)
    before = await asyncio.to_thread(_descriptors, deployment)
    client = await DeploymentClient.connect(deployment.name)
    try:
        clients = Clients(client, cases, f"{deployment.name}-{seed}", settings.deadline_seconds)
        clients.send([choose.uniform(0, _ARRIVAL_SECONDS) for _ in range(settings.streams)])
        await asyncio.sleep(_ARRIVAL_SECONDS)
        await clients.all_have(TOKENS_BEFORE_STRIKE)
        nemesis = Nemesis(deployment.name, choose, cluster.hosts if cluster else None)
        late = round(settings.streams * LATE_CALLS_PART)
        clients.send([choose.uniform(0, LATE_SECONDS) for _ in range(late)])
        await asyncio.to_thread(cell.strike, nemesis)
        await clients.finish()
    finally:
        await client.close()
    if cluster is not None:
        await asyncio.to_thread(cluster.restore)
    await asyncio.to_thread(_wait_settled, deployment)
    await asyncio.sleep(_REPORT_SECONDS)
    counters = await asyncio.to_thread(_answer, deployment.stats)
    strays = await asyncio.to_thread(_wait_alone, deployment)
    after = await asyncio.to_thread(_descriptors, deployment)
    descriptors = {member: (before[pid, member], after[pid, member]) for pid, member in before.keys() & after.keys()}
    return History(seed, clients.calls, nemesis.faults, counters, descriptors, strays)


def _judge(history: History, references: Sequence[Reference]) -> RunResult:
    held_up = stalls(history)
    before, during = gaps_before_and_during(history)
    return RunResult(
        gap_p90_before=_p90(before),
        gap_p90_during=_p90(during),
        seed=history.seed,
        calls=len(history.calls),
        in_flight=len(held_up),
        violations=check(history, references),
        stalls=held_up,
        first_token_seconds=first_token_seconds(history),
        fault_seconds=sum(fault.healed - fault.struck for fault in history.faults),
    )


def _p90(values: Sequence[float]) -> float | None:
    return statistics.quantiles(values, n=10)[-1] if len(values) >= 10 else None


def _wait_settled(deployment: Deployment) -> None:
    """Everybody back at work: the next run begins like the first."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not _answer(deployment.is_settled):
        if time.monotonic() > deadline:
            rows = [f"{row['role']} {row['id']}: {row['state']}" for row in deployment.status()["actors"]]
            raise DeploymentError(
                f"{deployment.name!r} is not whole again {_SETTLE_SECONDS:g} s after a run: {', '.join(rows)}"
            )
        time.sleep(0.1)


def _answer(question: Callable[[], T]) -> T:
    """What a deployment answers once its router, which may have been struck, is there again."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        try:
            return question()
        except (ray.exceptions.RayError, DeploymentError, ValueError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _descriptors(deployment: Deployment) -> dict[tuple[int, str], int]:
    """(pid, role/id) -> open descriptors of every member's process."""
    found = {}
    for row in _answer(deployment.status)["actors"]:
        with contextlib.suppress(psutil.Error):
            found[row["pid"], f"{row['role']}/{row['id']}"] = psutil.Process(row["pid"]).num_fds()
    return found


def _wait_alone(deployment: Deployment) -> list[str]:
    """Processes on this machine that say they are members and are not: what a fault has left behind, after a while."""
    deadline = time.monotonic() + _ALONE_SECONDS
    while strays := _strays(deployment):
        if time.monotonic() > deadline:
            return strays
        time.sleep(0.2)
    return []


def _strays(deployment: Deployment) -> list[str]:
    members = {row["pid"] for row in _answer(deployment.status)["actors"]}
    found = {process.pid: " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    title = f"ray::{deployment.name}/"
    return [f"pid {pid} {name}" for pid, name in found.items() if name.startswith(title) and pid not in members]


def summarise(title: str, results: Sequence[RunResult]) -> dict[str, Any]:
    """One row of the table: counts over all runs, median and worst stall over all streams, seconds."""
    kinds = Counter(violation.kind for result in results for violation in result.violations)
    held_up = [seconds for result in results for seconds in result.stalls]
    first = [seconds for result in results for seconds in result.first_token_seconds]
    ratios = [r.gap_p90_during / r.gap_p90_before for r in results if r.gap_p90_before and r.gap_p90_during]
    return {
        "fault": title,
        "runs": len(results),
        "calls": sum(result.calls for result in results),
        "in_flight": sum(result.in_flight for result in results),
        "failed": kinds["failed"] + kinds["unfinished"] + kinds["late"],
        "wrong": kinds["order"] + kinds["token"] + kinds["logprob"],
        "left_over": kinds["left over"],
        "stall_median": statistics.median(held_up) if held_up else None,
        "stall_worst": max(held_up, default=None),
        "gap_p90_ratio": statistics.median(ratios) if ratios else None,
        "first_token_median": statistics.median(first) if first else None,
        "first_token_worst": max(first, default=None),
    }
