"""The one place that chooses a strategy."""

from __future__ import annotations

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.training.parallel import Parallelism
from deepseek_ray.training.parallel_ddp import DataParallel
from deepseek_ray.training.parallel_expert import ExpertParallel
from deepseek_ray.training.parallel_pipeline import PipelineParallel
from deepseek_ray.training.parallel_tensor import TensorParallel
from deepseek_ray.training.ranks import Ranks

_STRATEGIES: dict[str, type[Parallelism]] = {
    "ddp": DataParallel,
    "tensor": TensorParallel,
    "expert": ExpertParallel,
    "pipeline": PipelineParallel,
}


def parallelism_for(config: PretrainConfig, world: Ranks) -> Parallelism:
    """The strategy of `config.distributed` on these workers. Raises ConfigError when they are too many or too few."""
    if world.world_size != config.num_workers:
        raise ConfigError(
            f"distributed asks for {config.num_workers} workers ({config.distributed.describe_mesh()}), but "
            f"{world.world_size} were started; start as many as the sizes multiply to, or change the sizes"
        )
    return _STRATEGIES[config.distributed.strategy](config, world)
