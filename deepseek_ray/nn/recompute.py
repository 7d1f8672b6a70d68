"""Activation checkpointing: keep a layer's input only, compute the layer again in the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint

_state = threading.local()


def is_recomputing() -> bool:
    """Whether this forward repeats one that was already counted, for the sake of its activations."""
    return getattr(_state, "recomputing", False)


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, whose activations are dropped and computed again when gradients need them."""
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _recomputing()))


@contextmanager
def _recomputing() -> Iterator[None]:
    _state.recomputing = True
    try:
        yield
    finally:
        _state.recomputing = False
