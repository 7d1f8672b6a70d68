"""Runs a sweep on Ray Tune: slots, scheduler and searcher put together.

Every start is a new Tune experiment over the trials that are left. Tune's own snapshots are not used to resume: they
are taken at intervals, hold no scheduler state, and are pickles; the sweep's study has a trial before it starts.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import ray
from ray import tune

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.ingest import connected
from deepseek_ray.data.prepare import prepare_data
from deepseek_ray.errors import SweepError
from deepseek_ray.training.resources import NodeResources
from deepseek_ray.training.trainer import absolute_run_dir
from deepseek_ray.tuning.explore import explore
from deepseek_ray.tuning.latency import measure_decode_latency
from deepseek_ray.tuning.progress import SweepLine
from deepseek_ray.tuning.records import read_records, tokens_per_step
from deepseek_ray.tuning.schedulers import NoScheduler, Population, ResumableAsha, Seats
from deepseek_ray.tuning.searcher import SweepSearcher
from deepseek_ray.tuning.settings import REPORTS_PER_TRIAL, SweepSettings
from deepseek_ray.tuning.slots import Slots, plan_slots
from deepseek_ray.tuning.space import Space
from deepseek_ray.tuning.sweep import Proposal, Sweep
from deepseek_ray.tuning.trial import TrialRun

_TUNE_DIR = "tune"
_NEXT_TO_NOTHING = {"memory": 1.0}
"""Resources of a trial's own actor: Tune takes no empty request, and a share of a core would be lost to the workers."""
_MOST_CRASHES = 3
"""Times a trial whose own process died (not its workers: Ray Train restarts those) is started again."""
_PERTURB_EVERY = 2
"""Validations between two perturbations of population based training."""


def run_sweep(
    settings: SweepSettings, directory: Path, space: Space, max_concurrent: int | None, stream: TextIO
) -> SweepError | None:
    """Run every trial that is left; why not all of them could be started, if so. The caller holds the sweep's lock."""
    with connected():
        nodes, free = _nodes()
        slots = plan_slots(settings.base, nodes, free, settings.num_trials, max_concurrent)
        prepare_data(settings.base.data)  # once, here: the trials find it
        sweep = Sweep(settings, directory, space, measure_decode_latency)
        left = settings.num_trials - sweep.num_started + len(sweep.unfinished)
        line = SweepLine(
            stream,
            settings,
            read=lambda index: read_records(directory, settings)[index],
            ended=settings.num_trials - left,
        )
        line.note(_headline(sweep, directory, slots, left))
        if left == 0:
            return None
        searcher, scheduler = _search_and_schedule(sweep, directory, slots, line)
        try:
            _fit(directory, searcher, scheduler, left)
        finally:
            line.close()
        if searcher.error is None and (sweep.unfinished or sweep.num_started < settings.num_trials or searcher.running):
            raise KeyboardInterrupt  # Tune has answered Ctrl-C by returning; starting the sweep again resumes it
        return searcher.error


def sweep_directory(settings: SweepSettings, storage: str | Path | None) -> Path:
    """Where the sweep is kept; refused where a Ray job would throw it away."""
    where = {"name": settings.name, "storage_path": str(storage or settings.base.storage_path)}
    return absolute_run_dir(settings.base.model_copy(update=where))


def absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """The same run from any working directory: a trial's is not the driver's."""
    data = config.data
    paths = [_absolute(path) for path in data.paths]
    tokenizer = None if data.tokenizer is None else _absolute(data.tokenizer)
    update = {"paths": tuple(paths), "cache_dir": _absolute(data.cache_dir), "tokenizer": tokenizer}
    return config.model_copy(update={"data": data.model_copy(update=update)})


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _search_and_schedule(sweep: Sweep, directory: Path, slots: Slots, line: SweepLine) -> tuple[SweepSearcher, Seats]:
    settings = sweep.settings

    def as_tune_config(proposal: Proposal) -> dict[str, Any]:
        run = settings.trial_config(proposal.config, proposal.index, directory, slots.threads)
        return {
            "index": proposal.index,
            "number": proposal.number,
            "params": dict(proposal.params),
            "run": run.model_dump(mode="json"),
        }

    generator = random.Random(settings.seed * 1_000_003 + sweep.num_started)

    def explore_trial(own: dict[str, Any], donor: dict[str, Any], tokens: int) -> dict[str, Any]:
        params, sample, config = explore(sweep.space, settings.base, donor["params"], generator)
        sweep.change(own["number"], donor["index"], tokens, params, sample)
        return as_tune_config(Proposal(own["number"], own["index"], params, config))

    if settings.scheduler == "asha":
        records = read_records(directory, settings)
        history = {r.index: r.curve(settings.metric, tokens_per_step(r, settings)) for r in records}
        scheduler: Any = ResumableAsha(settings.metric, settings.mode, settings.budget_tokens, history)
    elif settings.scheduler == "pbt":
        scheduler = Population(
            settings.metric,
            settings.mode,
            interval_tokens=_PERTURB_EVERY * settings.budget_tokens // REPORTS_PER_TRIAL,
            explore=explore_trial,
            seats=slots.count,
            more_to_come=lambda: bool(sweep.unfinished) or sweep.num_started < settings.num_trials,
            seed=settings.seed,
        )
    else:
        scheduler = NoScheduler()
    searcher = SweepSearcher(sweep, as_tune_config, lambda: scheduler.num_running() < slots.count, line)
    return searcher, scheduler


def _fit(directory: Path, searcher: SweepSearcher, scheduler: Any, num_trials: int) -> None:
    with _quiet_tune():
        tune.Tuner(
            tune.with_resources(TrialRun, _NEXT_TO_NOTHING),
            tune_config=tune.TuneConfig(
                search_alg=searcher, scheduler=scheduler, num_samples=num_trials, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=_next_start(directory / _TUNE_DIR),
                storage_path=str(directory / _TUNE_DIR),
                failure_config=tune.FailureConfig(max_failures=_MOST_CRASHES),
                verbose=0,
            ),
        ).fit()


def _next_start(directory: Path) -> str:
    return f"start-{len(list(directory.glob('start-*'))):03d}"


def _headline(sweep: Sweep, directory: Path, slots: Slots, left: int) -> str:
    settings = sweep.settings
    resumed = f", going on: {left} left, {len(sweep.unfinished)} of them begun" if sweep.num_started else ""
    return (
        f"sweep {settings.name}: {settings.num_trials} trials of {settings.budget_tokens:,} tokens{resumed}; "
        f"{slots.count} at once with {slots.threads} cores per worker, in {directory}"
    )


def _nodes() -> tuple[list[NodeResources], list[NodeResources]]:
    """What living nodes have, and what of it is free."""
    living = [node for node in ray.nodes() if node["Alive"]]
    available = ray._private.state.available_resources_per_node()
    total = [_as_node(node["Resources"]) for node in living]
    return total, [_as_node(available.get(node["NodeID"], {})) for node in living]


def _as_node(resources: dict[str, float]) -> NodeResources:
    return NodeResources(cpus=int(resources.get("CPU", 0)), gpus=int(resources.get("GPU", 0)))


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its tables, result files of its own and warnings; the environment as before afterwards."""
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_RESULT_BUFFER_LENGTH": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(wanted)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
