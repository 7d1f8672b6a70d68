"""Pipeline parallel training: each worker of the "pipeline" dimension has some layers, micro-batches flow through.

The first stage has the embedding, the last one norm, head and multi-token-prediction layers; layers are shared out so
that the largest stage has the fewest parameters. The micro-batches of a step are those of gradient accumulation, so
results are the same for any number of stages. Schedules (torch.distributed.pipelining):

    1f1b     one forward, one backward in turn; a stage keeps activations of at most `stages` micro-batches
    gpipe    all forwards, then all backwards; a stage keeps the activations of all micro-batches

With p stages and m micro-batches either leaves a worker idle for (p - 1) / (m + p - 1) of a step (arXiv 1811.06965,
section 2.3): take m several times p.

Each stage adds the balance loss of its layers in its own backward pass. Where the last stage needs the embedding (as a
tied head, or below multi-token-prediction layers), first and last stage each have one, equal from the start; their
gradients are summed, so they stay equal. The arithmetic of a layer is one process's; only sums over stages, such as
the gradient's norm, may round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.models.decoder import DeepSeekForCausalLM, ModelOutput
from deepseek_ray.training.collectives import sum_gradients
from deepseek_ray.training.loss import cross_entropy_sum
from deepseek_ray.training.objective import MicroBatch, Objective, autocast, trains_mtp
from deepseek_ray.training.optimizer_state import STATE_KINDS, state_name
from deepseek_ray.training.parallel import Forward
from deepseek_ray.training.parallel_mesh import MeshParallelism
from deepseek_ray.training.pipeline_stage import Stage, keep_stage, last_stage_embeds, num_gates, stage_layers
from deepseek_ray.training.ranks import Ranks

_SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class PipelineParallel(MeshParallelism):
    """data_parallel_size x pipeline_parallel_size workers."""

    _embedding: Sequence[Tensor] = ()
    """Of the first and the last stage, where both have one and train it."""

    def __init__(self, config: PretrainConfig, world: Ranks) -> None:
        super().__init__(config, world, "pipeline", config.distributed.pipeline_parallel_size)
        self.pipeline = Ranks.within(self.group, world.device)
        stages = torch.arange(world.world_size).view(-1, self.pipeline.world_size)
        self._ends = self._form_groups(stages[:, [0, -1]], "ends")
        """First and last stage."""

    def _shard(self, model: DeepSeekForCausalLM) -> Forward:
        layers = stage_layers(model, self.pipeline.world_size)[self.pipeline.rank]
        self._state_shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._stage = Stage(model, layers, self.config, num_gates(model, trains_mtp(self.config)))
        is_end = self._stage.is_first or self._stage.is_last
        if last_stage_embeds(model) and is_end and model.model.embed_tokens.weight.requires_grad:
            self._embedding = [model.model.embed_tokens.weight]
        keep_stage(model, layers)
        model.to(self.world.device)
        self._owners = self._find_owners(model)
        self._schedule = self._build_schedule()
        return _no_whole_forward

    def _find_owners(self, model: DeepSeekForCausalLM) -> dict[str, int]:
        """The first stage that has each tensor, by name."""
        names: list[list[str]] = [[] for _ in range(self.pipeline.world_size)]
        dist.all_gather_object(names, list(model.state_dict()), group=self.group)
        return {name: stage for stage in reversed(range(len(names))) for name in names[stage]}

    def _build_schedule(self) -> PipelineScheduleSingle:
        size = (self.config.training.micro_batch_size, self.config.data.sequence_length, self.config.model.hidden_size)
        hidden = torch.empty(size, device="meta", requires_grad=True)
        stage = PipelineStage(
            self._stage,
            self.pipeline.rank,
            self.pipeline.world_size,
            self.world.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if self._stage.is_first else hidden,
            output_args=torch.empty((), device="meta", requires_grad=True) if self._stage.is_last else hidden,
            group=self.group,
        )
        kind = _SCHEDULES[self.config.distributed.pipeline_schedule]
        # The last stage computes the loss itself, already divided by the counts of the whole step.
        return kind(stage, self.config.accumulation_steps, loss_fn=lambda loss, number: loss, scale_grads=False)

    def forward_backward(self, parts: Sequence[MicroBatch], objective: Objective) -> Tensor:
        self.model.train()
        self._stage.begin(parts, objective)
        numbers = torch.arange(len(parts))
        inputs = (numbers,) if self._stage.is_first else ()
        target = numbers if self._stage.is_last else None
        self._schedule.step(*inputs, number=numbers, target=target, return_outputs=False)
        self._sum_gradients()
        return self.pipeline.sum(self._stage.sums)

    def _sum_gradients(self) -> None:
        if self._embedding:
            sum_gradients(self._embedding, self._ends)
        super()._sum_gradients()

    def _num_holders(self, parameter: nn.Parameter) -> int:
        return 2 if any(parameter is own for own in self._embedding) else 1

    def counts_of_every_layer(self, own: Tensor) -> Tensor:
        """The rows of all stages, one after the other."""
        rows = self.pipeline.gather(torch.tensor([len(own)])).flatten().tolist()
        every = torch.zeros(sum(rows), self.config.model.n_routed_experts, dtype=torch.int64, device=self.world.device)
        if len(own):
            start = sum(rows[: self.pipeline.rank])
            every[start : start + len(own)] = own
        return self.pipeline.sum(every)

    @torch.no_grad()
    def validation_sums(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Of this stage's layers the expert loads; the cross-entropy is sent to every stage."""
        self.model.eval()
        hidden = torch.empty(*part.input_ids.shape, self.config.model.hidden_size, device=self.world.device)
        if not self._stage.is_first:
            dist.recv(hidden, group=self.group, group_src=self.pipeline.rank - 1)
        nats = torch.zeros((), device=self.world.device)
        with autocast(self.config, self.world.device):
            hidden, gates = self._stage.run_layers(hidden, part)
            if self._stage.is_last:
                nats = cross_entropy_sum(self.model.predict(hidden, part.input_ids).logits, part.targets[0])
            else:
                dist.send(hidden.contiguous(), group=self.group, group_dst=self.pipeline.rank + 1)
        experts = self.config.model.n_routed_experts
        loads = [gate.expert_ids.flatten().bincount(minlength=experts) for gate in gates]
        empty = torch.zeros(0, experts, dtype=torch.int64, device=self.world.device)
        return self.pipeline.sum(nats), torch.stack(loads) if loads else empty

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        own = self.model.state_dict()
        for name, shape in self._state_shapes.items():
            yield name, self._on_first_stage(name, own.get(name), shape)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.model.named_parameters())
        for name, shape in self.trained.items():
            state = self.optimizer.state.get(parameters[name], {}) if name in parameters else {}
            for kind in STATE_KINDS:
                size = () if kind == "step" else shape
                own = state.get(kind, torch.zeros(size)) if name in parameters else None
                yield state_name(kind, name), self._on_first_stage(name, own, size)

    def _on_first_stage(self, name: str, own: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """A float32 tensor of the parameter or buffer `name`, from the stage that has it; others get an empty one."""
        owner = self._owners[name]
        if self.pipeline.rank not in (0, owner):
            return torch.empty(0)
        if owner == 0:
            assert own is not None
            return own
        if self.pipeline.rank == owner:
            assert own is not None
            dist.send(own.to(self.world.device).contiguous(), group=self.group, group_dst=0)
            return own
        value = torch.empty(shape, device=self.world.device)
        dist.recv(value, group=self.group, group_src=owner)
        return value


def _no_whole_forward(*inputs: object, **options: object) -> ModelOutput:
    raise AssertionError("no worker of a pipeline computes a whole forward pass")
