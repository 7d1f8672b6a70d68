"""One optimiser step: against a slow reference, and the same however the step is cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from training_runs import small_config, small_data

from deepseek_ray.config.run import OptimizerConfig, PretrainConfig
from deepseek_ray.data.cursor import DataCursor
from deepseek_ray.data.loader import Batch, TrainLoader
from deepseek_ray.data.prepare import PreparedData
from deepseek_ray.errors import TrainingError
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.training.evaluate import validate
from deepseek_ray.training.loop import build_model
from deepseek_ray.training.optimizer import build_optimizer
from deepseek_ray.training.parallel import Parallelism
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.step import StepMetrics, TrainStep
from deepseek_ray.training.strategies import parallelism_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("corpus"))


def step_of(model: DeepSeekForCausalLM, config: PretrainConfig) -> TrainStep:
    return TrainStep(prepared(model, config))


def prepared(model: DeepSeekForCausalLM, config: PretrainConfig) -> Parallelism:
    parallelism = parallelism_for(config, Ranks())
    parallelism.prepare(model)
    return parallelism


def run_steps(
    config: PretrainConfig, data: PreparedData, num_steps: int
) -> tuple[DeepSeekForCausalLM, list[StepMetrics]]:
    model = build_model(config, data)
    step = step_of(model, config)
    loader = batches_of(config, data)
    return model, [
        step.run(number, [next(loader) for _ in range(config.accumulation_steps)]) for number in range(1, num_steps + 1)
    ]


def batches_of(config: PretrainConfig, data: PreparedData) -> TrainLoader:
    cursor = DataCursor(config.data.seed, data.train.num_samples(config.data.sequence_length))
    return TrainLoader(
        data.train,
        config.data.sequence_length,
        cursor,
        per_rank_batch=config.training.micro_batch_size,
        accumulation=config.accumulation_steps,
    )


def slow_losses(model: DeepSeekForCausalLM, batch: Batch) -> tuple[float, float]:
    """Next-token and multi-token-prediction loss, place by place, with one forward pass per piece of a document."""
    nats, mtp_nats = [], []
    for tokens, documents in zip(batch["tokens"].tolist(), batch["document_ids"].tolist(), strict=True):
        for document in sorted(set(documents[:-1])):
            inside = [i for i, number in enumerate(documents) if number == document]
            inputs = [i for i in inside if i < len(tokens) - 1]
            ids = torch.tensor([[tokens[i] for i in inputs]])
            positions = torch.tensor([inputs])
            output = model(ids, positions=positions, with_mtp=len(inputs) > 1)
            log_p = output.logits[0].log_softmax(-1)
            nats += [-log_p[k, tokens[i + 1]].item() for k, i in enumerate(inputs) if i + 1 in inside]
            if len(inputs) > 1:
                mtp_log_p = output.mtp[0].logits[0].log_softmax(-1)
                mtp_nats += [-mtp_log_p[k, tokens[i + 2]].item() for k, i in enumerate(inputs[:-1]) if i + 2 in inside]
    return sum(nats) / len(nats), sum(mtp_nats) / len(mtp_nats)


def test_loss_equals_the_slow_reference(data: PreparedData) -> None:
    config = small_config(training={"micro_batch_size": 8})
    model = build_model(config, data)
    batch = next(batches_of(config, data))
    assert batch["document_ids"].max() > 0, "the samples must hold several documents for this test to say anything"
    with torch.no_grad():
        loss, mtp_loss = slow_losses(model.eval(), batch)
    _, (measured,) = run_steps(config, data, 1)
    assert measured.loss == pytest.approx(loss, rel=1e-5)
    assert measured.mtp_loss == pytest.approx(mtp_loss, rel=1e-5)


def test_micro_batches_change_nothing_but_rounding(data: PreparedData) -> None:
    """8 sequences at once, in 2 and in 8 portions: float32 sums in another order, so equal to about 1e-5."""
    runs = [run_steps(small_config(training={"micro_batch_size": size}), data, 3) for size in (8, 4, 1)]
    model, metrics = runs[0]
    for other_model, other_metrics in runs[1:]:
        for one, other in zip(metrics, other_metrics, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-5)
            assert other.mtp_loss == pytest.approx(one.mtp_loss, rel=1e-5)
            assert other.balance_loss == pytest.approx(one.balance_loss, rel=1e-5)
            assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)
            assert other.max_violation == one.max_violation
        for name, value in model.state_dict().items():
            torch.testing.assert_close(other_model.state_dict()[name], value, rtol=1e-2, atol=1e-4, msg=name)


def test_recomputed_activations_are_not_counted_twice(data: PreparedData) -> None:
    model, metrics = run_steps(small_config(), data, 3)
    recomputing, again = run_steps(small_config(training={"recompute_activations": True}), data, 3)
    assert again == metrics
    for name, value in model.state_dict().items():
        assert torch.equal(recomputing.state_dict()[name], value), name


def test_balancing_moves_the_bias_by_the_counts_of_the_whole_step(data: PreparedData) -> None:
    """One step from a zero bias: each expert's bias is +-speed by whether it got less or more than the mean."""
    config = small_config(training={"micro_batch_size": 2})
    model = build_model(config, data)
    loader = batches_of(config, data)
    batches = [next(loader) for _ in range(config.accumulation_steps)]
    counts = torch.zeros(config.model.n_routed_experts)
    with torch.no_grad():
        for batch in batches:
            gate = model(batch["tokens"][:, :-1], batch["document_ids"][:, :-1]).gates[0]
            counts += gate.expert_ids.flatten().bincount(minlength=len(counts))
    model, _ = run_steps(config, data, 1)
    expected = config.balance.bias_update_speed * torch.sign(counts.mean() - counts)
    bias = model.moe_modules[0].correction_bias
    assert bias is not None
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(bias, expected)


