"""The operators of the inference path, as an interface with three implementations.

Two of them, `native.py` and `reference.py`, are row-invariant: the bits of a row of the result depend on that row's
inputs alone, never on the other rows, their number, or the number of threads. That is what makes a failover or another
batch leave the output unchanged. `fast.py` is not, and serves where `deterministic` is off.

Letters: T tokens (rows), H heads, N output features, K input features, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.kernels.quantize import Quantization

ScoreKind = Literal["sigmoid", "softmax"]


class PackedWeight:
    """Weights of `groups` linear layers of one shape `[N, K]`, in the layout one implementation wants.

    With `scales` the data are integers, see `kernels/quantize.py`.
    """

    def __init__(self, data: Tensor, groups: int, num_out: int, num_in: int, scales: Tensor | None = None) -> None:
        self.data = data
        self.groups = groups
        self.num_out = num_out
        self.num_in = num_in
        self.scales = scales
        self.reference: Any = None
        """What an implementation remembers of where it is."""

    @property
    def parts(self) -> list[Tensor]:
        """Everything it holds."""
        return [self.data] if self.scales is None else [self.data, self.scales]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> PackedWeight:
        data, *scales = (part.to(device) for part in self.parts)
        return PackedWeight(data, self.groups, self.num_out, self.num_in, *scales)


class Rotation(NamedTuple):
    """Of each token, by rotary position embedding."""

    cos: Tensor
    """[T, P / 2] float32."""
    sin: Tensor
    interleaved: bool
    """Pairs are neighbours, not halves."""


class Step(NamedTuple):
    """Where the tokens of a step are, see `nn/paged.PagedBatch`."""

    rotation: Rotation
    slots: Tensor
    """[T] int64: where their latents go."""
    positions: Tensor
    """[T] int64."""
    sequence_rows: Tensor
    """[T] int32, rows of the block tables."""
    block_tables: Tensor
    """[S, max_blocks] int32."""
    block_size: int


class AttentionWeights(NamedTuple):
    """Of a layer's absorbed MLA and of the norms before and after it; norms and biases are float32."""

    input_norm: Tensor
    q_a: PackedWeight | None
    """None: `q` takes the hidden state itself."""
    q_a_bias: Tensor | None
    q_norm: Tensor | None
    q: PackedWeight
    kv_a: PackedWeight
    kv_a_bias: Tensor | None
    kv_norm: Tensor
    w_uk: PackedWeight
    """One group [R, N] per head."""
    w_uv: PackedWeight
    o: PackedWeight
    o_bias: Tensor | None
    post_norm: Tensor
    eps: float
    latent_eps: float
    softmax_scale: float


class MoeWeights(NamedTuple):
    """Of a mixture of experts, all but the routed ones."""

    gate: PackedWeight
    """float32."""
    kind: ScoreKind
    bias: Tensor | None
    choice: Choice
    shared: tuple[PackedWeight, PackedWeight] | None
    """`gate_up` and `down` of the shared experts, if there are any."""


AttentionOperator = Callable[[Tensor, Step, Tensor], tuple[Tensor, Tensor]]
"""(hidden [T, H], step, latents [slots, R + P]) -> the hidden state after attention, and its norm, both [T, H]. The
latents of the step's tokens are written first."""
MoeOperator = Callable[[Tensor, Tensor, Any], Tensor | None]
"""(hidden [T, H], its norm, an `expert_table`) -> hidden + what all experts make of the norm; None: one is not here."""


class Place(NamedTuple):
    """Of an output: what decides its next token, beside the logits."""

    temperature: float
    seed: int
    position: int


class Choice(NamedTuple):
    """How a gate chooses; see `nn/gate.py`."""

    top_k: int
    num_groups: int
    best_groups: int
    """0: groups do not matter."""
    two_best: bool
    """A group is as good as its two best experts together, not as its best one."""
    is_normalised: bool
    factor: float


class ExpertWeights(Protocol):
    """One expert: `models/packed_files.PackedExpert`."""

    @property
    def gate_up(self) -> PackedWeight: ...

    @property
    def down(self) -> PackedWeight: ...


