"""The one place that chooses a strategy."""

from __future__ import annotations

import importlib.util

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.training.parallel import Parallelism
from deepseek_ray.training.parallel_ddp import DataParallel
from deepseek_ray.training.parallel_deepspeed import DeepSpeedZero
from deepseek_ray.training.parallel_expert import ExpertParallel
from deepseek_ray.training.parallel_fsdp import FullySharded
from deepseek_ray.training.parallel_pipeline import PipelineParallel
from deepseek_ray.training.parallel_tensor import TensorParallel
from deepseek_ray.training.ranks import Ranks

_STRATEGIES: dict[str, type[Parallelism]] = {
    "ddp": DataParallel,
    "fsdp": FullySharded,
    "deepspeed": DeepSpeedZero,
    "tensor": TensorParallel,
    "expert": ExpertParallel,
    "pipeline": PipelineParallel,
}


def require_backend(config: PretrainConfig) -> None:
    """Raise ConfigError when the strategy needs a package that is not installed."""
    if config.distributed.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "distributed.strategy is 'deepspeed', but the package deepspeed is not installed; "
            "pip install 'deepseek-ray[deepspeed]', or set the strategy to fsdp, which shares out the same"
        )


def parallelism_for(config: PretrainConfig, world: Ranks) -> Parallelism:
    """The strategy of `config.distributed` on these workers. Raises ConfigError when they are too many or too few."""
    if world.world_size != config.num_workers:
        raise ConfigError(
            f"distributed asks for {config.num_workers} workers ({config.distributed.describe_mesh()}), but "
            f"{world.world_size} were started; start as many as the sizes multiply to, or change the sizes"
        )
    require_backend(config)
    return _STRATEGIES[config.distributed.strategy](config, world)
