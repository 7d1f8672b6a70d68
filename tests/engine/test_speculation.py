"""Drafting changes how many steps an output takes, and nothing else about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from fakes import Collected, FakeDecoder, byte_tokenizer, run_to_end

from deepseek_ray.config.engine import EngineConfig, SpeculativeConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.scheduler import ScheduledStep
from deepseek_ray.engine.speculation import NgramIndex, Speculator, can_draft, served_moe_layers
from deepseek_ray.errors import ConfigError, ExpertsCrashedError
from deepseek_ray.messages import GenerateRequest, SamplingParams, StructuredOutputsParams
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.load import load_model, save_model
from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.nn.paged import PagedBatch
from tests.checkpoints import tiny_config, write_random_checkpoint

BYTES_PER_TOKEN = 2 * 6 * 4  # layers, width, float32


class Oracle(Speculator):
    """Knows what each request will give; every so often it lies."""

    def __init__(self, outputs: dict[str, list[int]], count: int, lies: Callable[[int], bool]) -> None:
        self._outputs, self._count, self._lies = outputs, count, lies
        self.after: Callable[[ScheduledStep], None] = lambda step: None

    def draft(self, step: ScheduledStep) -> None:
        self.after(step)
        for sequence in [item.sequence for item in step.items]:
            if can_draft(sequence):
                done = sequence.num_output_tokens
                coming = self._outputs[sequence.request.request_id][done : done + self._count]
                sequence.draft_token_ids = [
                    (token + 1) % 256 if self._lies(done + place) else token for place, token in enumerate(coming)
                ]


def make_engine(decoder: FakeDecoder | None = None, num_blocks: int = 200, **settings: int) -> Engine:
    config = EngineConfig(
        block_size=4, kv_cache_bytes=num_blocks * 4 * BYTES_PER_TOKEN, **{"max_num_batched_tokens": 64, **settings}
    )
    return Engine(decoder or FakeDecoder(), byte_tokenizer(), config)


def make_request(name: str, **params: object) -> GenerateRequest:
    prompt = [(sum(map(ord, name)) * 37 + 11 * place) % 256 for place in range(6)]
    params = {"temperature": 0, "max_tokens": 25, "ignore_eos": True, **params}
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params))


def requests() -> list[GenerateRequest]:
    json_text = StructuredOutputsParams(json={"type": "array", "items": {"type": "integer"}})
    return [
        make_request("greedy", logprobs=3),
        make_request("seeded", temperature=1.0, seed=5),
        make_request("penalised", temperature=0.8, seed=1, frequency_penalty=0.5, repetition_penalty=1.2, top_p=0.9),
        make_request("short", max_tokens=1),
        make_request("two", max_tokens=2),
        make_request("stopped", min_tokens=3, stop_token_ids=list(range(0, 256, 9))),
        make_request("shaped", structured_outputs=json_text, ignore_eos=False, temperature=1.0, seed=3),
    ]


def said(outputs: dict[str, Collected]) -> dict[str, tuple[object, ...]]:
    """All of each output but when it came."""
    return {
        name: (output.token_ids, output.text, output.logprobs, output.finish_reason, output.stop_reason, output.error)
        for name, output in outputs.items()
    }


def with_oracle(engine: Engine, outputs: dict[str, list[int]], count: int, lies: Callable[[int], bool]) -> Oracle:
    engine._speculator = Oracle(outputs, count, lies)
    return engine._speculator


@pytest.fixture(scope="module")
def truth() -> dict[str, list[int]]:
    outputs = run_to_end(make_engine(), requests())
    return {name: output.token_ids for name, output in outputs.items()}


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(
    "lies", [lambda place: False, lambda place: place % 3 == 2, lambda place: True], ids=["right", "mixed", "wrong"]
)
@pytest.mark.parametrize("num_blocks", [200, 12], ids=["roomy", "preempting"])
def test_the_output_is_that_of_an_engine_that_does_not_draft(
    truth: dict[str, list[int]], count: int, lies: Callable[[int], bool], num_blocks: int
) -> None:
    plain = run_to_end(make_engine(num_blocks=num_blocks), requests())
    engine = make_engine(num_blocks=num_blocks)
    with_oracle(engine, truth, count, lies)
    assert said(run_to_end(engine, requests())) == said(plain)
    stats = engine.stats()
    assert stats.num_kv_blocks_used == 0
    assert stats.num_draft_tokens >= stats.num_accepted_tokens
    if num_blocks == 200:
        assert stats.num_draft_tokens > 0
        assert (stats.num_accepted_tokens > 0) != all(map(lies, range(3)))


def test_right_drafts_save_steps(truth: dict[str, list[int]]) -> None:
    decoder = FakeDecoder()
    engine = make_engine(decoder)
    with_oracle(engine, truth, 4, lambda place: False)
    run_to_end(engine, [make_request("greedy")])
    assert decoder.num_steps == 1 + 5  # the prompt's step drafts nothing; then five tokens a step, 24 of them
    assert engine.stats().num_accepted_tokens == 19  # the last step has room for three
    assert max(decoder.num_tokens_per_step[1:]) == 5


def test_blocks_that_drafts_filled_are_found_again(truth: dict[str, list[int]]) -> None:
    engine = make_engine()
    with_oracle(engine, truth, 3, lambda place: place % 4 == 3)
    request = make_request("greedy")
    run_to_end(engine, [request])
    longer = [*request.prompt_token_ids, *truth["greedy"]]
    again = msgspec.structs.replace(request, request_id="again", prompt_token_ids=longer)
    with_oracle(engine, {"again": []}, 1, lambda place: False)
    found = run_to_end(engine, [again])["again"]
    assert len(longer) == 31
    assert found.events[0].num_cached_tokens == 28, "every full block of what was computed, the last token was not"
    assert found.token_ids == run_to_end(make_engine(), [again])["again"].token_ids


@pytest.mark.parametrize("budget", [5, 8])
def test_a_draft_takes_no_other_sequences_turn(truth: dict[str, list[int]], budget: int) -> None:
    """With drafts that are all wrong every token comes in the step in which it comes without them."""

    def steps(drafting: bool) -> list[list[str]]:
        decoder = FakeDecoder()
        engine = make_engine(decoder, max_num_batched_tokens=budget)
        if drafting:
            with_oracle(engine, truth, 7, lambda place: True)
        for request in requests()[:4]:
            engine.add_request(request)
        order = []
        while engine.has_work:
            order.append([event.request_id for event in engine.step()])
        assert max(decoder.num_tokens_per_step) <= budget
        assert (engine.stats().num_draft_tokens > 0) == drafting
        return order

    assert steps(drafting=True) == steps(drafting=False)


def test_a_draft_that_crashes_experts_costs_the_drafts_only(truth: dict[str, list[int]]) -> None:
    decoder = FakeDecoder()
    engine = make_engine(decoder)
    oracle = with_oracle(engine, truth, 2, lambda place: place == 8)
    crashes = []

    def crash(step: ScheduledStep) -> None:
        if len(step.items) == 2 and step.items[1].sequence.num_output_tokens == 7 and not crashes:
            crashes.append(ExpertsCrashedError("two processes have died", row=5))  # of rows 0-2 and 3-5 the last
            decoder.failures = [crashes[0]]

    oracle.after = crash
    outputs = run_to_end(engine, requests()[:2])
    assert crashes
    assert {name: output.token_ids for name, output in outputs.items()} == {name: truth[name] for name in outputs}


def test_ngrams_are_looked_up_in_everything_before() -> None:
    tokens = [1, 2, 3, 4, 9, 2, 3, 4, 7, 2, 3]
    index = NgramIndex(tokens)
    assert index.after_the_last(3) == [4, 7, 2], "the latest of two places"
    tokens.append(4)
    assert index.after_the_last(2) == [7, 2]
    tokens += [9]
    assert index.after_the_last(2) == [2, 3], "four tokens that came before, in the same order"
    tokens += [5]
    assert index.after_the_last(2) == []
    assert NgramIndex([1]).after_the_last(2) == []
    assert NgramIndex([1, 1, 1]).after_the_last(2) == [1], "what follows ends where the list ends"


def test_ngrams_draft_repetitions_right() -> None:
    """The fake model's output never settles, so what it repeats is asked of a model that says the same again."""

    class Parrot(FakeDecoder):
        def _token(self, batch: PagedBatch, t: int, cache: object) -> torch.Tensor:
            super()._token(batch, t, cache)
            logits = torch.zeros(self.config.vocab_size)
            logits[(int(batch.token_ids[t]) + 1) % 5] = 1.0
            return logits

    plain = run_to_end(make_engine(Parrot()), [make_request("a", max_tokens=40)])
    decoder = Parrot()
    config = SpeculativeConfig(method="ngram", num_tokens=4)
    engine = make_engine(decoder, speculative=config)
    assert said(run_to_end(engine, [make_request("a", max_tokens=40)])) == said(plain)
    assert decoder.num_steps < 20
    stats = engine.stats()
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 20


