"""Adapters: PEFT is the oracle for what its names can express, a slow reference for experts; files go both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from checkpoints import tiny_config, write_random_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deepseek_ray import LoraConfig, get_peft_model
from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.models.load import load_model, save_model, state_to_hf
from deepseek_ray.nn.experts import Experts
from deepseek_ray.nn.slots import combine_slots
from deepseek_ray.training.lora import add_adapters, find_adapters, load_adapter, merge_adapters, save_adapter

LINEAR = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["experts.*.gate_proj", "experts.*.up_proj", "experts.*.down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base"), tiny_config(), std=0.1)


@pytest.fixture
def model(base: Path) -> DeepSeekForCausalLM:
    return load_model(base).eval()


def lora(*targets: str, **changes: float) -> LoraConfig:
    return LoraConfig.parse({"r": 4, "lora_alpha": 6, "target_modules": list(targets), **changes})


def train_a_bit(model: nn.Module, seed: int = 1) -> None:
    """Adapters as training would leave them: B no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(0))


def logits(model: DeepSeekForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def test_new_adapters_change_nothing_and_freeze_the_rest(model: DeepSeekForCausalLM) -> None:
    before = logits(model)
    assert get_peft_model(model, LoraConfig(r=4)) is model
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    model.train()
    model(ids()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None) == ("lora_" in name), name
    b = [parameter.grad for name, parameter in model.named_parameters() if name.endswith("lora_B")]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in b)


@pytest.mark.parametrize("targets", [LINEAR, EXPERTS, [*LINEAR, *EXPERTS]], ids=["linear", "experts", "both"])
def test_peft_reads_our_file_and_agrees(
    model: DeepSeekForCausalLM, base: Path, tmp_path: Path, targets: list[str]
) -> None:
    """For experts PEFT stacks our adapters of every expert into its own of a layer."""
    get_peft_model(model, lora(*targets))
    train_a_bit(model)
    save_adapter(model, tmp_path / "adapter", str(base))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        difference = (theirs(ids()).logits - logits(model)).abs().max()
    assert difference <= 1e-4
    assert (logits(model) - logits(load_model(base).eval())).abs().max() > 0.01


def test_we_read_pefts_file_and_agree(base: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_b_proj", "o_proj"])
    theirs = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        expected = theirs(ids()).logits
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(base).eval()
    read = load_adapter(ours, tmp_path / "adapter")
    assert (read.r, read.lora_alpha, set(read.target_modules)) == (3, 9, {"q_b_proj", "o_proj"})
    assert (logits(ours) - expected).abs().max() <= 1e-4


class SlowExperts(nn.Module):
    """Every expert's W + alpha / r B A written out, one token and slot at a time."""

    def __init__(self, experts: Experts, pairs: dict[tuple[int, str], tuple[Tensor, Tensor]], scale: float) -> None:
        super().__init__()
        self.experts, self.pairs, self.scale = experts, pairs, scale

    def weight(self, expert: int, projection: str) -> Tensor:
        width = self.experts.down.shape[2]
        stack = {
            "gate_proj": self.experts.gate_up[expert, :width],
            "up_proj": self.experts.gate_up[expert, width:],
            "down_proj": self.experts.down[expert],
        }
        pair = self.pairs.get((expert, projection))
        return stack[projection] if pair is None else stack[projection] + self.scale * pair[1] @ pair[0]

    def forward(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        rows = []
        for token, chosen in zip(hidden, expert_ids.tolist(), strict=True):
            for expert in chosen:
                inner = nn.functional.silu(self.weight(expert, "gate_proj") @ token)
                inner = inner * (self.weight(expert, "up_proj") @ token)
                rows.append(self.weight(expert, "down_proj") @ inner)
        return combine_slots(torch.stack(rows).view(*expert_ids.shape, -1), weights)


@pytest.mark.parametrize("targets", [EXPERTS, ["experts.3.up_proj", "experts.5.up_proj", "experts.5.down_proj"]])
def test_experts_equal_the_slow_reference(model: DeepSeekForCausalLM, targets: list[str]) -> None:
    """Outputs, gradients of every A and B, and the gradient of the input; all experts, and a few of them."""
    get_peft_model(model, lora(*targets))
    train_a_bit(model)
    layer = model.moe_modules[0].experts
    pairs = {}
    for projection in layer.projections:
        adapters = layer.adapters(projection)
        for place, expert in enumerate(adapters.experts):
            a, b = adapters.lora_A[place], adapters.lora_B[place]
            pairs[expert, projection] = tuple(one.detach().clone().requires_grad_() for one in (a, b))
    slow = SlowExperts(layer, pairs, scale=6 / 4)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(9, 32, generator=generator).requires_grad_()
    chosen = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(9)])
    weights, counts = torch.rand(9, 2, generator=generator), chosen.flatten().bincount(minlength=8)
    outputs, grads = [], []
    for module in (layer, slow):
        hidden.grad = None
        output = module(hidden, chosen, weights, counts)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        outputs.append(output.detach())
        grads.append(hidden.grad)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)
    for (expert, projection), (a, b) in pairs.items():
        adapters = layer.adapters(projection)
        place = adapters.experts.index(expert)
        used = bool(counts[expert])
        for own, theirs in ((adapters.lora_A, a), (adapters.lora_B, b)):
            expected = theirs.grad if used else torch.zeros_like(theirs)
            torch.testing.assert_close(own.grad[place], expected, atol=1e-5, rtol=1e-4)


