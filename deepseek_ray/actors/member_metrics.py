"""Which figures attention workers and expert shards export."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.actors.expert_client import RemoteExperts
from deepseek_ray.actors.expert_service import ExpertService
from deepseek_ray.actors.kv_copies import CopyCounts
from deepseek_ray.actors.metrics_export import MetricsExporter
from deepseek_ray.engine.stats import EngineStats
from deepseek_ray.metrics import MAX_EXPERT_SERIES


class WorkerMetrics:
    """An attention worker's. `stats` gives its engine's figures, None before there is an engine."""

    def __init__(
        self,
        exporter: MetricsExporter,
        experts: RemoteExperts,
        stats: Callable[[], EngineStats | None],
        copies: Callable[[], CopyCounts],
    ) -> None:
        self._exporter = exporter
        self._experts = experts
        self._stats = stats
        self._copies = copies
        self._exported: dict[int, NDArray[np.int64]] = {}

    def collect(self) -> None:
        exporter, experts = self._exporter, self._experts
        if stats := self._stats():
            exporter.total("vllm_num_preemptions_total", stats.num_preemptions)
            exporter.total("vllm_prefix_cache_queries_total", stats.num_prefix_cache_queries)
            exporter.total("vllm_prefix_cache_hits_total", stats.num_prefix_cache_hits)
            exporter.total("vllm_spec_decode_num_draft_tokens_total", stats.num_draft_tokens)
            exporter.total("vllm_spec_decode_num_accepted_tokens_total", stats.num_accepted_tokens)
        for name, count in self._copies()._asdict().items():
            exporter.total(f"moe_kv_blocks_{name}_total", count)
        exporter.total("moe_frames_total", experts.num_frames)
        exporter.total("moe_frames_resent_total", experts.num_frames_resent)
        exporter.total("moe_frames_hedged_total", experts.num_frames_hedged)
        exporter.total("moe_experts_wrong_total", experts.num_experts_wrong)
        steps = experts.meter.take_steps()
        exporter.observe("moe_dispatch_seconds", (dispatch for dispatch, _ in steps))
        exporter.observe("moe_combine_seconds", (combine for _, combine in steps))
        self._collect_experts()

    def _collect_experts(self) -> None:
        totals = {layer: counts.copy() for layer, counts in list(self._experts.meter.num_tokens.items())}
        per_expert = sum(map(len, totals.values())) <= MAX_EXPERT_SERIES
        for layer, counts in totals.items():
            new = counts - self._exported.get(layer, 0)
            if new.any():
                self._exporter.set("moe_expert_load_max_over_mean", float(new.max() / new.mean()), layer=str(layer))
            for expert in np.flatnonzero(new) if per_expert else ():
                self._exporter.add("moe_expert_tokens_total", float(new[expert]), layer=str(layer), expert=str(expert))
        self._exported = totals


def export_shard(exporter: MetricsExporter, service: ExpertService) -> None:
    """An expert shard's."""
    exporter.total("moe_shard_calls_total", service.num_calls)
    exporter.total("moe_shard_computations_total", service.calls.num_computations)
    exporter.total("moe_shard_pairs_total", service.num_pairs)
    exporter.total("moe_shard_compute_seconds_total", service.compute_seconds)
