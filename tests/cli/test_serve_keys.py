"""API keys on the command line of `deepseek-ray serve`, around a server that starts nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import deepseek_ray.serving.model_dir as model_dir
import deepseek_ray.serving.server as server
from deepseek_ray.cli.main import app
from deepseek_ray.errors import ConfigError, DeploymentError
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.errors import HttpError
from tests.ports import free_port

Run = Callable[..., tuple[Result, list[ApiKeys]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command until it would start; the result and the keys that the server got."""
    given: list[ApiKeys] = []

    class FakeServer:
        def __init__(self, config: Any, claim: Any, api: Any, keys: ApiKeys) -> None:
            given.append(keys)
            self._claim = claim

        def connect(self) -> None:
            raise DeploymentError("far enough")

        def stop(self, drain_seconds: float = 0.0) -> None:
            self._claim.release()

    monkeypatch.setattr(server, "ModelServer", FakeServer)
    monkeypatch.setattr(model_dir, "check_model_dir", lambda directory: None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments: str, host: str = "0.0.0.0") -> tuple[Result, list[ApiKeys]]:
        port = free_port()
        command = ["serve", str(tmp_path), "--host", host, "--port", str(port), *arguments]
        return CliRunner().invoke(app, command), given

    return run


def opens(keys: ApiKeys, key: str) -> bool:
    try:
        keys.check("/v1/models", f"Bearer {key}")
    except HttpError:
        return False
    return True


def test_keys_come_together_and_leave_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", "of-environment")
    (tmp_path / "keys").write_text("of-file\n")
    result, (keys,) = run("--api-key", "one", "--api-key", "two", "--api-key-file", str(tmp_path / "keys"))
    assert str(result.exception) == "far enough"
    assert [opens(keys, key) for key in ("one", "two", "of-file", "of-environment", "none")] == [True] * 4 + [False]
    assert "DEEPSEEK_RAY_API_KEY" not in os.environ
    assert "one" not in result.stderr.split()


def test_an_open_server_is_warned_about_and_one_with_a_key_is_not(run: Run) -> None:
    warned, _ = run()
    assert "warning: 0.0.0.0 is reachable from other machines" in warned.stderr
    assert "warning" not in run("--api-key", "key")[0].stderr
    assert "warning" not in run(host="127.0.0.1")[0].stderr


def test_a_bad_key_file_is_told_before_anything_starts(run: Run, tmp_path: Path) -> None:
    result, given = run("--api-key-file", str(tmp_path / "none"))
    assert isinstance(result.exception, ConfigError)
    assert not given
