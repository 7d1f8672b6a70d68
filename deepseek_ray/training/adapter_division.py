"""Whether a strategy can spread the adapters of a model; decided on a model without weights, before anything starts."""

from __future__ import annotations

from deepseek_ray.config.distributed import DistributedConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.training.adapter_layers import LoraExperts
from deepseek_ray.training.pipeline_stage import stage_layers


def check_adapter_division(model: DeepSeekForCausalLM, distributed: DistributedConfig) -> None:
    """Raises ConfigError naming what does not fit. `model` is whole and has its adapters; its tensors are not read."""
    if distributed.strategy == "expert":
        _check_expert(model, distributed)
    if distributed.strategy == "pipeline":
        _check_pipeline(model, distributed)


def _check_expert(model: DeepSeekForCausalLM, distributed: DistributedConfig) -> None:
    """Workers have equal shares of the experts, and so of their adapters."""
    num_experts = model.config.n_routed_experts
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraExperts):
            continue
        for projection in layer.projections:
            if (reached := len(layer.adapters(projection).experts)) != num_experts:
                raise ConfigError(
                    f"lora.target_modules reaches {projection} of {reached} of the {num_experts} experts of {name}, "
                    f"but expert_parallel_size {distributed.expert_parallel_size} divides those of all experts only; "
                    f"name them all ('experts.*.{projection}'), or set distributed.strategy to fsdp"
                )


def _check_pipeline(model: DeepSeekForCausalLM, distributed: DistributedConfig) -> None:
    """A stage that trains nothing has nothing to go backward for."""
    for stage, layers in enumerate(stage_layers(model, distributed.pipeline_parallel_size)):
        own = [parameter for layer in layers for parameter in model.model.layers[layer].parameters()]
        if not any(parameter.requires_grad for parameter in own):
            raise ConfigError(
                f"lora.target_modules reaches nothing in layers {layers.start} to {layers.stop - 1}, which are stage "
                f"{stage} of pipeline_parallel_size {distributed.pipeline_parallel_size}; name matrices of every "
                "layer, such as o_proj, or set distributed.strategy to fsdp"
            )
