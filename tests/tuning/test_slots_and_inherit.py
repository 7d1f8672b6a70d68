"""How many trials fit, and how a trial's checkpoint is handed to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_runs import small_config

from deepseek_ray.errors import SweepError
from deepseek_ray.training.checkpoint import CheckpointStore
from deepseek_ray.training.resources import NodeResources
from deepseek_ray.tuning import inherit
from deepseek_ray.tuning.slots import Slots, plan_slots

TWO_CORES, EIGHT_CORES = NodeResources(2, 0), NodeResources(8, 0)


def plan(
    nodes: list[NodeResources],
    free: list[NodeResources] | None = None,
    trials: int = 16,
    most: int | None = None,
    workers: int = 1,
    **training: Any,
) -> Slots:
    config = small_config(
        training={"threads_per_worker": None, **training}, distributed={"data_parallel_size": workers}
    )
    return plan_slots(config, nodes, nodes if free is None else free, trials, most)


def test_trials_share_the_cores_of_the_cluster_and_never_more() -> None:
    assert plan([TWO_CORES]) == Slots(2, 1)
    assert plan([TWO_CORES], most=1) == Slots(1, 2)
    assert plan([EIGHT_CORES], trials=3) == Slots(3, 2)
    assert plan([EIGHT_CORES], most=4) == Slots(4, 2)
    assert plan([EIGHT_CORES, TWO_CORES], threads_per_worker=3) == Slots(2, 3)
    assert plan([NodeResources(16, 2)]) == Slots(2, 4)  # a GPU each


def test_every_worker_of_a_trial_needs_its_cores() -> None:
    assert plan([EIGHT_CORES], workers=2) == Slots(4, 1)
    assert plan([EIGHT_CORES], workers=2, trials=2) == Slots(2, 2)
    assert plan([NodeResources(3, 0), NodeResources(3, 0)], workers=2, threads_per_worker=2) == Slots(1, 2)
    with pytest.raises(SweepError, match=r"needs 2 workers of 1 CPU cores; the cluster has 1 CPU cores and 0"):
        plan([NodeResources(1, 0)], workers=2)


def test_only_free_cores_count() -> None:
    assert plan([EIGHT_CORES], free=[NodeResources(3, 0)]) == Slots(3, 1)


@pytest.mark.parametrize(
    ("nodes", "free", "training", "message"),
    [
        (
            [TWO_CORES],
            None,
            {"threads_per_worker": 4},
            r"needs 1 workers of 4 CPU cores; the cluster has 2 CPU cores and 0",
        ),
        ([TWO_CORES], None, {"device": "cuda"}, r"1 CPU cores and 1 GPU; the cluster has 2 CPU cores and 0 GPUs"),
        (
            [TWO_CORES],
            [NodeResources(0, 0)],
            {},
            r"of which 0 cores and 0 GPUs are free: wait until other jobs have ended",
        ),
    ],
)
def test_what_is_missing_is_said(
    nodes: list[NodeResources], free: list[NodeResources] | None, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(SweepError, match=message):
        plan(nodes, free, **training)


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, lambda directory: (directory / "weights").write_text(f"step {step}") and None, 1)


def test_an_offered_checkpoint_outlives_the_run_that_made_it(tmp_path: Path) -> None:
    donor, taker = tmp_path / "donor", tmp_path / "taker"
    store = CheckpointStore(donor / "checkpoints", keep=1)
    assert inherit.offer(donor) is None
    save(store, 4)
    offered = inherit.offer(donor)
    assert offered is not None
    for step in (8, 12):  # the donor goes on, and removes its checkpoint of step 4
        save(store, step)
    own = CheckpointStore(taker / "checkpoints", keep=2)
    save(own, 10)
    inherit.take(offered, taker)
    newest = own.latest()
    assert newest == (4, taker / "checkpoints" / "step-00000004")
    assert (newest[1] / "weights").read_text() == "step 4"
    assert not (taker / "checkpoints" / "step-00000010").exists()
    inherit.take(offered, taker)  # again after a crash: the same
    assert own.latest() == newest


def test_only_the_newest_offers_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    for step in range(1, 6):
        save(store, step)
        inherit.offer(tmp_path)
    assert sorted(path.name for path in (tmp_path / "offered").iterdir()) == [f"step-{step:08d}" for step in (3, 4, 5)]