def test_balancing_evens_out_the_load(data: PreparedData) -> None:
    """A gate that prefers two experts by its bias keeps preferring them without balancing, and evens out with it."""
    violations = {}
    for speed in (0.0, 0.01):
        config = small_config(
            model={"num_nextn_predict_layers": 0},
            balance={"bias_update_speed": speed, "sequence_loss_alpha": 0.0},
            optimizer={"lr": 1e-5},
        )
        model = build_model(config, data)
        bias = model.moe_modules[0].correction_bias
        assert bias is not None
        bias.copy_(torch.tensor([0.1, 0.1, 0.0, 0.0]))
        step = step_of(model, config)
        loader = batches_of(config, data)
        measured = [
            step.run(number, [next(loader) for _ in range(config.accumulation_steps)]) for number in range(1, 13)
        ]
        violations[speed] = measured[-1].max_violation
    assert violations[0.0] > 0.9  # two of four experts take nearly everything: (2 - 1) / 1
    assert violations[0.01] < violations[0.0] / 2


def test_loss_falls(data: PreparedData) -> None:
    _, metrics = run_steps(small_config(), data, 12)
    assert metrics[-1].loss < 0.8 * metrics[0].loss


def test_bf16_autocast_stays_close_and_keeps_float32_weights(data: PreparedData) -> None:
    _, (exact,) = run_steps(small_config(), data, 1)
    model, (rounded,) = run_steps(small_config(training={"precision": "bf16"}), data, 1)
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)
    assert rounded.loss != exact.loss
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_weights_change(data: PreparedData, poison: str) -> None:
    config = small_config()
    model = build_model(config, data)
    if poison == "weight":
        model.model.norm.weight.data[0] = math.nan
    else:
        model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = step_of(model, config)
    loader = batches_of(config, data)
    what = "the loss is nan" if poison == "weight" else "the gradient's norm is"
    with pytest.raises(TrainingError, match=rf"step 7: {what}.*learning rate .*lower optimizer.lr"):
        step.run(7, [next(loader) for _ in range(config.accumulation_steps)])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_without_mtp_weight_the_extra_layer_stays_as_it_was(data: PreparedData) -> None:
    config = small_config(training={"mtp_loss_weight": 0.0})
    untouched = build_model(config, data).mtp.state_dict()
    model, (measured,) = run_steps(config, data, 1)
    assert measured.mtp_loss is None
    shared = ("embed_tokens", "shared_head.head")
    for name, value in model.mtp.state_dict().items():
        assert torch.equal(value, untouched[name]) is not any(part in name for part in shared), name


def test_validation_changes_nothing(data: PreparedData) -> None:
    config = small_config()
    model = build_model(config, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    parallelism = prepared(model, config)
    first = validate(parallelism, data.validation, None)
    assert validate(parallelism, data.validation, None) == first
    assert torch.equal(rng, torch.get_rng_state())
    assert model.moe_modules[0].take_counts().sum() == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert first.bits_per_byte == pytest.approx(first.loss / math.log(2) / data.bytes_per_token_validation)
    num_tokens = data.validation.num_samples(24) * 24
    assert sum(first.expert_counts[0]) == num_tokens * config.model.num_experts_per_tok


def test_weight_decay_spares_norms_biases_and_embeddings(data: PreparedData) -> None:
    model = build_model(small_config(), data)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.3)).param_groups
    spared = {names[id(parameter)] for parameter in groups[1]["params"]}
    decayed = {names[id(parameter)] for parameter in groups[0]["params"]}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.3, 0.0)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= spared
    assert {"lm_head.weight", "model.layers.1.mlp.experts.gate_up", "model.layers.1.mlp.gate.weight"} <= decayed
    assert spared | decayed == set(names.values())
    everything = build_optimizer(model.named_parameters(), OptimizerConfig(decay_embeddings=True)).param_groups[0]
    assert "model.embed_tokens.weight" in {names[id(parameter)] for parameter in everything["params"]}


def test_tokenizer_too_large_for_the_model(data: PreparedData) -> None:
    config = small_config(data={"tokenizer": str(data.tokenizer_dir)}, model={"vocab_size": 100})
    with pytest.raises(TrainingError, match=r"the tokenizer has \d+ ids, model.vocab_size is 100; raise it"):
        build_model(config, data)


def test_config_names_the_tokenizers_special_tokens(data: PreparedData) -> None:
    model = build_model(small_config(), data)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
