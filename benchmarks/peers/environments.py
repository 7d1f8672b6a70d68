"""Where the peers' environments are, and whether they are there."""

from __future__ import annotations

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
