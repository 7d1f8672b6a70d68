"""The commands as a user calls them: instant help, exit codes, one line per mistake, and text that streams."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from api_server import MODEL, EngineBackend, RunningApi, ScriptedBackend, running_api
from checkpoints import tiny_config, write_random_checkpoint
from fakes import BYTE_EOS, write_byte_tokenizer

from deepseek_ray.cli.main import main
from deepseek_ray.errors import OverloadedError, UnavailableError

COMMANDS = [
    "serve",
    "status",
    "scale",
    "drain",
    "rebalance",
    "replicate",
    "move",
    "experts",
    "chat",
    "complete",
    "doctor",
    "tune",
    "evaluate",
    "batch",
]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, stdin: str | bytes = b"", **environment: str) -> Done:
    """Run `deepseek-ray` in this process, with streams of its own."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(3)]
    streams[0].buffer.write(stdin if isinstance(stdin, bytes) else stdin.encode())
    streams[0].seek(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"NO_COLOR": "1", "COLUMNS": "200", **environment}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["deepseek-ray", *map(str, arguments)])
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        code: object = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
    for stream in streams[1:]:
        stream.flush()
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in streams[1:])  # type: ignore[attr-defined]
    assert isinstance(code, int)
    return Done(code, stdout, stderr)


def refused(done: Done, *words: str, status: int = 1) -> str:
    """A clear error: the exit code, nothing on stdout, one line on stderr that holds the words."""
    assert (done.returncode, done.stdout) == (status, ""), done
    if status == 1:
        assert done.stderr.startswith("deepseek-ray: ")
        assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / MODEL
    write_random_checkpoint(directory, tiny_config(vocab_size=264, eos_token_id=BYTE_EOS))
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def server() -> Iterator[RunningApi]:
    with running_api(EngineBackend) as running:
        yield running


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from deepseek_ray.cli.main import app\n"
        "try: app(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'tokenizers', 'httpx', 'numpy'} & set(sys.modules)\n"
        "print(f'\\nHEAVY {sorted(heavy)}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []"  # with them it takes seconds, without a third of one


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Examples" in done.stdout
    assert f"deepseek-ray {command}" in done.stdout


