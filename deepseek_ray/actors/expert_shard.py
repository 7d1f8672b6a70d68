"""The expert shard actor: routed experts in a process of their own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec
import ray
import torch

from deepseek_ray.actors.expert_service import ExpertService
from deepseek_ray.actors.member import Member
from deepseek_ray.actors.member_metrics import export_shard
from deepseek_ray.actors.metrics_export import MetricsExporter, export_every_second
from deepseek_ray.actors.record import require_record
from deepseek_ray.control.membership import Directive, MemberReport, MemberState
from deepseek_ray.links.connect import listen
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore

logger = logging.getLogger(__name__)


class ExpertShard:
    """Loads the experts the router assigns and answers for them. `actors/shells.py` makes it an actor."""

    def __init__(self, deployment: str, id: int, threads: int) -> None:
        torch.set_num_threads(threads)
        record = require_record(deployment)
        self._config = record.config
        self._reader = CheckpointReader(Path(self._config.model_dir))
        self._state: MemberState = "starting"
        self._error: str | None = None
        self._member = Member(record, "expert_shard", id, self._report, self._obey)
        self._listener = listen(
            node_id=self._member.node_id,
            tcp_host=ray.util.get_node_ip_address(),
            deployment=deployment,
            secret=record.secret,
            transport=self._config.transport,
            incarnation=self._member.identity.incarnation,
        )
        self._service = ExpertService(self._listener, self._reader.config.hidden_size)
        self._service.start()
        exporter = MetricsExporter(model_name=record.description.served_model_name, shard=str(id))
        export_every_second(functools.partial(export_shard, exporter, self._service))
        self._member.start()

    def _report(self, identity: MemberReport) -> MemberReport:
        return msgspec.structs.replace(
            identity,
            state=self._state,
            error=self._error,
            endpoints=self._listener.endpoints,
            stats={"calls": self._service.num_calls, "pairs": self._service.num_pairs},
        )

    def _obey(self, directive: Directive) -> None:
        if directive.held is None or self._state != "starting":
            return
        self._state = "loading"
        try:
            self._service.hold(self._load(directive.held))
            self._state = "ready"
        except Exception as error:  # reported to whoever started the deployment, who ends it
            logger.exception("cannot hold the assigned experts")
            self._state, self._error = "failed", str(error)
        self._member.report_now()

    def _load(self, held: Mapping[int, list[int]]) -> ExpertStore:
        return ExpertStore(self._reader, held, getattr(torch, self._config.dtype))
