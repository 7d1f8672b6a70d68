"""Fine-tuning through the same loop as pre-training: held-out answers get likelier, resume is bitwise, files serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversation_files import gsm8k, sums, write_jsonl
from transformers import AutoTokenizer

from deepseek_ray.config.finetune import FinetuneConfig
from deepseek_ray.config.load import load_config
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.models.load import load_model, state_to_hf
from deepseek_ray.training import trainer
from deepseek_ray.training.checkpoint import find_damage
from deepseek_ray.training.finetune import describe_start, prepare_finetune_data, with_base_model
from deepseek_ray.training.loop import build_model, train
from deepseek_ray.training.lora import find_adapters, load_adapter
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.result import PretrainResult
from deepseek_ray.training.step import TrainStep

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "finetune"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.1}
MEASURED = ("step", "loss", "balance_loss", "gradient_norm", "learning_rate", "validation_loss", "expert_counts")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(start: Path, tmp_path: Path, train_file: Path, held_out: Path, **changes: Any) -> FinetuneConfig:
    data = {"paths": [str(train_file)], "validation_paths": [str(held_out)], "sequence_length": 64,
            "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    values = {
        "name": "tuned",
        "base_model": str(start),
        "data": {**data, **changes.pop("data", {})},
        "optimizer": {"lr": changes.pop("lr", 2e-3), "weight_decay": 0.0},
        "schedule": {"warmup_steps": 1},
        "training": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 4, "validation_interval": 3,
                     "checkpoint_interval": 4, "threads_per_worker": 1, **changes.pop("training", {})},
    }  # fmt: skip
    return FinetuneConfig.parse(values | changes)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_jsonl(tmp_path / "train.jsonl", sums(0, 120)), write_jsonl(tmp_path / "held.jsonl", sums(500, 20))


def run(config: FinetuneConfig, run_dir: Path) -> PretrainResult:
    return train(config, run_dir, prepare_finetune_data(config), Ranks())


def curve(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: line.get(name) for name in MEASURED} for line in read_metrics(run_dir)]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_killed_run_goes_on_bitwise(
    trained_model: Path, tmp_path: Path, files: tuple[Path, Path], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(trained_model, tmp_path, *files, lora=lora)
    whole = run(config, tmp_path / "whole")
    original = TrainStep.run
    with monkeypatch.context() as patched:

        def dies_in_step_7(self: TrainStep, step: int, batches: Any) -> Any:
            if step == 7:
                raise KeyboardInterrupt
            return original(self, step, batches)

        patched.setattr(TrainStep, "run", dies_in_step_7)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "killed")
    torch.manual_seed(12345)
    result = run(config, tmp_path / "killed")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for name, tensor in load_model(result.checkpoint).state_dict().items():
        assert torch.equal(tensor, load_model(whole.checkpoint).state_dict()[name]), name
    losses = [line["validation_loss"] for line in read_metrics(tmp_path / "whole") if "validation_loss" in line]
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_lora_checkpoint_holds_adapter_and_merged_weights(
    trained_model: Path, tmp_path: Path, files: tuple[Path, Path]
) -> None:
    """Base and adapter compute what the merged weights do; gates, norms and embeddings are the base model's."""
    config = settings(trained_model, tmp_path, *files, lora=LORA, training={"steps": 4})
    checkpoint = Path(run(config, tmp_path / "run").checkpoint)
    assert find_damage(checkpoint) is None
    merged, base = load_model(checkpoint).eval(), load_model(trained_model).eval()
    before = dict(state_to_hf(load_model(trained_model)))
    changed = {name for name, tensor in state_to_hf(merged) if not torch.equal(tensor, before[name])}
    frozen = ("norm.weight", "gate.weight", "gate.e_score_correction_bias", "embed_tokens.weight", "lm_head.weight")
    assert {name for name in before if not name.endswith(frozen)} == changed
    load_adapter(base, checkpoint / "adapter")
    ids = torch.randint(5, 1000, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(ids).logits, merged(ids).logits, atol=1e-3, rtol=1e-4)
    text = Tokenizer.from_dir(checkpoint).apply_chat_template([{"role": "user", "content": "hi"}])
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    assert text == theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(("lora", "lr"), [(None, 1e-3), (LORA, 3e-3)], ids=["full", "lora"])
def test_gsm8k_answers_get_likelier(trained_model: Path, tmp_path: Path, lora: Any, lr: float) -> None:
    """The trained tiny model on questions it was not trained on, before the first step and after the last."""
    train_file, held_out = gsm8k(tmp_path, 120, 16)
    fields = {"prompt_field": "question", "completion_field": "answer", "sequence_length": 448}
    training = {"steps": 20, "global_batch_size": 4, "micro_batch_size": 4, "validation_interval": 20,
                "checkpoint_interval": 20}  # fmt: skip
    config = settings(trained_model, tmp_path, train_file, held_out, data=fields, training=training, lora=lora, lr=lr)
    before = config.model_copy(update={"training": config.training.model_copy(update={"steps": 1})})
    before = before.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e-12})})
    started = run(before, tmp_path / "before").validation_loss
    ended = run(config, tmp_path / "after").validation_loss
    print(f"validation loss {started:.3f} -> {ended:.3f}")
    assert ended < 0.9 * started, (started, ended)


