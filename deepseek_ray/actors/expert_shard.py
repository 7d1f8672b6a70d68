"""The expert shard actor: routed experts in a process of their own."""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec
import ray
import torch

from deepseek_ray.actors.expert_loader import ExpertLoader
from deepseek_ray.actors.expert_service import ExpertService
from deepseek_ray.actors.member import Member
from deepseek_ray.actors.member_memory import memory_bytes
from deepseek_ray.actors.member_metrics import export_shard
from deepseek_ray.actors.metrics_export import MetricsExporter, export_every_second
from deepseek_ray.actors.record import require_record
from deepseek_ray.actors.tensor_link import place_of
from deepseek_ray.control.reports import Directive, MemberReport, MemberState
from deepseek_ray.control.shard_figures import EXPERTS_SHARE
from deepseek_ray.kernels.quantize import bytes_per_weight
from deepseek_ray.kernels.select import select_kernels, usable_device
from deepseek_ray.links.connect import listen
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_speed import seconds_per_expert
from deepseek_ray.models.expert_store import ExpertStore

_GOLDEN_RATIO = 0.618
"""Its multiples modulo 1 are far from each other, however many there are."""


class ExpertShard:
    """Holds the experts the router assigns and answers for them. `actors/shells.py` makes it an actor."""

    def __init__(self, deployment: str, id: int, threads: int) -> None:
        torch.set_num_threads(threads)
        record = require_record(deployment)
        config = record.config
        device = usable_device(config.expert_device)
        reader = CheckpointReader(Path(config.model_dir))
        self._member = Member(record, "expert_shard", id, self._report, self._obey)
        self._listener = listen(
            node_id=self._member.node_id,
            tcp_host=ray.util.get_node_ip_address(),
            deployment=deployment,
            secret=record.secret,
            transport=config.transport,
            incarnation=self._member.identity.incarnation,
            tensors=place_of(device) if config.sends_tensors else None,
        )
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._hidden_size = reader.config.hidden_size
        self._store = ExpertStore(
            reader,
            {},
            self._dtype,
            select_kernels(config.engine.deterministic, device),
            shared_files=config.packed_files,
            device=device,
            quantization=config.quantization,
        )
        weights = reader.config.num_expert_parameters
        self._expert_bytes = weights * bytes_per_weight(config.quantization, self._dtype)
        self._memory_bytes = memory_bytes(self._store.device, config.gpus_per_member)
        self._threads = threads
        self._loader = ExpertLoader(
            self._store,
            changed=self.report_now,
            measure=self._measure,
            begin_at=id * _GOLDEN_RATIO % 1,
            ahead_bytes=EXPERTS_SHARE * self._memory_bytes if self._store.device.type == "cpu" else 0,
        )
        self._service = ExpertService(self._listener, self._store, self._hidden_size)
        self._service.start()
        exporter = MetricsExporter(model_name=record.description.served_model_name, shard=str(id))
        export_every_second(functools.partial(export_shard, exporter, self._service))
        self._member.start()

    def _measure(self) -> float:
        """With the threads that calls have; the loader's own thread has one."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return seconds_per_expert(self._store, self._hidden_size, self._dtype)
        finally:
            torch.set_num_threads(before)

    def report_now(self) -> None:
        self._member.report_now()

    def _report(self, identity: MemberReport) -> MemberReport:
        return msgspec.structs.replace(
            identity,
            state=self._state,
            error=self._loader.error,
            endpoints=self._listener.endpoints,
            held=self._store.held,
            stats={
                "calls": self._service.num_calls,
                "computations": self._service.calls.num_computations,
                "pairs": self._service.num_pairs,
                "compute_seconds": self._service.compute_seconds,
                "seconds_per_expert": self._loader.measured,
                "expert_bytes": self._expert_bytes,
                "memory_bytes": self._memory_bytes,
                "memory_is_own": float(self._store.device.type == "cuda"),
                "experts_reloaded": self._service.num_reloaded,
            },
        )

    @property
    def _state(self) -> MemberState:
        if self._loader.has_loaded:
            return "ready"
        return "failed" if self._loader.error else "loading"

    def _obey(self, directive: Directive) -> None:
        if directive.held is not None:
            self._loader.want(directive.held)