class Kernels(ABC):
    """What the paged decoder and the expert shards compute with."""

    name: str
    layout: str | None = None
    """Name of the layout of packed weights, the same for the same bytes; None keeps them out of files."""
    is_capturable: bool = False
    """Whether a step of them can be captured as a CUDA graph: nothing in it waits for the device."""

    def computing(self) -> AbstractContextManager[None]:
        """Around a step of operators, of these and of torch, in this thread."""
        return nullcontext()

    @abstractmethod
    def pack(self, weights: Sequence[Tensor], quantization: Quantization | None = None) -> PackedWeight:
        """Weights, each `[N, K]` in float32 or bfloat16 and of one shape, into this implementation's layout.

        With `quantization` as integers with scales; inputs are rounded, too, where that is fast. See
        `kernels/quantize.py`.
        """

    @abstractmethod
    def linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        """`x [T, K] @ weight.T -> [T, N]`, accumulated in float32; `weight` has one group."""

    @abstractmethod
    def per_head_linear(self, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        """`x [T, H, K]`, one group of `weight` per head `-> [T, H, N]`."""

    @abstractmethod
    def grouped_linear(self, x: Tensor, weights: Sequence[PackedWeight], rows: Sequence[int]) -> Tensor:
        """Rows sorted by weight: the first `rows[0]` of `x [T, K]` meet `weights[0]`, and so on `-> [T, N]`.

        Each weight has one group; all have one shape, and there is at least one.
        """

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x [T, K]`, `weight [K]` float32 `-> [T, K]` in x's dtype; statistics in float32."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2N] -> [T, N]`: `silu(first half) * second half`."""

    def mlp(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
        """`linear(silu_mul(linear(x, gate_up)), down)`."""
        return self.linear(self.silu_mul(self.linear(x, gate_up)), down)

    def mlp_aside(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Callable[[], Tensor] | None:
        """`mlp` begun in the time that the cores have left; the result does the rest of it. x [T, K] has rows. None:
        these kernels do not know how."""
        return None

    @abstractmethod
    def scores(self, logits: Tensor, kind: ScoreKind) -> Tensor:
        """Gate scores of float32 `logits [T, E] -> [T, E]`."""

    def draw(self, logits: NDArray[np.float32], rows: Sequence[int], places: Sequence[Place]) -> list[int] | None:
        """For each of `rows` of logits [n, V] the token that its place draws from softmax(row / temperature): the one
        at `engine/philox.uniform(seed, position)` in id order; at temperature 0 the most likely one, the lowest id
        among equals. -1 where a logit is not finite. None: these kernels have no faster way than numpy's."""
        return None

    def attention(self, weights: AttentionWeights) -> AttentionOperator | None:
        """All of a layer up to its feed-forward network, made once; None: it is to be composed of the operators here,
        which give the same bits."""
        return None

    def moe(self, weights: MoeWeights) -> MoeOperator | None:
        """The rest of a layer whose routed experts are all in this process, made once; None: to be composed, too."""
        return None

    def route(
        self, x: Tensor, gate: PackedWeight, kind: ScoreKind, bias: Tensor | None, choice: Choice
    ) -> tuple[Tensor, Tensor] | None:
        """`choose_experts` of the scores of x [T, K]; None: it is to be composed, too."""
        return None

    def write_latents(
        self, kv: Tensor, norm: Tensor, eps: float, rotation: Rotation, slots: Tensor, latents: Tensor
    ) -> bool:
        """`latents[slots]` = (RMSNorm of the first R, rotation of the last P) of kv [T, R + P]. False: it is to be done
        with torch's operators, which give the same bits; so it is with None of the three below."""
        return False

    def turn_query(self, absorbed: Tensor, query: Tensor, rotation: Rotation) -> Tensor | None:
        """(absorbed [T, H, R], rotation of the last P of query [T, H, N + P]) `-> [T, H, R + P]`, of one dtype."""
        return None

    def choose_experts(self, scores: Tensor, bias: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor] | None:
        """Ids [T, K] int64 and weights [T, K] float32 of each token's experts from scores [T, E] float32."""
        return None

    def combine_slots(self, rows: Tensor, weights: Tensor, more: Sequence[Tensor] = ()) -> Tensor | None:
        """rows [T, K, H] weighed by weights [T, K] float32 and summed in slot order, in float32, rounded once. Then
        each of `more` [T, H] is added, and each sum rounded."""
        return None

    def expert_table(self, experts: Mapping[int, ExpertWeights], num_experts: int) -> Any | None:
        """What `run_experts` wants to know of those of a layer that are here, without keeping any of them alive; None:
        there is no such operator."""
        return None

    def run_experts(self, table: Any, hidden: Tensor, token_rows: Tensor, ids: Tensor) -> Tensor | None:
        """Pair p is row `token_rows[p]` of hidden [T, H] and expert `ids[p]` `-> [P, H]`; None: one is not here."""
        raise NotImplementedError(f"{self.name} has no expert tables")

    @abstractmethod
    def latent_attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        sequence_rows: Tensor,
        positions: Tensor,
        block_size: int,
        value_width: int,
        scale: float,
    ) -> Tensor:
        """Absorbed MLA: every head attends to the same latents of positions `0..positions[t]`.

        query [T, H, width] and cache [slots, width] of one dtype; block_tables [S, max_blocks] int32; sequence_rows [T]
        int32; positions [T] int64 `-> [T, H, value_width]` of that dtype, values being the first `value_width` of each
        latent. Sums are in float32; weights of positions may be rounded to the dtype.
        """
