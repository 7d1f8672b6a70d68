"""The ingress's figures, once a second: what clients felt, and how full the engines behind it are."""

from __future__ import annotations

import asyncio
import logging

from deepseek_ray.actors.metrics_export import EXPORT_SECONDS, MetricsExporter
from deepseek_ray.actors.request_session import DeploymentClient
from deepseek_ray.serving.request_metrics import MeasuredBackend, RequestTally

logger = logging.getLogger(__name__)

_WORKER = "attention_worker/"


async def export_metrics(model_name: str, backend: MeasuredBackend, client: DeploymentClient) -> None:
    """Runs until it is cancelled. Every ingress replica shows the engines' figures: take their maximum, not their sum.

    Ray's dashboard for LLMs joins all of them with the Serve replica that serves, which is this process.
    """
    exporter = MetricsExporter(model_name=model_name)
    while True:
        await asyncio.sleep(EXPORT_SECONDS)
        try:
            export_tally(exporter, backend.take())
            export_engines(exporter, await client.stats())
        except Exception:  # figures are not worth a failed request
            logger.exception("metrics were not exported")


def export_tally(exporter: MetricsExporter, tally: RequestTally) -> None:
    for name, amount in tally.amounts.items():
        exporter.add(name, amount)
    for reason, count in tally.finished.items():
        exporter.add("vllm_request_success_total", count, finished_reason=reason)
    for name, values in tally.observed.items():
        exporter.observe(name, values)


def export_engines(exporter: MetricsExporter, stats: dict[str, dict[str, float]]) -> None:
    """`stats` by `role/id`, as `Router.stats` gives them."""
    for member, figures in stats.items():
        if not member.startswith(_WORKER) or "num_running" not in figures:
            continue
        engine = member.removeprefix(_WORKER)
        usage = figures["num_kv_blocks_used"] / max(1.0, figures["num_kv_blocks_total"])
        exporter.set("vllm_num_requests_running", figures["num_running"], engine=engine)
        exporter.set("vllm_num_requests_waiting", figures["num_waiting"], engine=engine)
        exporter.set("vllm_kv_cache_usage_perc", usage, engine=engine)
