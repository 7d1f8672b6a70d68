"""`deepseek-ray quickstart` with the smallest run: the whole road, from text to tokens over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from tests.trained import CACHE, ROOT

pytestmark = pytest.mark.cluster


def test_the_whole_road(tmp_path: Path) -> None:
    sets = {"training.steps": 10, "data.cache_dir": CACHE / "data", "name": "road"}
    options = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "deepseek_ray.cli.main", "quickstart", "--config", str(ROOT / "configs/tiny.yaml")]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "NO_COLOR": "1"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    said = done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    for step in range(1, 6):
        assert f"[{step}/5]" in said, done.stderr
    assert "bits per byte" in said
    assert "Kneser-Ney bigram model on the same tokens" in said
    assert said.count("POST http://127.0.0.1:") == 3
    assert "graceful_shutdown" not in said
    run_dir = tmp_path / "runs" / "road"
    for picture in ("loss_curve.png", "expert_heat_map.png"):
        assert matplotlib.image.imread(run_dir / picture).std() > 0.05
    assert (run_dir / "model" / "model.safetensors").is_file()
    # Ten steps are too few to beat the baseline, and the command says so.
    assert done.returncode == 1
    assert "did not beat the bigram baseline" in done.stderr
