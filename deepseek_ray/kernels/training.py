"""The C++ operators of training, `cpp/training/`: float32 on the CPU, forward and backward, without autograd.

`nn/fused.py` makes differentiable functions of them. Built apart from the operators of serving, since these run in the
threads of torch's own operators (OpenMP), between which they stand.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_ray.kernels import build

logger = logging.getLogger(__name__)

_LONG, _POINTER, _INT, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_SIGNATURES = {
    "dt_experts": (*[_POINTER] * 4, *[_LONG] * 3, *[_POINTER] * 2, _INT),
    "dt_experts_backward": (*[_POINTER] * 4, *[_LONG] * 3, *[_POINTER] * 7, _INT),
    "dt_gather_slots": (*[_POINTER] * 3, *[_LONG] * 3, _POINTER, _INT),
    "dt_gather_slots_backward": (*[_POINTER] * 4, *[_LONG] * 3, *[_POINTER] * 2, _INT),
    "dt_rms_norm": (_POINTER, _LONG, _POINTER, _LONG, _LONG, _FLOAT, *[_POINTER] * 2, _INT),
    "dt_rms_norm_backward": (_POINTER, _LONG, *[_POINTER] * 3, *[_LONG] * 2, *[_POINTER] * 2, _INT),
    "dt_swiglu": (*[_POINTER] * 2, _LONG, _POINTER, _INT),
    "dt_swiglu_backward": (*[_POINTER] * 3, _LONG, *[_POINTER] * 2, _INT),
    "dt_attention": (*[_POINTER] * 7, _FLOAT, *[_POINTER] * 2, _INT),
    "dt_attention_backward": (*[_POINTER] * 7, _FLOAT, *[_POINTER] * 6, _INT),
    "dt_cross_entropy": (*[_POINTER] * 2, *[_LONG] * 2, *[_POINTER] * 2, _INT),
    "dt_cross_entropy_backward": (*[_POINTER] * 3, _FLOAT, *[_LONG] * 2, _POINTER, _INT),
}
_BLOCK_ROWS = 32
"""Rows of one partial sum of the gradient of a norm's weight, `kBlock` of `cpp/training/rows.cpp`."""


@functools.cache
def load_training_library() -> ctypes.CDLL | None:
    """None where it does not build or `DEEPSEEK_RAY_KERNELS=reference` is set: torch's operators serve."""
    if os.environ.get("DEEPSEEK_RAY_KERNELS") == "reference":
        return None
    try:
        library = build.library("training", build.SOURCES / "training", [*build.FLAGS, "-fopenmp"])
    except build.KernelBuildError as error:
        logger.warning("%s Training is slower on a CPU.", error)
        return None
    for name, takes in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = takes, None
    return library


