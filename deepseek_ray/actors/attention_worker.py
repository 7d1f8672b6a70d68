"""The attention worker actor: an engine, its attention weights and latent cache, and links to expert shards."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path

import msgspec
import ray
import torch

from deepseek_ray.actors.expert_client import RemoteExperts
from deepseek_ray.actors.kv_copies import CopyCounts, CopySender
from deepseek_ray.actors.member import Member
from deepseek_ray.actors.member_metrics import WorkerMetrics
from deepseek_ray.actors.metrics_export import MetricsExporter, export_every_second
from deepseek_ray.actors.record import require_record
from deepseek_ray.actors.shard_directory import ShardDirectory
from deepseek_ray.actors.tensor_link import place_of
from deepseek_ray.actors.token_service import TokenService
from deepseek_ray.control.reports import Directive, MemberReport, MemberState, ShardAddress, WorkerView
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.offline import tokenizer_beside
from deepseek_ray.engine.stats import EngineStats
from deepseek_ray.errors import RequestError
from deepseek_ray.kernels.quantize import bytes_per_weight
from deepseek_ray.kernels.select import select_kernels, usable_device
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.paged_decoder import PagedDecoder

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 2.0
_LOAD_REPORT_SECONDS = 2.0


class AttentionWorker:
    """Owns one engine. `actors/shells.py` makes it an actor."""

    def __init__(self, deployment: str, id: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._record = require_record(deployment)
        self._config = self._record.config
        self._state: MemberState = "starting"
        self._error: str | None = None
        self._engine: Engine | None = None
        self._directory = ShardDirectory()
        self._table_arrived = threading.Event()
        self._load_reported = 0.0
        self._member = Member(self._record, "attention_worker", id, self._report, self._obey)
        self._listener = listen(
            node_id=self._member.node_id,
            tcp_host=ray.util.get_node_ip_address(),
            deployment=deployment,
            secret=self._record.secret,
            transport=self._config.transport,
            incarnation=self._member.identity.incarnation,
        )
        self._copies = CopySender(self._connect) if self._config.kv_copies else None
        self._service = TokenService(self._listener, _exit_at_once, self._after_step, self._config.kv_copies)
        on_cores = self._config.attention_device == self._config.expert_device == "cpu"
        by_tensor = self._config.sends_tensors
        self._tensors = place_of(torch.device("cuda")) if by_tensor else None
        self._experts = RemoteExperts(
            self._directory,
            self._connect,
            self._member.identity.incarnation,
            ask_for_news=self._member.report_now,
            interrupted=self._service.interrupted,
            hedge_after_seconds=self._config.hedge_after_seconds,
            node_with_our_cores=self._member.node_id if on_cores else None,
            device="cuda" if by_tensor else "cpu",
            weight_bytes=bytes_per_weight(self._config.quantization, getattr(torch, self._config.dtype)),
        )
        exporter = MetricsExporter(model_name=self._record.description.served_model_name, engine=str(id))
        export_every_second(WorkerMetrics(exporter, self._experts, self._stats, self._copy_counts).collect)
        threading.Thread(target=self._load, name="load", daemon=True).start()
        self._member.start()

    def report_now(self) -> None:
        self._member.report_now()

    def _load(self) -> None:
        """Read the weights, wait for the routing table, begin to serve."""
        self._state = "loading"
        try:
            reader = CheckpointReader(Path(self._config.model_dir))
            dtype, device = getattr(torch, self._config.dtype), usable_device(self._config.attention_device)
            kernels = select_kernels(self._config.engine.deterministic, device)
            decoder = PagedDecoder(
                reader,
                dtype,
                self._experts,
                kernels,
                device=device,
                quantization=self._config.quantization,
                with_mtp=self._config.engine.uses_mtp,
                micro_batches=self._config.engine.micro_batches,
            )
            engine = Engine(decoder, tokenizer_beside(self._config.model_dir), self._config.engine)
            if engine.grammars:
                with contextlib.suppress(RequestError):  # said to whoever asks for a structured output
                    engine.grammars.load()  # now: later it would hold up everybody's tokens
        except Exception as error:  # reported to whoever started the deployment, who ends it
            logger.exception("cannot load the model")
            self._state, self._error = "failed", str(error)
            self._member.report_now()
            return
        self._table_arrived.wait()
        self._engine = engine
        self._service.start(engine)
        self._state = "ready"
        self._member.report_now()

    def _connect(self, address: ShardAddress | WorkerView) -> Link:
        return connect(
            address.endpoints,
            node_id=self._member.node_id,
            deployment=self._record.description.name,
            secret=self._record.secret,
            transport=self._config.transport,
            timeout=_CONNECT_SECONDS,
            tensors=self._tensors,
        )

    def _report(self, identity: MemberReport) -> MemberReport:
        experts = self._experts
        stats = {
            "frames": experts.num_frames,
            "frames_resent": experts.num_frames_resent,
            "frames_hedged": experts.num_frames_hedged,
        }
        if (engine := self._stats()) is not None:
            stats |= msgspec.structs.asdict(engine)
        stats |= {f"kv_blocks_{name}": count for name, count in self._copy_counts()._asdict().items()}
        return msgspec.structs.replace(
            identity,
            state=self._state,
            error=self._error,
            endpoints=self._listener.endpoints,
            table_version=self._directory.version,
            lost_shards=experts.lost_shards(),
            expert_tokens=self._expert_tokens(),
            stats=stats,
        )

    def _expert_tokens(self) -> dict[int, list[int]]:
        """Every few seconds: for a large model these are thousands of numbers."""
        now = time.monotonic()
        if now - self._load_reported < _LOAD_REPORT_SECONDS:
            return {}
        self._load_reported = now
        return {layer: counts.tolist() for layer, counts in list(self._experts.meter.num_tokens.items())}

    def _stats(self) -> EngineStats | None:
        return None if self._engine is None else self._engine.stats()

    def _after_step(self) -> None:
        self._experts.meter.end_step()
        if self._copies is not None and self._engine is not None:
            self._copies.after_step(self._engine.copies)

    def _copy_counts(self) -> CopyCounts:
        sender, inbox = self._copies, self._service.copies
        if sender is None or inbox is None:
            return CopyCounts()
        return CopyCounts(sender.num_sent, inbox.num_received, sender.num_dropped + inbox.num_dropped)

    def _obey(self, directive: Directive) -> None:
        if self._copies is not None:
            self._copies.follow(directive.peer)
        if directive.table is not None:
            self._directory.update(directive.table, directive.shards)
            self._table_arrived.set()


def _exit_at_once(error: BaseException) -> None:
    """A worker without its engine loop is never half alive: Ray starts a new process, clients see the links end."""
    logger.critical("attention worker exits: %s", error)
    os._exit(1)
