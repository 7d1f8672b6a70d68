"""Where the peers' environments are, and whether they are there."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(".cache/peers")


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return ROOT.absolute() / peer / "bin" / "python"


def is_there(peer: str) -> bool:
    """Says so when it is not."""
    if python_of(peer).exists():
        return True
    print(f"{peer} is not installed and is left out; python -m benchmarks.peers.setup {peer}")
    return False


def gguf_of(model_dir: Path) -> Path:
    """The model as llama.cpp reads it, converted at the first call."""
    path = model_dir.with_suffix(".gguf")
    if not path.exists():
        print(f"converting {model_dir} to {path} ...", flush=True)
        source = python_of("llama_cpp").parent.parent / "source"
        command = [python_of("llama_cpp"), "benchmarks/peers/llama_cpp_convert.py", source, model_dir, path]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return path
