"""Whether a model can be divided among workers as the section `distributed:` asks; decided before anything starts."""

from __future__ import annotations

from collections.abc import Callable

from deepseek_ray.config.distributed import DistributedConfig
from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import ConfigError


def check_division(model: ModelConfig, distributed: DistributedConfig, accumulation_steps: int) -> None:
    """Raises ConfigError naming the first size that does not fit.

    accumulation_steps: micro-batches of one worker per optimiser step.
    """
    if check := _CHECKS.get(distributed.strategy):
        check(model, distributed, accumulation_steps)


def _check_tensor(model: ModelConfig, distributed: DistributedConfig, accumulation_steps: int) -> None:
    size = distributed.tensor_parallel_size
    divided = {"num_attention_heads": model.num_attention_heads}
    if any(not model.is_moe_layer(layer) for layer in range(model.num_hidden_layers)):
        divided["intermediate_size"] = model.intermediate_size
    if model.moe_layers or model.num_nextn_predict_layers:
        divided["moe_intermediate_size"] = model.moe_intermediate_size
    for name, value in divided.items():
        if value % size:
            raise ConfigError(
                f"distributed.tensor_parallel_size is {size}, which does not divide model.{name} {value}; "
                f"choose a divisor of {value}"
            )


def _check_expert(model: ModelConfig, distributed: DistributedConfig, accumulation_steps: int) -> None:
    size, experts = distributed.expert_parallel_size, model.n_routed_experts
    if experts % size:
        raise ConfigError(
            f"distributed.expert_parallel_size is {size}, which does not divide model.n_routed_experts {experts}; "
            f"choose a divisor of {experts}"
        )


def _check_pipeline(model: ModelConfig, distributed: DistributedConfig, accumulation_steps: int) -> None:
    stages, layers = distributed.pipeline_parallel_size, model.num_hidden_layers
    if stages > layers:
        raise ConfigError(
            f"distributed.pipeline_parallel_size is {stages}, above model.num_hidden_layers {layers}: every stage "
            f"needs a layer; choose at most {layers}"
        )
    if distributed.pipeline_schedule == "1f1b" and accumulation_steps < stages:
        raise ConfigError(
            f"distributed.pipeline_schedule 1f1b needs at least as many micro-batches per step as stages, {stages}, "
            f"but there are {accumulation_steps}; lower training.micro_batch_size, raise training.global_batch_size, "
            "or set pipeline_schedule to gpipe"
        )


_CHECKS: dict[str, Callable[[ModelConfig, DistributedConfig, int], None]] = {
    "tensor": _check_tensor,
    "expert": _check_expert,
    "pipeline": _check_pipeline,
}
