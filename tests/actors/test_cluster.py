"""Joining a cluster takes nothing from the process that joins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import ray

pytestmark = pytest.mark.cluster

PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
from deepseek_ray.actors.cluster import join_or_start
cluster = join_or_start()
try:
    print("joined", flush=True)
    time.sleep(60)
finally:
    cluster.leave()
    print("left", flush=True)
"""


def test_the_handler_of_sigterm_stays(ray_cluster: None) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "joined\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "left\n"
    assert process.returncode == 143
