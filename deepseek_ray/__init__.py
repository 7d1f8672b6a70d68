"""deepseek_ray: train, search and serve DeepSeek-style mixture-of-experts models on Ray.

Public names load on first use (PEP 562): importing the package costs milliseconds and pulls in neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "DistributedConfig": "deepseek_ray.config.run",
    "LLM": "deepseek_ray.llm",
    "RequestOutput": "deepseek_ray.llm",
    "SamplingParams": "deepseek_ray.messages",
    "StructuredOutputsParams": "deepseek_ray.messages",
}

if TYPE_CHECKING:
    from deepseek_ray.config.run import DistributedConfig
    from deepseek_ray.llm import LLM, RequestOutput
    from deepseek_ray.messages import SamplingParams, StructuredOutputsParams

__all__ = ["LLM", "DistributedConfig", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'deepseek_ray' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
