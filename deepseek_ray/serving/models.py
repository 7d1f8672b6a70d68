"""`/v1/models`: what is served here, and which of it a request names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from deepseek_ray.errors import ModelNotFoundError
from deepseek_ray.serving.replies import ModelCard, ModelList

T = TypeVar("T")


class NamedModel(Protocol):
    """What a model card tells."""

    @property
    def served_model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def created(self) -> int: ...


def model_card(model: NamedModel) -> ModelCard:
    return ModelCard(id=model.served_model_name, created=model.created, max_model_len=model.max_model_len)


def model_list(models: Iterable[NamedModel]) -> ModelList:
    return ModelList(data=[model_card(model) for model in models])


def find_model(name: str, served: Mapping[str, T]) -> T:
    """What is served under `name`; ModelNotFoundError says what there is instead."""
    if name not in served:
        known = ", ".join(map(repr, served))
        raise ModelNotFoundError(f"the model {name[:200]!r} is not served here; this server has {known}", param="model")
    return served[name]
