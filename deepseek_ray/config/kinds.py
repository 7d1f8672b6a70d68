"""The kinds of configuration files there are, by the name that `deepseek-ray config --kind` takes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """`path` is `module:class`, imported when it is asked for."""

    path: str
    title: str
    used_by: str
    """Where such a file or such values are given, as a line of Markdown."""

    @property
    def config_class(self) -> type[FrozenConfig]:
        module, _, name = self.path.partition(":")
        found = getattr(import_module(module), name)
        assert isinstance(found, type) and issubclass(found, FrozenConfig)
        return found


KINDS = {
    "pretrain": Kind(
        "deepseek_ray.config.run:PretrainConfig",
        "Training runs",
        "`python jobs/pretrain.py --config FILE`, `deepseek-ray quickstart`",
    ),
    "finetune": Kind(
        "deepseek_ray.config.finetune:FinetuneConfig",
        "Fine-tuning runs",
        "`python jobs/finetune.py --config FILE`",
    ),
    "deployment": Kind(
        "deepseek_ray.config.engine:DeploymentConfig",
        "Served models",
        "the options of `deepseek-ray serve`",
    ),
    "serving": Kind(
        "deepseek_ray.config.serving:ServingConfig",
        "Serve applications",
        "`args` of an application of `serve_apps.openai:app`",
    ),
    "embeddings": Kind(
        "deepseek_ray.config.serving:EmbeddingsConfig",
        "Embeddings",
        "`args` of an application of `serve_apps.embeddings:app`",
    ),
}


def find_kind(name: str) -> Kind:
    """ConfigError lists the kinds there are."""
    if name not in KINDS:
        raise ConfigError(f"--kind is {name!r}; there are: {', '.join(KINDS)}")
    return KINDS[name]
