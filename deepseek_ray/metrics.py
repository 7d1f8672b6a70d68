"""Every metric of the project, in one table: plain data, without Ray and without torch.

Names of the `vllm_` family and their meanings are vLLM's, so that dashboards made for it fit. Prometheus shows each
name with the prefix `ray_`, which Ray adds. `python -m deepseek_ray.metrics docs/metrics.md` writes the table there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_MODEL = ("model_name",)
_ENGINE = ("model_name", "engine")
_SHARD = ("model_name", "shard")

# Bucket bounds, vLLM's.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(mantissa * 10**power) for power in range(6) for mantissa in (1, 2, 5))
_STEP_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Metric:
    name: str
    """As Prometheus shows it, without the prefix `ray_`."""
    kind: Kind
    labels: tuple[str, ...]
    unit: str
    help: str
    source: str
    """The process that exports it."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""


def _of(kind: Kind, source: str, labels: tuple[str, ...], *rows: tuple[str, str, str]) -> list[Metric]:
    return [Metric(name, kind, labels, unit, text, source) for name, unit, text in rows]


def _histograms(source: str, *rows: tuple[str, str, tuple[float, ...], str]) -> list[Metric]:
    return [Metric(name, "histogram", _MODEL, unit, text, source, buckets) for name, unit, buckets, text in rows]


