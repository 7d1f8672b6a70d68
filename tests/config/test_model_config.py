"""ModelConfig: what is read, what is written, what is refused and how that is said."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config
from pydantic import ValidationError

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.models.shapes import parameter_shapes

# The public config.json files, but for keys that say nothing about the model.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "n_group": 8,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "use_cache": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "vocab_size": 102400,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "n_group": 1,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}


def test_v3_has_the_published_size_and_scale() -> None:
    config = ModelConfig.from_hf(V3)
    assert round(config.num_parameters / 1e9) == 671
    assert 37 < config.num_active_parameters / 1e9 < 38
    assert config.latent_width == 576
    assert config.softmax_scale == pytest.approx(0.135234, abs=1e-6)  # 192^-0.5 * (0.1 ln 40 + 1)^2
    assert config.rope_scaling is not None
    assert config.rope_scaling.cos_sin_multiplier == 1.0
    assert config.moe_layers == tuple(range(3, 61))
    assert config.is_moe_layer(61), "the multi-token-prediction layer has experts"
    assert config.quantization_config is not None


def test_v2_lite_has_the_published_size_and_scale() -> None:
    config = ModelConfig.from_hf(V2_LITE)
    assert config.num_parameters / 1e9 == pytest.approx(15.7, abs=0.05)
    assert config.softmax_scale == pytest.approx(0.114721, abs=1e-6)
    assert (config.q_lora_rank, config.rope_interleave) == (None, True)


def test_parameter_count_equals_the_sum_over_the_checkpoint() -> None:
    for changes in (
        {},
        {"tie_word_embeddings": True, "attention_bias": True},
        {"q_lora_rank": None, "moe_layer_freq": 2},
    ):
        config = tiny_config(**changes)
        assert config.num_parameters == sum(math.prod(shape) for shape in parameter_shapes(config).values())


def test_written_config_is_read_back_equal_and_serves_other_readers() -> None:
    for values in (V3, V2_LITE):
        config = ModelConfig.from_hf(values).model_copy(update={"quantization_config": None})
        written = json.loads(json.dumps(config.to_hf()))
        assert ModelConfig.from_hf(written) == config
        assert {
            "topk_method",
            "scoring_func",
            "moe_layer_freq",
            "architectures",
            "num_key_value_heads",
        } <= written.keys()
        assert written["rope_scaling"]["type"] == "yarn"
        assert "auto_map" not in written


def test_both_dialects_of_rotary_settings_mean_the_same() -> None:
    scaling = {key: value for key, value in V3["rope_scaling"].items() if key != "type"}
    new = {key: value for key, value in V3.items() if key not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 10000.0}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(V3)
    plain = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
    assert ModelConfig.from_hf(plain).rope_scaling is None
    assert ModelConfig.from_hf(plain).rope_theta == 50000.0


def test_left_out_keys_mean_what_transformers_means(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    needed = {key: V3[key] for key in V3 if key in _SIZES}
    config = ModelConfig.from_hf({"model_type": "deepseek_v3", **needed})
    oracle = DeepseekV3Config(**needed)
    for key in ("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace", "n_shared_experts"):
        assert getattr(config, key) == getattr(oracle, key), key
    for key in ("norm_topk_prob", "rms_norm_eps", "max_position_embeddings", "q_lora_rank", "rope_interleave"):
        assert getattr(config, key) == getattr(oracle, key), key


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_rope_head_dim"),
    *("qk_nope_head_dim", "v_head_dim"),
)

REFUSED = {
    "remote code": ({"auto_map": {"AutoConfig": "configuration_deepseek.Config"}}, ["auto_map", "remove", "code"]),
    "architecture": ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "DeepseekV3ForCausalLM"]),
    "model type": ({"model_type": "deepseek_v32", "architectures": None}, ["deepseek_v32", "deepseek_v3"]),
    "types disagree": ({"model_type": "deepseek_v2"}, ["deepseek_v2", "DeepseekV3ForCausalLM"]),
    "top-k": ({"num_experts_per_tok": 129}, ["num_experts_per_tok is 129", "128", "topk_group"]),
    "groups": ({"n_group": 7}, ["n_routed_experts is 256", "n_group 7"]),
    "kept groups": ({"topk_group": 9}, ["topk_group is 9", "n_group 8"]),
    "lonely experts": ({"n_group": 256, "topk_group": 256}, ["n_group is 256", "at least 2"]),
    "odd rope": ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim is 63", "even"]),
    "dense layers": ({"first_k_dense_replace": 62}, ["first_k_dense_replace is 62", "61"]),
    "negative": ({"hidden_size": -1}, ["hidden_size is -1", "greater than"]),
    "absurd": ({"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "512"]),
    "not a number": ({"vocab_size": "many"}, ["vocab_size is 'many'"]),
    "nan": ({"rms_norm_eps": math.nan}, ["rms_norm_eps"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias"]),
    "grouped keys": ({"num_key_value_heads": 8}, ["num_key_value_heads is 8", "128"]),
    "gate": ({"scoring_func": "softmax"}, ["scoring_func 'softmax'", "sigmoid with noaux_tc"]),
    "rope type": ({"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear'", "yarn"]),
    "rope shape": ({"rope_scaling": "yarn"}, ["rope_scaling is 'yarn'"]),
    "yarn factor": ({"rope_scaling": {**V3["rope_scaling"], "factor": 0.5}}, ["factor is 0.5"]),
    "quantisation": ({"quantization_config": {"quant_method": "awq"}}, ["'awq'", "fp8"]),
    "block size": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, ["[0, 128]"]),
    "padding": ({"pad_token_id": 129280}, ["pad_token_id is 129280", "129279"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_value_limit_and_place(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf({**V3, **changes}, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    for word in words:
        assert word in str(caught.value)


def test_v2_refusals() -> None:
    with pytest.raises(ConfigError, match=r"num_experts_per_tok is 65.*64 experts"):
        ModelConfig.from_hf({**V2_LITE, "num_experts_per_tok": 65})
    with pytest.raises(ConfigError, match=r"hidden_size is 2047.*num_attention_heads 16"):
        ModelConfig.from_hf({**V2_LITE, "hidden_size": 2047})
    with pytest.raises(ConfigError, match="rope_interleave"):
        ModelConfig.from_hf({**V2_LITE, "rope_interleave": False})
    with pytest.raises(ConfigError, match="'noaux_tc' is not a gate of deepseek_v2"):
        ModelConfig.from_hf({**V2_LITE, "topk_method": "noaux_tc"})


def test_missing_size_is_named_without_printing_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf({key: value for key, value in V3.items() if key != "hidden_size"})
    assert "hidden_size is missing" in str(caught.value)
    assert "moe_intermediate_size" not in str(caught.value)


def test_unknown_keys_are_warned_about_and_known_harmless_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_hf(V3)
        assert not caplog.records
        ModelConfig.from_hf({**V3, "sliding_window": 4096, "_name_or_path": "x"}, "here/config.json")
    assert "here/config.json" in caplog.text
    assert "sliding_window" in caplog.text
    assert "_name_or_path" not in caplog.text


def test_v2_that_normalises_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_hf({**V2_LITE, "norm_topk_prob": True})
    assert "norm_topk_prob" in caplog.text


def test_run_files_refuse_unknown_keys_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'hiden_size'; did you mean 'hidden_size'"):
        ModelConfig.parse({"hiden_size": 4})


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        tiny_config().hidden_size = 3  # type: ignore[misc]


def test_directory_without_config_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        ModelConfig.from_dir(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_dir(tmp_path)
    for text, words in (("{", "is not JSON"), ("[1]", "must be an object"), ("[" * 100_000, "is not JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not JSON"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(" " * (4 * 1024 * 1024 + 1))
    with pytest.raises(ConfigError, match="above the limit"):
        ModelConfig.from_dir(tmp_path)


def test_importing_the_config_imports_neither_torch_nor_ray() -> None:
    code = "import sys, deepseek_ray.config.model; print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
