"""Which matrices of a model get an adapter: names of the Hugging Face layout, matched as PEFT matches them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from deepseek_ray.config.finetune import ALL_LINEAR, LoraConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.nn.experts import Experts

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KINDS = ("attention", "dense MLP", "shared experts", "routed experts", "other")
_HEAD = "lm_head"
_MTP = "mtp."
_MOST_NAMED = 12


@dataclass(frozen=True)
class Matrix:
    """A weight that can have an adapter."""

    name: str
    """As in a checkpoint, without `.weight`; a routed expert's matrix has its expert's number in it."""
    size: int
    """Parameters."""
    module: str
    """The module that holds it: the linear layer itself, or the stack of a layer's routed experts."""
    projection: str = ""
    """Of a routed expert: gate_proj, up_proj or down_proj."""
    expert: int = -1
    """Its number."""

    @property
    def kind(self) -> str:
        for kind, part in (("attention", ".self_attn."), ("shared experts", ".shared_experts."),
                           ("routed experts", ".experts."), ("dense MLP", ".mlp.")):  # fmt: skip
            if part in self.name:
                return kind
        return "other"


def list_matrices(model: nn.Module) -> list[Matrix]:
    """Every linear layer and every routed expert's three matrices, in the model's order.

    Multi-token-prediction layers are left out: they only guess ahead, and other tools do not load them.
    """
    found: list[Matrix] = []
    for name, module in model.named_modules():
        if name.startswith(_MTP):
            continue
        if isinstance(module, Experts):
            found += _expert_matrices(name, module)
        elif isinstance(module, nn.Linear):
            found.append(Matrix(name, module.weight.numel(), name))
    return found


def choose_matrices(matrices: Sequence[Matrix], config: LoraConfig) -> list[Matrix]:
    """Those that `config.target_modules` names, in order. ConfigError for a target that matches none."""
    targets = config.target_modules
    if targets == ALL_LINEAR:
        return [matrix for matrix in matrices if not matrix.name.endswith(_HEAD)]
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(_matches(matrix.name, target, config) for matrix in matrices):
            raise _no_match(target, matrices)
    chosen = [targets] if isinstance(targets, str) else targets
    return [matrix for matrix in matrices if any(_matches(matrix.name, target, config) for target in chosen)]


def peft_targets(config: LoraConfig) -> str | list[str]:
    """`target_modules` as PEFT understands it, which knows no `*` in a list: then one regular expression.

    It lets an expert's number be absent, since PEFT asks about the experts of a layer together (`experts.down_proj`).
    """
    targets = config.target_modules
    if isinstance(targets, str):
        return targets
    if not any("*" in target for target in targets):
        return list(targets)
    escaped = [re.escape(target).replace(r"\.\*\.", r"\.(?:.*\.)?").replace(r"\*", ".*") for target in targets]
    ends = "|".join(escaped)
    return rf"(?:.*\.)?(?:{ends})"


@dataclass(frozen=True)
class Coverage:
    """What share of a model the adapters reach."""

    adapted: dict[str, int]
    """Parameters of the adapted matrices by kind."""
    matrices: dict[str, int]
    """Parameters of all matrices by kind."""
    trainable: int
    """Parameters of the adapters, the only ones that are trained."""
    total: int
    """Parameters of the model without adapters."""

    @classmethod
    def of(cls, all_matrices: Sequence[Matrix], chosen: Sequence[Matrix], trainable: int, total: int) -> Coverage:
        return cls(_by_kind(chosen), _by_kind(all_matrices), trainable, total)

    def describe(self) -> str:
        parts = [
            f"{kind} {100 * self.adapted.get(kind, 0) / self.matrices[kind]:.1f} %"
            for kind in KINDS
            if kind in self.matrices
        ]
        share = 100 * sum(self.adapted.values()) / self.total
        return (
            f"adapters reach {share:.1f} % of {self.total:,} parameters ({', '.join(parts)} of their matrices); "
            f"{self.trainable:,} trainable parameters ({100 * self.trainable / self.total:.2f} %)"
        )


def _by_kind(matrices: Sequence[Matrix]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for matrix in matrices:
        sizes[matrix.kind] = sizes.get(matrix.kind, 0) + matrix.size
    return sizes


def _expert_matrices(name: str, experts: Experts) -> Iterator[Matrix]:
    num_experts, hidden, width = experts.down.shape
    for expert in range(num_experts):
        for projection in EXPERT_PROJECTIONS:
            yield Matrix(f"{name}.{expert}.{projection}", hidden * width, name, projection, expert)


def _matches(name: str, target: str, config: LoraConfig) -> bool:
    if isinstance(config.target_modules, str):
        try:
            return re.fullmatch(target, name) is not None
        except re.error as error:
            raise ConfigError(
                f"target_modules is {target!r}, which is no regular expression ({error}); a single kind of matrix is a "
                "list with one name"
            ) from None
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _no_match(target: str, matrices: Sequence[Matrix]) -> ConfigError:
    ends = sorted({matrix.name.rpartition(".")[2] for matrix in matrices})
    near = difflib.get_close_matches(target.rpartition(".")[2], ends, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    example = next((matrix.name for matrix in matrices), "none")
    return ConfigError(
        f"target_modules names {target!r}, which matches no linear layer and no routed expert; {hint}"
        f"There are: {', '.join(ends[:_MOST_NAMED])}; a whole name looks like {example!r}"
    )
