"""One trial as Ray Tune sees it: a Ray Train run in a thread, its validations as results.

The trial's own actor holds no cores, so that the run's workers get them all. The run is stopped by a file that its
workers look for after every step: they save, leave, and Ray Train returns their placement group.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from ray import tune

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import DeepSeekRayError, SweepError
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.training.progress import RunFollower
from deepseek_ray.training.trainer import LOCK_FILE, pretrain
from deepseek_ray.tuning import inherit
from deepseek_ray.tuning.settings import MEASURED

STOP_FILE = "stop"
_FREE_TIMEOUT_SECONDS = 120.0
"""How long the previous process of this trial (of a killed driver, say) may take to die."""
_STOP_TIMEOUT_SECONDS = 300.0
_POLL_SECONDS = 0.05


class TrialRun(tune.Trainable):
    """`config`: {"index", "number", "run": a PretrainConfig as plain values}. A result is one validation."""

    def setup(self, config: dict[str, Any]) -> None:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")  # a small trial lasts seconds
        self._run: TrainingThread | None = None
        self._reported_step = 0

    def step(self) -> dict[str, Any]:
        """The next validation, or the end. The run starts here, after Tune has handed over a checkpoint, if any."""
        if self._run is None:
            self._run = TrainingThread(self._run_config())
        result = self._run.next_result()
        self._reported_step = result.get("step", 0)
        return {"index": self.config["index"], **result}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Offer the checkpoint of the step that was reported last; the workers write it after they have validated."""
        offered = inherit.offer(self._run_config().run_dir, self._reported_step)
        return {"index": self.config["index"], "checkpoint": None if offered is None else str(offered)}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Of this trial: nothing to do, the run resumes from its own. Of another: take its weights."""
        if checkpoint and checkpoint["checkpoint"] and checkpoint["index"] != self.config["index"]:
            run_dir = self._run_config().run_dir
            wait_until_free(run_dir)
            inherit.take(Path(checkpoint["checkpoint"]), run_dir)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.config, self._reported_step = new_config, 0
        return True

    def cleanup(self) -> None:
        if self._run is not None:
            self._run.stop()
            self._run = None

    def _run_config(self) -> PretrainConfig:
        return PretrainConfig.parse(self.config["run"])


class TrainingThread:
    """A run in progress."""

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self._stop_file = config.run_dir / STOP_FILE
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
        self._thread.start()

    def next_result(self) -> dict[str, Any]:
        """Wait for the next validation. The last result says `done`, and `failure` when the run failed."""
        return self._results.get()

    def stop(self) -> None:
        """End the run after the step it is at and wait until its workers are gone."""
        if self._thread.is_alive():
            self._config.run_dir.mkdir(parents=True, exist_ok=True)
            self._stop_file.touch()
            self._thread.join(_STOP_TIMEOUT_SECONDS)

    def _train(self) -> None:
        failure = None
        try:
            wait_until_free(self._config.run_dir)
            self._stop_file.unlink(missing_ok=True)
            follower = RunFollower(self._config.run_dir, self._on_step, lambda line: None)
            try:
                with open(os.devnull, "w") as nowhere:
                    pretrain(self._config, nowhere, self._stop_file)
            finally:
                follower.close()
        except DeepSeekRayError as error:
            failure = error.message
        except Exception as error:  # told to the driver, which counts it
            failure = f"{type(error).__name__}: {error}"
        self._results.put(self._last_result(failure))

    def _on_step(self, values: dict[str, Any]) -> None:
        """The validation after the last step is told by `_last_result`, with the end."""
        if "validation_loss" in values and values["step"] < self._config.total_steps:
            self._results.put(describe_validation(values, self._config))

    def _last_result(self, failure: str | None) -> dict[str, Any]:
        validations = [line for line in read_metrics(self._config.run_dir) if "validation_loss" in line]
        if validations:
            result = describe_validation(validations[-1], self._config)
        else:
            result = {"tokens": 0, **dict.fromkeys(MEASURED, float("nan"))}
        if failure is not None:
            result |= {"failure": failure, **dict.fromkeys(MEASURED, float("nan"))}
        return {**result, "ended": True, "done": True}  # Tune says `done` of stopped trials too


def describe_validation(values: dict[str, Any], config: PretrainConfig) -> dict[str, Any]:
    """A line of `metrics.jsonl` as a result of the trial."""
    measured = {name: values[name] for name in MEASURED}
    return {"step": values["step"], "tokens": values["step"] * config.tokens_per_step, **measured}


def wait_until_free(run_dir: Path) -> None:
    """Return when no process trains in `run_dir`. SweepError when one still does after two minutes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _FREE_TIMEOUT_SECONDS
    with (run_dir / LOCK_FILE).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SweepError(
                        f"{run_dir} is still being trained by another process after {_FREE_TIMEOUT_SECONDS:.0f} s; end "
                        "that process, then start the sweep again: it resumes"
                    ) from None
                time.sleep(_POLL_SECONDS)
