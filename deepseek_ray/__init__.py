"""deepseek_ray: train, search and serve DeepSeek-style mixture-of-experts models on Ray.

Public names load on first use (PEP 562): importing the package costs milliseconds and pulls in neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "DistributedConfig": "deepseek_ray.config.run",
    "DynamicBatchScheduler": "deepseek_ray.serving.batching",
    "LLM": "deepseek_ray.llm",
    "LoraConfig": "deepseek_ray.config.finetune",
    "RequestOutput": "deepseek_ray.llm",
    "get_peft_model": "deepseek_ray.training.lora",
    "SamplingParams": "deepseek_ray.messages",
    "SearchResult": "deepseek_ray.tuning.result",
    "StructuredOutputsParams": "deepseek_ray.messages",
    "search_architecture": "deepseek_ray.tuning.search",
    "search_hyperparameters": "deepseek_ray.tuning.search",
}

if TYPE_CHECKING:
    from deepseek_ray.config.finetune import LoraConfig
    from deepseek_ray.config.run import DistributedConfig
    from deepseek_ray.llm import LLM, RequestOutput
    from deepseek_ray.messages import SamplingParams, StructuredOutputsParams
    from deepseek_ray.serving.batching import DynamicBatchScheduler
    from deepseek_ray.training.lora import get_peft_model
    from deepseek_ray.tuning.result import SearchResult
    from deepseek_ray.tuning.search import search_architecture, search_hyperparameters

__all__ = [
    "LLM",
    "DistributedConfig",
    "DynamicBatchScheduler",
    "LoraConfig",
    "RequestOutput",
    "SamplingParams",
    "SearchResult",
    "StructuredOutputsParams",
    "__version__",
    "get_peft_model",
    "search_architecture",
    "search_hyperparameters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'deepseek_ray' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
