"""What `deepseek-ray serve` does with signals, around a server that starts nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_PROGRAM = """
import sys, threading
from deepseek_ray.cli.main import main
from deepseek_ray.cli import serve as command
from deepseek_ray.errors import DeploymentError

class FakeServer:
    url = "http://127.0.0.1:1/v1"
    stopped = False
    def connect(self): pass
    def start(self, say):
        say("starting")
        if "slow start" in sys.argv: threading.Event().wait()
    def check(self):
        if "dies" in sys.argv: raise DeploymentError("the deployment is gone")
    def stop(self, drain_seconds=0.0):
        if self.stopped: return
        command._say(f"draining {drain_seconds:g}")
        if drain_seconds and "slow drain" in sys.argv: threading.Event().wait()
        self.stopped = True
        command._say("stopped")

command._CHECK_SECONDS = 0.05
def run(arguments, prog_name):
    command._run(FakeServer(), 30.0, sys.stdout)
import deepseek_ray.cli.main as cli
cli.app = run
main()
"""


@contextmanager
def serving(mode: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    pytest.fail(f"{words!r} was not said")


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=20)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(number: signal.Signals) -> None:
    with serving("normal") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready http://127.0.0.1:1/v1\n"
        process.send_signal(number)
        code, stdout, stderr = end(process)
    assert (code, stdout) == (0, "")
    assert "draining 30\n" in stderr
    assert stderr.endswith("stopped\n")


def test_a_second_signal_does_not_wait() -> None:
    with serving("slow drain") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        wait_for(process, "draining 30")
        process.send_signal(signal.SIGTERM)
        code, _, stderr = end(process)
    assert code == 0
    assert stderr.splitlines()[-2:] == ["deepseek-ray: draining 0", "deepseek-ray: stopped"]


def test_a_signal_while_starting_undoes_the_start_and_never_says_ready() -> None:
    with serving("slow start") as process:
        wait_for(process, "starting")
        process.send_signal(signal.SIGTERM)
        code, stdout, stderr = end(process)
    assert (code, stdout) == (0, "")
    assert stderr.endswith("stopped\n")


def test_a_deployment_that_dies_ends_the_command_with_an_error() -> None:
    with serving("dies") as process:
        code, stdout, stderr = end(process)
    assert (code, stdout) == (1, "ready http://127.0.0.1:1/v1\n")
    assert stderr.splitlines()[-2:] == ["deepseek-ray: stopped", "deepseek-ray: the deployment is gone"]
