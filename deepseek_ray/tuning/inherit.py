"""How a trial goes on from another trial's weights: checkpoints are handed over as hard links.

A run removes its own older checkpoints while it trains; a link keeps a handed-over one alive for as long as somebody
may still take it, and costs no space until then.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from deepseek_ray.training.checkpoint import CheckpointStore
from deepseek_ray.training.loop import CHECKPOINTS_DIR

_OFFERED_DIR = "offered"
_WRITE_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.05
_KEEP_OFFERED = 3
"""An offer may be taken a few perturbations after it was made, when a paused trial gets its turn."""


def offer(run_dir: Path, step: int = 0) -> Path | None:
    """Link the run's newest valid checkpoint aside and return where; None when it has none.

    Waits up to a minute for one of `step` or later, which the run may be writing just now.
    """
    deadline = time.monotonic() + _WRITE_TIMEOUT_SECONDS
    while _newest_step(run_dir) < step and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    newest = CheckpointStore(run_dir / CHECKPOINTS_DIR, keep=1).latest()
    if newest is None:
        return None
    source = newest[1]
    target = run_dir / _OFFERED_DIR / source.name
    if not target.exists():
        _link(source, target)
    for old in sorted(target.parent.glob("step-*"))[:-_KEEP_OFFERED]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def take(offered: Path, run_dir: Path) -> None:
    """Make the offered checkpoint the only one of `run_dir`; the run's next start goes on from it."""
    checkpoints = run_dir / CHECKPOINTS_DIR
    incoming = run_dir / f".{CHECKPOINTS_DIR}.incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    _link(offered, incoming / offered.name)
    shutil.rmtree(checkpoints, ignore_errors=True)
    os.rename(incoming, checkpoints)


def _newest_step(run_dir: Path) -> int:
    names = (path.name.removeprefix("step-") for path in (run_dir / CHECKPOINTS_DIR).glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _link(source: Path, target: Path) -> None:
    """A copy of hard links, in place at once; plain copies where the file system has no links."""
    hidden = target.with_name(f".linking-{target.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, hidden, copy_function=_link_file)
    os.rename(hidden, target)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
