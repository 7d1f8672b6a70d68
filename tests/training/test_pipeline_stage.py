"""Which layers and tensors each stage of a pipeline has."""

from __future__ import annotations

import pytest
import torch
from training_runs import small_config

from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.training.pipeline_stage import keep_stage, split_layers, stage_layers


@pytest.mark.parametrize(
    ("sizes", "first", "last", "stages", "ends"),
    [
        ([1, 1, 1, 1], 0, 0, 2, [2, 4]),
        ([1, 1, 1, 1], 0, 2, 2, [3, 4]),  # 3 and 1 + 2
        ([1, 1, 1, 1], 9, 0, 2, [1, 4]),  # the first stage has more than enough with one layer
        ([5, 1, 1, 1, 1, 1], 0, 0, 2, [1, 6]),
        ([3, 3, 3], 0, 0, 3, [1, 2, 3]),
        ([7], 1, 1, 1, [1]),
    ],
)
def test_the_largest_stage_is_as_small_as_can_be(
    sizes: list[int], first: int, last: int, stages: int, ends: list[int]
) -> None:
    layers = split_layers(sizes, first, last, stages)
    assert [part.stop for part in layers] == ends
    assert [index for part in layers for index in part] == list(range(len(sizes)))


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 0}, {"tie_word_embeddings": True}])
def test_stages_have_all_tensors_and_share_only_the_embedding(changes: dict[str, object]) -> None:
    config = small_config(model={"num_hidden_layers": 5, **changes}).model
    expected = DeepSeekForCausalLM(config).state_dict()
    found: dict[str, torch.Size] = {}
    shared = set()
    for stage in range(3):
        model = DeepSeekForCausalLM(config)
        keep_stage(model, stage_layers(model, 3)[stage])
        own = {name: value.shape for name, value in model.state_dict().items()}
        shared |= own.keys() & found.keys()
        found |= own
    assert found == {name: value.shape for name, value in expected.items()}
    needs_copy = config.tie_word_embeddings or config.num_nextn_predict_layers
    assert shared == ({"model.embed_tokens.weight"} if needs_copy else set())
