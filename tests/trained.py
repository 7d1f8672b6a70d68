"""A small model that was really trained: random ones collapse onto one token and hide wrong experts and lost frames.

Trained once per configuration into `.cache/tests`, in under a minute on two idle cores.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "tests"
OVERRIDES = {
    "name": "trained",
    "model.num_hidden_layers": "3",
    "model.n_routed_experts": "8",
    "data.sequence_length": "128",
    "training.steps": "240",
    "training.validation_interval": "240",
    "training.checkpoint_interval": "240",
}
_PROGRAM = """
import sys
from pathlib import Path
import torch
from deepseek_ray.config.load import load_pretrain_config
from deepseek_ray.data.prepare import prepare_data
from deepseek_ray.training.loop import train
from deepseek_ray.training.ranks import Ranks

torch.set_num_threads(2)
config = load_pretrain_config(sys.argv[1], sys.argv[3:])
result = train(config, Path(sys.argv[2]), prepare_data(config.data), Ranks())
print(result.checkpoint)
"""


def trained_model_dir() -> Path:
    """A checkpoint directory with weights, config and tokenizer; trained now if the cache has none."""
    target = CACHE / f"trained-{_content_key()}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs of one checkout would train in the same folder
        if not target.is_dir():
            _train(target)
    return target


def _train(target: Path) -> None:
    scratch = target.with_suffix(".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    sets = [f"{key}={value}" for key, value in {**OVERRIDES, "data.cache_dir": str(CACHE / "data")}.items()]
    command = [sys.executable, "-c", _PROGRAM, str(ROOT / "configs" / "tiny.yaml"), str(scratch), *sets]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    Path(done.stdout.split()[-1]).rename(target)
    shutil.rmtree(scratch)


def _content_key() -> str:
    """Of what defines the model. The code that trains it may change: the tests want any trained model, not this one."""
    digest = hashlib.sha256(repr(sorted(OVERRIDES.items())).encode())
    digest.update((ROOT / "configs" / "tiny.yaml").read_bytes())
    return digest.hexdigest()[:16]