_ALL = (
    *_of(
        "counter",
        "ingress",
        _MODEL,
        ("vllm_prompt_tokens_total", "tokens", "Prompt tokens of requests that were answered with a token."),
        ("vllm_generation_tokens_total", "tokens", "Tokens that clients were sent."),
    ),
    *_of(
        "counter",
        "ingress",
        ("model_name", "finished_reason"),
        ("vllm_request_success_total", "requests", "Outputs that ended: stop, length, abort (client left) or error."),
    ),
    *_histograms(
        "ingress",
        ("vllm_time_to_first_token_seconds", "seconds", _FIRST_TOKEN_SECONDS, "From admission to the first token."),
        ("vllm_inter_token_latency_seconds", "seconds", _TOKEN_SECONDS, "Between two tokens of one output."),
        (
            "vllm_request_time_per_output_token_seconds",
            "seconds",
            _TOKEN_SECONDS,
            "Mean time per token after the first, of each finished output.",
        ),
        ("vllm_e2e_request_latency_seconds", "seconds", _REQUEST_SECONDS, "From admission to the last token."),
        (
            "vllm_request_queue_time_seconds",
            "seconds",
            _REQUEST_SECONDS,
            "In an engine's queue. This and the next three are measured by the engine that finished the output.",
        ),
        ("vllm_request_prefill_time_seconds", "seconds", _REQUEST_SECONDS, "From the queue to the first token."),
        ("vllm_request_decode_time_seconds", "seconds", _REQUEST_SECONDS, "From the first token to the last."),
        ("vllm_request_inference_time_seconds", "seconds", _REQUEST_SECONDS, "From the queue to the last token."),
        ("vllm_request_prompt_tokens", "tokens", _TOKENS, "Prompt tokens of each finished output."),
        ("vllm_request_generation_tokens", "tokens", _TOKENS, "Tokens of each finished output."),
    ),
    *_of(
        "gauge",
        "ingress",
        _ENGINE,
        ("vllm_num_requests_running", "requests", "Sequences in an engine's running batch."),
        ("vllm_num_requests_waiting", "requests", "Sequences that wait in an engine's queue."),
        ("vllm_kv_cache_usage_perc", "fraction", "Share of an engine's cache blocks in use; 1 is all of them."),
    ),
    *_of(
        "counter",
        "attention worker",
        _ENGINE,
        ("vllm_num_preemptions_total", "preemptions", "Sequences put back into the queue for want of cache blocks."),
        (
            "vllm_prefix_cache_queries_total",
            "tokens",
            "Tokens looked up in an engine's prefix cache: those of prompts, and output that a retry brings.",
        ),
        ("vllm_prefix_cache_hits_total", "tokens", "Of these, the ones found there, which were not computed again."),
        (
            "vllm_spec_decode_num_draft_tokens_total",
            "tokens",
            "Drafts that were computed with a sequence's last token; none unless engine.speculative is set.",
        ),
        ("vllm_spec_decode_num_accepted_tokens_total", "tokens", "Of these, the ones that were right."),
        ("moe_kv_blocks_sent_total", "blocks", "Full cache blocks sent to the worker that keeps copies of them."),
        ("moe_kv_blocks_received_total", "blocks", "Copies of another worker's blocks taken into the prefix cache."),
        (
            "moe_kv_blocks_dropped_total",
            "blocks",
            "Blocks that were not sent, or copies not taken, because too many waited.",
        ),
        ("moe_frames_total", "frames", "Frames sent to expert shards."),
        ("moe_frames_resent_total", "frames", "Of these, the ones sent again because a shard had gone or was late."),
        ("moe_frames_hedged_total", "frames", "Calls given to another shard because their answer was overdue."),
        ("moe_experts_wrong_total", "experts", "Experts whose weights in a shard's memory gave values not finite."),
    ),
    *_of(
        "counter",
        "attention worker",
        ("model_name", "engine", "layer", "expert"),
        (
            "moe_expert_tokens_total",
            "tokens",
            "Tokens that the gate sent to an expert. Left out where layers times experts exceed 2048.",
        ),
    ),
    *_of(
        "gauge",
        "attention worker",
        ("model_name", "engine", "layer"),
        (
            "moe_expert_load_max_over_mean",
            "ratio",
            "Tokens of a layer's busiest expert over the mean, since the last export with any; 1 is balance.",
        ),
    ),
    *[
        Metric(name, "histogram", _ENGINE, "seconds", text, "attention worker", _STEP_SECONDS)
        for name, text in (
            ("moe_dispatch_seconds", "Per engine step, all layers together: planning and sending expert calls."),
            ("moe_combine_seconds", "Per engine step, all layers together: waiting for and taking the answers."),
        )
    ],
    *_of(
        "counter",
        "expert shard",
        _SHARD,
        ("moe_shard_calls_total", "calls", "Expert calls answered."),
        (
            "moe_shard_computations_total",
            "computations",
            "Computations of calls; fewer than calls where several workers' were computed together.",
        ),
        ("moe_shard_pairs_total", "pairs", "(token, expert) pairs computed."),
        ("moe_shard_compute_seconds_total", "seconds", "Time spent computing experts."),
    ),
    *_of(
        "gauge",
        "router",
        _SHARD,
        ("moe_shard_up", "0 or 1", "1 while the shard's process answers for its experts."),
        ("moe_shard_restarts", "restarts", "Times the shard's process was replaced since the deployment started."),
    ),
    *_of(
        "gauge",
        "router",
        _ENGINE,
        ("moe_engine_up", "0 or 1", "1 while the attention worker takes requests."),
        ("moe_engine_restarts", "restarts", "Times its process was replaced since the deployment started."),
    ),
    *_of(
        "gauge",
        "router",
        _MODEL,
        ("moe_requests_in_flight", "requests", "Requests that the router has given to a worker and not got back."),
        ("moe_routing_table_epoch", "epoch", "Version of the routing table; it rises when a shard comes or goes."),
    ),
)
METRICS = {metric.name: metric for metric in _ALL}
"""By name."""

MAX_EXPERT_SERIES = 2048
"""Above this many (layer, expert) pairs `moe_expert_tokens_total` is left out: each would be a time series."""

_BEGIN, _END = "<!-- metrics: begin -->\n", "<!-- metrics: end -->"


def markdown_table() -> str:
    """The table of docs/metrics.md."""
    lines = ["| name | kind | labels | unit | from | meaning |", "|---|---|---|---|---|---|"]
    for metric in METRICS.values():
        labels = ", ".join(metric.labels)
        lines.append(
            f"| `ray_{metric.name}` | {metric.kind} | {labels} | {metric.unit} | {metric.source} | {metric.help} |"
        )
    return "\n".join(lines) + "\n"


def with_table(document: str) -> str:
    """`document` with the table between its two marks brought up to date."""
    before, _, rest = document.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{markdown_table()}{_END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