def serves(*tensors: Tensor) -> bool:
    """Whether these operators compute with such tensors here and now."""
    return (
        all(
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            for tensor in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and load_training_library() is not None
    )


def call(name: str, *arguments: Tensor | float | None) -> None:
    """The operator of this name, as `cpp/training/` documents it; tensors are contiguous, None is a null pointer."""
    library = load_training_library()
    assert library is not None
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(library, name)(*values, torch.get_num_threads())


def run_experts(rows: Tensor, gate_up: Tensor, down: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """All experts of a layer, each over its own rows.

    rows: [N, H] in expert order; gate_up: [E, 2 I, H]; down: [E, H, I]; sizes: [E] int64. Returns [N, H], and the gate
    and up projections [N, 2 I] for the backward pass.
    """
    experts, hidden, width = down.shape
    projected, out = rows.new_empty(len(rows), 2 * width), torch.empty_like(rows)
    call("dt_experts", rows, gate_up, down, sizes, experts, hidden, width, projected, out)
    return out, projected


def run_experts_backward(
    rows: Tensor, gate_up: Tensor, down: Tensor, sizes: Tensor, projected: Tensor, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of rows, gate_up and down, as far as wanted, from that of the result [N, H]."""
    experts, hidden, width = down.shape
    work = (rows.new_empty(len(rows), width), torch.empty_like(projected))
    grads = tuple(
        torch.empty_like(own) if needed else None for own, needed in zip((rows, gate_up, down), wanted, strict=True)
    )
    given = (rows, gate_up, down, sizes, experts, hidden, width, projected, grad)
    call("dt_experts_backward", *given, *work, *grads)
    return grads


def gather_slots(rows: Tensor, places: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    """rows [T K, H], of which a token's are at places [T K] int64 -> their sum [T, H], weighed by weights [T, K]."""
    tokens, width = len(places) // slots, rows.shape[1]
    out = rows.new_empty(tokens, width)
    call("dt_gather_slots", rows, places, weights, tokens, slots, width, out)
    return out


def gather_slots_backward(rows: Tensor, places: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights of a weighted sum."""
    of_rows, of_weights = torch.empty_like(rows), torch.empty_like(weights)
    call("dt_gather_slots_backward", rows, places, weights, grad, *weights.shape, rows.shape[1], of_rows, of_weights)
    return of_rows, of_weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, width], rows of any stride -> the norm, contiguous, and what each row was multiplied by [rows]."""
    out, scales = x.new_empty(x.shape), x.new_empty(len(x))
    call("dt_rms_norm", x, x.stride(0), weight, *x.shape, eps, out, scales)
    return out, scales


def rms_norm_backward(x: Tensor, weight: Tensor, scales: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    rows, width = x.shape
    of_x, parts = x.new_empty(x.shape), x.new_empty(-(-rows // _BLOCK_ROWS), width)
    call("dt_rms_norm_backward", x, x.stride(0), weight, scales, grad, rows, width, of_x, parts)
    return of_x, parts.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    call("dt_swiglu", gate, up, gate.numel(), out)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    call("dt_swiglu_backward", gate, up, grad, gate.numel(), of_gate, of_up)
    return of_gate, of_up


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [rows, V], targets [rows] int64, negative where nothing is predicted -> losses and ln sum exp, [rows]."""
    losses, logs = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    call("dt_cross_entropy", logits, targets, *logits.shape, losses, logs)
    return losses, logs


def cross_entropy_backward(logits: Tensor, targets: Tensor, logs: Tensor, scale: float) -> Tensor:
    """Gradient of the logits where that of every loss is `scale`."""
    of_logits = torch.empty_like(logits)
    call("dt_cross_entropy_backward", logits, targets, logs, scale, *logits.shape, of_logits)
    return of_logits


class AttentionShape:
    """Sizes of `cpp/training/attention.cpp`, and the factor of the scores."""

    def __init__(self, queries: Tensor, cos: Tensor, value_width: int, interleaved: bool, scale: float) -> None:
        sequences, length, heads, width = queries.shape
        rope = 2 * cos.shape[-1]
        self.out = (sequences, length, heads, value_width)
        self.logs = (sequences, heads, length)
        self.k_rope = (sequences, heads, length, rope)
        """Of a head's own part of the gradient."""
        self.scale = scale
        given = (sequences, length, heads, width - rope, rope, value_width, len(cos) == 1, interleaved)
        self.sizes = torch.tensor(given, dtype=torch.int64)


def attention(inputs: Sequence[Tensor | None], shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Causal attention of (queries, expanded, k_rope, cos, sin, documents) -> [B, S, N, V], and ln sum exp(scores)
    [B, N, S]. documents: [B, S] int64, or None where each sequence is one."""
    out, logs = torch.empty(shape.out, dtype=torch.float32), torch.empty(shape.logs, dtype=torch.float32)
    call("dt_attention", *inputs, shape.sizes, shape.scale, out, logs)
    return out, logs


def attention_backward(
    inputs: Sequence[Tensor | None], shape: AttentionShape, out: Tensor, logs: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, expanded and k_rope."""
    queries, expanded, *_ = inputs
    assert queries is not None and expanded is not None
    of_queries, of_expanded = torch.empty_like(queries), torch.empty_like(expanded)
    of_k_rope = queries.new_empty(shape.k_rope)
    given: tuple[Tensor | float | None, ...] = (*inputs, shape.sizes, shape.scale, out, logs, grad)
    call("dt_attention_backward", *given, of_queries, of_expanded, of_k_rope)
    return of_queries, of_expanded, of_k_rope.sum(1)