def test_what_is_trained_is_reported(
    trained_model: Path, tmp_path: Path, files: tuple[Path, Path], caplog: Any
) -> None:
    config = settings(trained_model, tmp_path, *files, lora=LORA)
    data = prepare_finetune_data(config)
    line = describe_start(config, data)
    assert "120 conversations to learn from, 20 held out; 0 truncated" in line
    with caplog.at_level("INFO", logger="deepseek_ray"):
        model = build_model(config, data)
    assert "routed experts 100.0 %" in caplog.text
    assert find_adapters(model) is not None
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": None}, "was trained with adapters, this run has none"),
        ({"lora": {**LORA, "lora_alpha": 4}}, "lora was .* and is .*resume with what the run was started with"),
    ],
)
def test_resuming_as_something_else_is_refused(
    trained_model: Path, tmp_path: Path, files: tuple[Path, Path], change: dict[str, Any], message: str
) -> None:
    short = {"steps": 2}
    run(settings(trained_model, tmp_path, *files, lora=LORA, training=short), tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        run(settings(trained_model, tmp_path, *files, training=short, **change), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": "/no/such"}, "base_model is '/no/such', which is no directory"),
        (
            {"model": {"hidden_size": 8}},
            "model.hidden_size is 8, but that of base_model is 64; leave the model section",
        ),
        ({"lora": {"target_modules": []}}, "name at least one kind of matrix"),
        ({"lora": {}, "balance": {"bias_update_speed": 0.1}}, "adapters leave the gate as it is"),
        (
            {"lora": {"lora_dropout": 0.1}, "distributed": {"strategy": "tensor", "tensor_parallel_size": 2}},
            "lora.lora_dropout is 0.1 with strategy 'tensor', .*; set it to 0, or distributed.strategy to fsdp",
        ),
        ({"data": {"vocab_size": 900}}, "data.vocab_size is 900, which has no meaning for conversations"),
        ({"data": {"sequence_length": 1000}}, "above max_position_embeddings 512 of base_model"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    trained_model: Path, tmp_path: Path, files: tuple[Path, Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(trained_model, tmp_path, *files, **change)


@pytest.mark.parametrize(
    ("lora", "distributed", "message"),
    [
        ({"target_modules": ["q_porj"]}, {}, "target_modules names 'q_porj', which matches no linear layer"),
        (
            {"target_modules": ["o_proj", "experts.3.up_proj"]},
            {"strategy": "expert", "expert_parallel_size": 2},
            r"reaches up_proj of 1 of the 8 experts of model.layers.1.mlp.experts, but expert_parallel_size 2 .*"
            r"'experts.\*.up_proj'\), or set distributed.strategy to fsdp",
        ),
        (
            {"target_modules": ["2.self_attn.o_proj"]},
            {"strategy": "pipeline", "pipeline_parallel_size": 2},
            "reaches nothing in layers 0 to 1, which are stage 0 of pipeline_parallel_size 2; name matrices of every",
        ),
    ],
)
def test_adapters_that_cannot_be_spread_are_refused_before_any_work(
    trained_model: Path,
    tmp_path: Path,
    files: tuple[Path, Path],
    lora: dict[str, Any],
    distributed: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither Ray nor the data's preparation is started, whose names are taken away here."""
    for name in ("connected", "prepare_finetune_data"):
        monkeypatch.delattr(trainer, name)
    config = settings(trained_model, tmp_path, *files, lora=lora, distributed=distributed,
                      training={"micro_batch_size": 2}, storage_path=str(tmp_path))  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        trainer.finetune(config)


def test_a_configuration_survives_its_way_to_a_worker(
    trained_model: Path, tmp_path: Path, files: tuple[Path, Path]
) -> None:
    config = with_base_model(settings(trained_model, tmp_path, *files, lora=LORA))
    assert FinetuneConfig.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_run_files_load(trained_model: Path, path: Path) -> None:
    config = load_config(FinetuneConfig, path, [f"base_model={trained_model}"])
    assert (config.lora is not None) == (path.stem == "lora")
    assert config.data.completion_field == "answer"
