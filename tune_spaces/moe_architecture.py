"""Genes of a DeepSeek mixture of experts: how many experts, how wide, how deep, how narrow the latents.

deepseek-ray tune configs/tiny.yaml --space tune_spaces.moe_architecture:space --architecture
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.tuning.space import Chooser, Sample, Space


def space(
    experts: Sequence[int] = (4, 8, 16),
    experts_per_token: Sequence[int] = (1, 2, 4),
    shared_experts: Sequence[int] = (0, 1, 2),
    hidden_sizes: Sequence[int] = (32, 48, 64, 96),
    expert_widths: Sequence[int] = (16, 32, 64),
    layers: Sequence[int] = (2, 3, 4),
    latent_ranks: Sequence[int] = (8, 16, 32),
    query_ranks: Sequence[int | None] = (None, 16, 32),
    heads: Sequence[int] = (2, 4),
) -> Space:
    """Every combination is proposed; those that are no valid model or over a budget are refused before they train.

    The defaults suit `configs/tiny.yaml`; give larger lists for larger runs. The dense layers' MLP is as wide as the
    experts that a token uses together, so that every layer costs about the same.
    """

    def sample(trial: Chooser, config: PretrainConfig) -> Sample:
        per_token = trial.suggest_categorical("model.num_experts_per_tok", list(experts_per_token))
        shared = trial.suggest_categorical("model.n_shared_experts", list(shared_experts))
        width = trial.suggest_categorical("model.moe_intermediate_size", list(expert_widths))
        return {
            "model.n_routed_experts": trial.suggest_categorical("model.n_routed_experts", list(experts)),
            "model.num_experts_per_tok": per_token,
            "model.n_shared_experts": shared,
            "model.moe_intermediate_size": width,
            "model.intermediate_size": (per_token + shared) * width,
            "model.hidden_size": trial.suggest_categorical("model.hidden_size", list(hidden_sizes)),
            "model.num_hidden_layers": trial.suggest_categorical("model.num_hidden_layers", list(layers)),
            "model.kv_lora_rank": trial.suggest_categorical("model.kv_lora_rank", list(latent_ranks)),
            "model.q_lora_rank": trial.suggest_categorical("model.q_lora_rank", list(query_ranks)),
            "model.num_attention_heads": trial.suggest_categorical("model.num_attention_heads", list(heads)),
        }

    return sample