def test_version_and_usage_errors() -> None:
    assert run("--version").stdout.startswith("deepseek-ray 0.")
    refused(run("chatt"), "Did you mean 'chat'", status=2)
    refused(run("serve"), "MODEL_DIR", status=2)
    refused(run("serve", "x", "--port", "70000"), "--port", status=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], ["dtype is 'int8'", "'float32' or 'bfloat16'"]),
        (["--expert-shards", "0"], ["expert_shards is 0", "greater than or equal to 1"]),
        (["--name", "a/b"], ["name is 'a/b'"]),
        (["--max-model-len", "1"], ["max_model_len is 1", "greater than or equal to 2"]),
        (["--host", "no such host"], ["'no such host'", "IP address"]),
        (["--host", "198.51.100.7"], ["port 8000 on 198.51.100.7", "--host must be an address of this machine"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_serve_refuses_wrong_options(model_dir: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(run("serve", model_dir, *arguments, XDG_RUNTIME_DIR=str(tmp_path)), *words)


def test_serve_refuses_directories_it_cannot_serve(model_dir: Path, tmp_path: Path) -> None:
    refused(run("serve", tmp_path / "none"), str(tmp_path / "none"), "is not a directory", "Hugging Face layout")
    bare = tmp_path / "bare"
    bare.mkdir()
    refused(run("serve", bare), str(bare), "config.json")
    (bare / "config.json").write_text((model_dir / "config.json").read_text())
    refused(run("serve", bare), "no *.safetensors")
    (bare / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    refused(run("serve", bare), "no tokenizer.json")


def test_serve_finds_a_used_port_before_anything_starts(model_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", model_dir, "--port", port, XDG_RUNTIME_DIR=str(tmp_path))
    refused(done, f"port {port} on 127.0.0.1 is in use", "choose another --port")
    assert not list((tmp_path / "deepseek_ray").iterdir())


def test_status_without_a_server(tmp_path: Path) -> None:
    refused(run("status", XDG_RUNTIME_DIR=str(tmp_path)), "no server of any deployment runs here", "--address")
    refused(run("status", "--name", "x", XDG_RUNTIME_DIR=str(tmp_path)), "'x'", "running: none")


@pytest.mark.parametrize(
    "arguments",
    [
        ["scale", "--expert-shards", "3"],
        ["drain", "expert_shard", "1"],
        ["rebalance"],
        ["move", "1", "0", "0", "1"],
        ["experts"],
    ],
)
def test_changes_without_a_server(tmp_path: Path, arguments: list[str]) -> None:
    refused(run(*arguments, XDG_RUNTIME_DIR=str(tmp_path)), "no server of any deployment runs here", "--address")


def test_admin_wants_a_key(tmp_path: Path) -> None:
    refused(run("admin", XDG_RUNTIME_DIR=str(tmp_path)), "needs a key", "DEEPSEEK_RAY_ADMIN_KEY", "--key-file")


def test_scale_wants_a_number(tmp_path: Path) -> None:
    refused(run("scale", XDG_RUNTIME_DIR=str(tmp_path)), "give --expert-shards", status=2)


def test_complete_over_http_streams_what_the_model_says(server: RunningApi) -> None:
    first = run("complete", server.url, "hello", "--max-tokens", "12", "--temperature", "0")
    assert first.returncode == 0
    again = run("complete", f"{server.url}/v1", "--max-tokens", "12", "--temperature", "0", stdin="hello")
    assert again.stdout == first.stdout
    echoed = run("complete", server.url, "hello", "--max-tokens", "12", "--temperature", "0", "--echo")
    assert echoed.stdout == "hello" + first.stdout
    without_scheme = server.url.removeprefix("http://")
    seeded = [run("complete", without_scheme, "hello", "--seed", str(seed)).stdout for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_chat_over_http_remembers_the_conversation(server: RunningApi) -> None:
    alone = run("chat", server.url, "again", "--max-tokens", "8", "--temperature", "0")
    assert alone.returncode == 0
    turns = ["chat", server.url, "--max-tokens", "8", "--temperature", "0"]
    said = run(*turns, stdin="hello\nagain\n/reset\nagain\n/exit\nnever\n").stdout.encode()
    first = run("chat", server.url, "hello", "--max-tokens", "8", "--temperature", "0").stdout.encode()
    assert said.startswith(first)
    assert said.endswith(alone.stdout.encode())
    middle = said.removeprefix(first).removesuffix(alone.stdout.encode())
    assert middle
    assert middle != alone.stdout.encode()


def test_what_a_server_refuses_is_said_in_one_line(server: RunningApi) -> None:
    refused(run("complete", server.url, "x" * 300), "answered 400", "context holds 256 tokens")
    refused(run("complete", server.url, "x", "--temperature", "-1"), "temperature is -1")
    refused(run("complete", server.url, stdin=b"\xff\xfe"), "not UTF-8", status=2)
    refused(run("chat", "http://127.0.0.1:9", "hi"), "cannot be reached", "is the server running?")
    refused(run("chat", f"{server.url}/health", "hi"), "404")
    with running_api(lambda: ScriptedBackend(error=OverloadedError("full"))) as running:
        refused(run("chat", running.url, "hi"), "answered 429: full")


def test_a_broken_stream_is_an_error_after_what_came() -> None:
    with running_api(lambda: ScriptedBackend(texts=["some text"], error=UnavailableError("gone"))) as running:
        done = run("complete", running.url, "x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "some text", "deepseek-ray: gone\n")


def test_local_and_served_say_the_same(model_dir: Path) -> None:
    """MODEL_DIR mode runs the engine in the process; what it prints is what the engine's API says."""
    asked = ["complete", model_dir, "hello", "--max-tokens", "10", "--temperature", "0", "--dtype", "float32"]
    printed = run(*asked, "--threads", "1").stdout
    from deepseek_ray import LLM, SamplingParams

    with LLM(model_dir, dtype="float32", threads=1) as llm:
        (result,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    assert printed == result.outputs[0].text + "\n"
    refused(run("complete", model_dir.parent / "none", "hi"), "is not a directory")
    refused(run(*asked, "--threads", "0"), "threads is 0")


def test_doctor() -> None:
    done = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert {"python", "cores", "instruction sets", "memory", "torch", "ray", "native kernels"} <= set(findings)
    missing = [finding for finding in findings.values() if finding["status"] == "missing"]
    assert done.returncode == (1 if missing else 0)
    assert all(finding["remedy"] for finding in missing)


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek_ray.cli import machine

    def fail() -> list[machine.Finding]:
        raise OSError("odd machine")

    monkeypatch.setattr(machine, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(machine, "_memory", fail)
    findings = {finding.name: finding for finding in machine.examine()}
    assert findings["no-such-package"].status == "missing"
    assert "pip install" in findings["no-such-package"].remedy
    assert "odd machine" in findings["memory"].value


LONG_COMMAND = """
import time
from deepseek_ray.cli import main as cli

def app(arguments, prog_name):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("cleared away", flush=True)

cli.app = app
cli.main([])
"""


def test_a_terminated_command_clears_away_what_it_started() -> None:
    with subprocess.Popen([sys.executable, "-c", LONG_COMMAND], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "cleared away\n"
    assert process.returncode == 143
