"""FP8 block-scaled checkpoints, against a dequantisation that goes value by value through its block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.load import load_model, save_model
from deepseek_ray.models.safetensors_file import write_safetensors
from deepseek_ray.models.shapes import parameter_shapes

QUANTISED = ("proj.weight", "proj_with_mqa.weight")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def wide_config() -> ModelConfig:
    """Sizes on both sides of a block: 160 and 144 leave a partial one, 128 fills one, 16 does not."""
    sizes = {"hidden_size": 160, "intermediate_size": 144, "moe_intermediate_size": 128, "num_hidden_layers": 2}
    return tiny_config(**sizes, n_routed_experts=4)


def obvious_dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    result = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for block in range(scale.shape[1]):
            columns = slice(block * 128, (block + 1) * 128)
            result[row, columns] = weight[row, columns].float() * scale[row // 128, block]
    return result


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """An FP8 checkpoint as DeepSeek publishes them, and its true float32 weights."""
    config = wide_config()
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config).items():
        weight = torch.randn(shape, generator=generator) * 0.2
        if name.endswith(QUANTISED):
            stored[name] = (weight * 100).to(torch.float8_e4m3fn)
            blocks = [-(-side // 128) for side in shape]
            stored[name + "_scale_inv"] = torch.rand(blocks, generator=generator) * 0.01 + 0.001
            truth[name] = obvious_dequantised(stored[name], stored[name + "_scale_inv"])
        else:
            stored[name] = truth[name] = weight
    write_safetensors(tmp_path / "model.safetensors", list(stored.items()))
    (tmp_path / "config.json").write_text(json.dumps({**config.to_hf(), "quantization_config": FP8}))
    return tmp_path, truth


def test_weights_come_out_dequantised(quantised: tuple[Path, dict[str, Tensor]]) -> None:
    directory, truth = quantised
    reader = CheckpointReader(directory)
    reader.validate()
    assert set(reader.names) == set(truth), "scales are no tensors of the model"
    for name, weight in truth.items():
        assert torch.equal(reader.tensor(name, torch.float32), weight), name
    name = "model.layers.0.mlp.gate_proj.weight"
    assert reader.dtype(name) == torch.bfloat16
    assert torch.equal(reader.tensor(name), truth[name].bfloat16())


def test_model_equals_the_one_of_the_dequantised_weights(
    quantised: tuple[Path, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory, truth = quantised
    model = load_model(directory).eval()
    saved = tmp_path_factory.mktemp("saved")
    save_model(model, saved)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    reader = CheckpointReader(saved)
    assert all(torch.equal(reader.tensor(name), weight) for name, weight in truth.items())
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load_model(saved).eval()(ids).logits, model(ids).logits)


def test_missing_and_misshapen_scales_are_named(quantised: tuple[Path, dict[str, Tensor]]) -> None:
    directory, truth = quantised
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    stored = dict(truth)
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    write_safetensors(directory / "model.safetensors", list(stored.items()))
    with pytest.raises(CheckpointError, match=f"{name} is FP8 and has no {name}_scale_inv"):
        CheckpointReader(directory).validate()
    with pytest.raises(CheckpointError, match=f"{name} is FP8 and has no {name}_scale_inv"):
        CheckpointReader(directory).tensor(name)
    stored[name + "_scale_inv"] = torch.ones(1, 1)
    write_safetensors(directory / "model.safetensors", list(stored.items()))
    with pytest.raises(CheckpointError, match=r"_scale_inv has shape \[1, 1\].*\(2, 1\)"):
        CheckpointReader(directory).validate()
