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


def gguf_of(model_dir: Path, quantization: str = "") -> Path:
    """The model as llama.cpp reads it, converted at the first call; `quantization` is llama.cpp's name of one."""
    path = model_dir.with_suffix(f".{quantization}.gguf" if quantization else ".gguf")
    if not path.exists():
        if quantization:
            command = ["llama_cpp_quantize.py", gguf_of(model_dir), quantization, path]
        else:
            command = ["llama_cpp_convert.py", python_of("llama_cpp").parent.parent / "source", model_dir, path]
        print(f"converting {model_dir} to {path} ...", flush=True)
        script, *arguments = map(str, command)
        subprocess.run(
            [str(python_of("llama_cpp")), f"benchmarks/peers/{script}", *arguments], check=True, capture_output=True
        )
    return path