@pytest.fixture(scope="module", params=["own copies", "shared"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer's embedding and head are its own, or the main model's, as after training."""
    config, directory = tiny_config(num_nextn_predict_layers=1), tmp_path_factory.mktemp("mtp") / "m"
    if request.param == "own copies":
        return write_random_checkpoint(directory, config)
    torch.manual_seed(0)
    save_model(DeepSeekForCausalLM(config), directory)
    return directory


def mtp_engine(model_dir: Path, dtype: torch.dtype, draft: bool, **settings: int) -> Engine:
    config = EngineConfig(block_size=4, speculative=SpeculativeConfig(method="mtp") if draft else None, **settings)
    reader = CheckpointReader(model_dir)
    held = {layer: range(reader.config.n_routed_experts) for layer in served_moe_layers(config, reader)}
    decoder = PagedDecoder(reader, dtype, LocalExperts(ExpertStore(reader, held, dtype)), with_mtp=draft)
    return Engine(decoder, None, config)


def token_request(name: str, prompt: list[int], **params: object) -> GenerateRequest:
    params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [512, 7])
def test_mtp_drafts_are_the_trained_layers_and_outputs_stay(
    model_dir: Path, dtype: torch.dtype, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        token_request("a", list(range(3, 30)), logprobs=2),
        token_request("b", [5, 6, 7], temperature=1.0, seed=4),
        token_request("c", [9] * 17),
    ]
    plain = run_to_end(mtp_engine(model_dir, dtype, draft=False), wanted)
    engine = mtp_engine(model_dir, dtype, draft=True, max_num_batched_tokens=budget)
    drafts: list[tuple[list[int], int]] = []
    assert engine._speculator is not None
    draft = engine._speculator.draft

    def note(step: ScheduledStep) -> None:
        draft(step)
        for item in step.items:
            if item.sequence.draft_token_ids:
                drafts.append((list(item.sequence.token_ids), item.sequence.draft_token_ids[0]))

    monkeypatch.setattr(engine._speculator, "draft", note)
    assert said(run_to_end(engine, wanted)) == said(plain)
    assert len(drafts) > 20
    if dtype == torch.float32:
        model = load_model(model_dir)
        for token_ids, draft_id in drafts:
            ids = torch.tensor([token_ids])
            with torch.no_grad():
                logits = model.mtp_logits(model(ids).hidden, ids)[0, -1]
            assert logits[draft_id] >= logits.max() - 1e-4


def test_mtp_without_the_layer_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "m", tiny_config()))
    config = EngineConfig(speculative=SpeculativeConfig(method="mtp"))
    with pytest.raises(ConfigError, match=r"holds no multi-token-prediction layer .*take method ngram"):
        served_moe_layers(config, reader)


def test_mtp_drafts_one_token() -> None:
    with pytest.raises(ValueError, match="num_tokens is 3 and method mtp"):
        SpeculativeConfig(method="mtp", num_tokens=3)
