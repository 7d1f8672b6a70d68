"""Which figures the router exports: who is there, and what is on its way."""

from __future__ import annotations

from deepseek_ray.actors.metrics_export import MetricsExporter
from deepseek_ray.control.admission import Admission
from deepseek_ray.control.membership import Membership


def export_router(exporter: MetricsExporter, membership: Membership, admission: Admission, now: float) -> None:
    """Once a second. `now` is the monotonic time that the membership is asked about."""
    exporter.set("moe_requests_in_flight", admission.in_flight)
    exporter.set("moe_routing_table_epoch", membership.epoch)
    for row in membership.status(now):
        kind, label = ("shard", "shard") if row["role"] == "expert_shard" else ("engine", "engine")
        labels = {label: str(row["id"])}
        exporter.set(f"moe_{kind}_up", float(row["state"] == "ready"), **labels)
        exporter.set(f"moe_{kind}_restarts", float(row["restarts"]), **labels)