def test_adapters_whose_experts_have_no_tokens_have_a_gradient(model: DeepSeekForCausalLM) -> None:
    """So that every worker takes part in the exchange of every gradient."""
    get_peft_model(model, lora("experts.6.down_proj"))
    layer = model.moe_modules[0].experts
    chosen = torch.tensor([[0, 1], [2, 3]])
    layer(torch.randn(2, 32), chosen, torch.ones(2, 2), chosen.flatten().bincount(minlength=8)).sum().backward()
    gradient = layer.adapters("down_proj").lora_A.grad
    assert gradient is not None
    assert not gradient.any()


@pytest.mark.parametrize(
    "targets", [[*LINEAR, "shared_experts.down_proj"], EXPERTS, ["gate_proj", "experts.2.up_proj", "lm_head"]]
)
def test_merging_keeps_the_function(model: DeepSeekForCausalLM, tmp_path: Path, targets: list[str]) -> None:
    get_peft_model(model, lora(*targets))
    train_a_bit(model)
    before = logits(model)
    merge_adapters(model)
    assert find_adapters(model) is None
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)
    save_model(model, tmp_path / "merged")
    assert torch.equal(logits(load_model(tmp_path / "merged").eval()), logits(model))


def test_only_what_was_named_is_merged(model: DeepSeekForCausalLM, base: Path) -> None:
    get_peft_model(model, lora("experts.2.up_proj", "1.self_attn.o_proj"))
    train_a_bit(model)
    untouched = dict(state_to_hf(load_model(base)))
    changed = {name for name, tensor in state_to_hf(merge_adapters(model)) if not torch.equal(tensor, untouched[name])}
    moe = {f"model.layers.{layer}.mlp.experts.2.up_proj.weight" for layer in (1, 2)}
    assert changed == moe | {"model.layers.1.self_attn.o_proj.weight"}


def test_a_saved_adapter_loads_back(model: DeepSeekForCausalLM, base: Path, tmp_path: Path) -> None:
    get_peft_model(model, lora(*EXPERTS, "o_proj"))
    train_a_bit(model)
    save_adapter(model, tmp_path, "base")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["base_model_name_or_path"]) == ("LORA", 4, "base")
    again = load_model(base).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    for name, parameter in again.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)


def test_dropout_acts_in_training_only(model: DeepSeekForCausalLM) -> None:
    get_peft_model(model, lora("o_proj", *EXPERTS, lora_dropout=0.5))
    train_a_bit(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_coverage_is_counted_and_printed(model: DeepSeekForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    """Per layer: o_proj 32 x 40; 8 experts' down_proj 32 x 16. Three layers, two of them with experts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    coverage = add_adapters(model, lora("o_proj", "experts.*.down_proj"))
    assert coverage.adapted == {"attention": 3 * 32 * 40, "routed experts": 2 * 8 * 32 * 16}
    assert coverage.matrices["routed experts"] == 3 * coverage.adapted["routed experts"]
    assert coverage.trainable == 3 * 4 * (32 + 40) + 2 * 8 * 4 * (32 + 16)
    assert coverage.total == total
    merge_adapters(model)
    get_peft_model(model, lora("o_proj", "experts.*.down_proj"))
    printed = capsys.readouterr().out
    assert "routed experts 33.3 %" in printed
    assert "dense MLP 0.0 %" in printed
    assert f"{coverage.trainable:,} trainable parameters" in printed


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (["down_proj"], {"dense MLP", "shared experts", "routed experts"}),
        (["shared_experts.down_proj"], {"shared experts"}),
        (["experts.*"], {"routed experts"}),
        (r".*\.self_attn\.(q_b|o)_proj", {"attention"}),
        ("all-linear", {"attention", "dense MLP", "shared experts", "routed experts"}),
    ],
)
def test_targets_are_matched_by_name(model: DeepSeekForCausalLM, targets: list[str] | str, kinds: set[str]) -> None:
    assert set(add_adapters(model, LoraConfig.parse({"target_modules": targets})).adapted) == kinds


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["o_proj", "q_porj"], r"names 'q_porj', which matches no linear layer .*did you mean '.*proj'"),
        (["gate"], r"names 'gate', .*did you mean 'gate_proj'"),
        (["experts.9.up_proj"], r"names 'experts.9.up_proj', which matches"),
        (["input_layernorm"], r"matches no linear layer and no routed expert"),
        ("o_proj", r"names 'o_proj', which matches"),
        ("(", r"is no regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(
    model: DeepSeekForCausalLM, targets: list[str] | str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, LoraConfig.parse({"target_modules": targets}))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    tied = DeepSeekForCausalLM(tiny_config(tie_word_embeddings=True))
    with pytest.raises(ConfigError, match="tied to the token embedding"):
        get_peft_model(tied, lora("lm_head"))


def test_adapters_twice_or_missing_are_refused(model: DeepSeekForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters to merge"):
        merge_adapters(model)
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapter(model, tmp_path)
    get_peft_model(model, lora("o_proj"))
    with pytest.raises(ConfigError, match="has adapters already"):
        get_peft_model(model, lora("o_proj"))


def test_adapter_files_that_do_not_fit_are_refused(model: DeepSeekForCausalLM, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config.json"):
        load_adapter(model, tmp_path)
    save_adapter(get_peft_model(load_model(base), lora("o_proj")), tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"r": 5}, r"o_proj.lora_A.weight has shape \[4, 40\], the model needs \[5, 40\]"),
        ({"target_modules": ["o_proj", "q_a_proj"]}, r"q_a_proj.lora_A.weight is missing"),
        ({"target_modules": ["1.self_attn.o_proj"]}, r"layers.0.self_attn.o_proj.lora_A.weight belongs to no"),
        ({"use_dora": True}, r"use_dora is True, which is not supported"),
        ({"peft_type": "IA3"}, r"only LORA adapters"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_adapter(load_model(base), tmp_path)
