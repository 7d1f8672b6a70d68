"""Logits against transformers' DeepseekV2ForCausalLM and DeepseekV3ForCausalLM, float32, in both directions.

Every configuration is written and read by both: ours is loaded by transformers, what transformers saves is loaded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, write_random_checkpoint
from transformers import AutoModelForCausalLM

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.models.load import load_model, save_model

TOLERANCE = 1e-4

V2 = {
    "model_type": "deepseek_v2",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "n_shared_experts": 2,
}
V2_GROUPS = {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3}


def yarn(**changes: Any) -> dict[str, Any]:
    values = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
    return {"rope_scaling": {**values, **changes}, "max_position_embeddings": 64}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "v2_lite": V2,
    "v2_lite_yarn_mscale": {**V2, **yarn(mscale=0.707, mscale_all_dim=0.707)},
    "v2_lora_bias_scaled": {**V2, "q_lora_rank": 24, "attention_bias": True, "routed_scaling_factor": 4.0},
    "v2_no_shared_all_moe": {**V2, "n_shared_experts": 0, "first_k_dense_replace": 0},
    "v2_groups": V2_GROUPS,
    "v2_groups_lora_tied_yarn": {**V2_GROUPS, "q_lora_rank": 24, "tie_word_embeddings": True, **yarn(mscale=1.0)},
    "v2_norm_topk_flag": {**V2, "norm_topk_prob": True},
    "v3": V3,
    "v3_yarn_mscale": {**V3, **yarn(mscale=1.0, mscale_all_dim=1.0)},
    "v3_yarn_plain": {**V3, **yarn()},
    "v3_yarn_two_mscales": {**V3, **yarn(mscale=0.8, mscale_all_dim=0.5, factor=40.0)},
    "v3_yarn_attention_factor": {**V3, **yarn(attention_factor=1.3, truncate=False)},
    "v3_no_lora_halves": {**V3, "q_lora_rank": None, "rope_interleave": False},
    "v3_unnormalised": {**V3, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "v3_one_group": {**V3, "n_group": 1, "topk_group": 1},
    "v3_bias_tied_two_shared": {**V3, "attention_bias": True, "tie_word_embeddings": True, "n_shared_experts": 2},
    "v3_no_shared_no_dense": {**V3, "n_shared_experts": 0, "first_k_dense_replace": 0},
    "v3_all_dense": {**V3, "first_k_dense_replace": 3},
    "v3_eps_theta": {**V3, "rms_norm_eps": 1e-3, "rope_theta": 50000.0, "first_k_dense_replace": 2},
}


def inputs(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def theirs(directory: Path, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, model(ids).logits


@torch.no_grad()
def ours(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    return load_model(directory).eval()(ids).logits


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_equal_transformers_both_ways(name: str, tmp_path: Path, record_property: Any) -> None:
    config = tiny_config(**CONFIGURATIONS[name])
    ids = inputs(config)
    written = write_random_checkpoint(tmp_path / "random", config, seed=len(name))
    save_model(load_model(written), tmp_path / "ours")

    model, their_logits = theirs(tmp_path / "ours", ids)
    they_load_ours = (their_logits - ours(tmp_path / "ours", ids)).abs().max().item()
    model.save_pretrained(tmp_path / "theirs")
    we_load_theirs = (their_logits - ours(tmp_path / "theirs", ids)).abs().max().item()

    print(f"parity {name}: they load ours {they_load_ours:.1e}, we load theirs {we_load_theirs:.1e}")
    record_property("they_load_ours", they_load_ours)
    record_property("we_load_theirs", we_load_theirs)
    assert their_logits.std() > 0.1, "logits so small that a difference would not show"
    assert they_load_ours <= TOLERANCE
    assert we_load_theirs <= TOLERANCE


def test_random_biases_change_the_choice_and_are_negative_somewhere(tmp_path: Path) -> None:
    """The parity of V3's gate would mean little if the correction bias never decided anything."""
    config = tiny_config(**V3)
    model = load_model(write_random_checkpoint(tmp_path, config))
    ids = inputs(config)
    biases = [layer.correction_bias for layer in model.moe_modules]
    assert any((bias < 0).any() for bias in biases if bias is not None)
    before = model(ids).gates[0].expert_ids
    for bias in biases:
        assert bias is not None
        bias.zero_()
    assert not torch.equal(before, model(ids).gates[0].expert_ids)
