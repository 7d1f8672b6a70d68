"""What Ray Tune asks for trials and tells of them: the sweep behind Tune's `Searcher` interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ray.tune.search import Searcher

from deepseek_ray.errors import SweepError
from deepseek_ray.tuning.settings import MEASURED
from deepseek_ray.tuning.sweep import Proposal, Status, Sweep


class Listener(Protocol):
    """Hears what happens to trials, for people."""

    def validated(self, index: int, tokens: int, value: float) -> None: ...

    def ended(self, index: int) -> None: ...


class SweepSearcher(Searcher):
    """Hands the sweep's trials to Tune while seats are free, and writes down how they end."""

    def __init__(
        self,
        sweep: Sweep,
        as_tune_config: Callable[[Proposal], dict[str, Any]],
        has_seat: Callable[[], bool],
        listener: Listener,
    ) -> None:
        super().__init__()
        self._sweep, self._as_tune_config, self._has_seat, self._listener = sweep, as_tune_config, has_seat, listener
        self.running: dict[str, Proposal] = {}
        self.error: SweepError | None = None
        """Why no more trials were started."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        if not self._has_seat():
            return None
        try:
            proposal = self._sweep.next()
        except SweepError as error:  # raised inside Tune it would come out as Tune's
            self.error = error
            return Searcher.FINISHED
        if proposal is None:
            return Searcher.FINISHED
        self.running[trial_id] = proposal
        return self._as_tune_config(proposal)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        proposal, value = self.running[trial_id], result[self._sweep.settings.metric]
        if not math.isnan(value):
            self._sweep.report(proposal.number, result["tokens"], value)
            self._listener.validated(proposal.index, result["tokens"], value)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        proposal = self.running.pop(trial_id)
        result = result or {}
        failure = result.get("failure") or ("the trial's process died again and again" if error else None)
        status: Status = "failed" if failure else "finished" if result.get("ended") else "stopped"
        measured = {name: result[name] for name in MEASURED if not math.isnan(result.get(name, math.nan))}
        self._sweep.finish(proposal.number, status, measured, int(result.get("tokens", 0)), failure)
        self._listener.ended(proposal.index)

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file of its searcher's state; ours is in the study."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep resumes from its study, never from Tune's state")

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())  # Tune pickles its arguments for a restore that is never made
