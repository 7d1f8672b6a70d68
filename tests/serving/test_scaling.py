"""What Serve is told follows from what is served."""

from __future__ import annotations

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.config.serving import EmbeddingsConfig, IngressConfig
from deepseek_ray.serving.scaling import api_limits, plan_embeddings, plan_openai


def model(workers: int, seqs: int, waiting: int, seconds: float) -> DeploymentConfig:
    engine = EngineConfig(max_num_seqs=seqs, max_waiting=waiting)
    return DeploymentConfig(model_dir="/m", attention_workers=workers, engine=engine, request_timeout_seconds=seconds)


def test_the_api_admits_what_the_engines_can_take() -> None:
    limits = api_limits(model(workers=3, seqs=8, waiting=2, seconds=5))
    assert (limits.max_concurrent_requests, limits.request_timeout_seconds) == (30, 5)


def test_a_process_can_hold_all_that_the_engines_admit_and_refusals_besides() -> None:
    plan = plan_openai([model(3, 8, 2, 5), model(1, 4, 0, 5)], IngressConfig())
    assert plan.max_ongoing_requests == 30 + 4 + 1024
    assert plan.max_queued_requests == 1024


def test_full_engines_ask_for_all_processes() -> None:
    # 3 * 8 + 1 * 4 = 28 sequences run at once; 4 processes get 7 each.
    plan = plan_openai([model(3, 8, 2, 5), model(1, 4, 0, 5)], IngressConfig(max_replicas=4))
    assert plan.target_ongoing_requests == 7
    assert plan_openai([model(1, 2, 0, 5)], IngressConfig(max_replicas=4)).target_ongoing_requests == 1


def test_a_process_ends_only_after_the_longest_deadline() -> None:
    # body 30 s, then the deadline, then 10 s for the way out
    assert plan_openai([model(1, 1, 0, 5), model(1, 1, 0, 600)], IngressConfig()).graceful_shutdown_timeout_s == 640


def test_queues_are_looked_at_twice_within_the_delay() -> None:
    def times(delay: float) -> tuple[float, float]:
        plan = plan_openai([model(1, 1, 0, 5)], IngressConfig(upscale_delay_seconds=delay))
        return plan.metrics_interval_s, plan.look_back_period_s

    assert times(5) == (2.5, 5)
    assert times(0) == (0.5, 1)
    assert times(300) == (10, 20)


def test_an_encoder_aims_at_one_batch_computed_and_one_gathering() -> None:
    config = EmbeddingsConfig(model_dir="/m", max_batch=8, max_waiting=100, request_timeout_seconds=10)
    plan = plan_embeddings(config)
    assert plan.target_ongoing_requests == 16
    assert plan.max_ongoing_requests == 1124
    assert plan.graceful_shutdown_timeout_s == 50
