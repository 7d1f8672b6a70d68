"""`/v1/models`: what is served here."""

from __future__ import annotations

from deepseek_ray.serving.backend import ServedModel
from deepseek_ray.serving.replies import ModelCard, ModelList


def model_card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.served_model_name, created=model.created, max_model_len=model.max_model_len)


def model_list(model: ServedModel) -> ModelList:
    return ModelList(data=[model_card(model)])
