"""DeepSpeed's ZeRO: optimiser state (stage 1), gradients (2) and weights (3) are shared out, on the host if wanted.

DeepSpeed is given torch's own AdamW, also with `offload`, where it would rather compile one of its own: the update is a
small part of a step, a compiler is not on every machine, and the state then means the same in every strategy. It works
in float32 and leaves bf16 to autocast, as the other strategies do.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.nn.experts import Experts
from deepseek_ray.training.optimizer import build_optimizer, set_learning_rate
from deepseek_ray.training.optimizer_state import STATE_KINDS, OptimizerFile, state_name
from deepseek_ray.training.parallel import Forward, Parallelism

_LARGEST_BUCKET = 500_000_000
"""Elements; DeepSpeed's own default, allocated at once, so that small models take less."""


class DeepSpeedZero(Parallelism):
    """A DeepSpeed engine around the model; the engine's ZeRO optimiser around AdamW."""

    def _shard(self, model: DeepSeekForCausalLM) -> Forward:
        deepspeed = _import_quietly(self.world.device)
        if self._stage == 3 and model.moe_modules:
            # An expert stack is fetched as one piece, whichever experts have tokens.
            deepspeed.utils.set_z3_leaf_modules(model, [Experts])
        self._parameters = dict(model.named_parameters())
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=model.to(self.world.device),
            optimizer=build_optimizer(model.named_parameters(), self.config.optimizer),
            config=self._engine_config(),
            dist_init_required=False,
        )
        self._deepspeed = deepspeed
        return self._engine

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with the state of no update yet: ZeRO maps it to parameters once, before every group has had a step."""
        inner = self._zero.optimizer
        for flat in self._flat_partitions():
            inner.state[flat] = {
                kind: torch.tensor(0.0) if kind == "step" else torch.zeros_like(flat) for kind in STATE_KINDS
            }
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        return inner

    @property
    def _stage(self) -> int:
        return self.config.distributed.zero_stage

    def _engine_config(self) -> dict[str, Any]:
        training, hidden = self.config.training, self.config.model.hidden_size
        bucket = min(_LARGEST_BUCKET, sum(math.prod(shape) for shape in self.trained.values()))
        zero: dict[str, Any] = {"stage": self._stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self._stage == 3:
            # Vectors stay whole: fetching one costs a message and saves nothing.
            zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": hidden}
        if self.config.distributed.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            zero |= {"offload_param": {"device": "cpu"}} if self._stage == 3 else {}
        bf16 = training.precision == "bf16"
        return {
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": self.config.accumulation_steps,
            "gradient_clipping": training.clip_grad_norm,
            "steps_per_print": 2**62,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            # No module is "safe": gradients are exchanged in float32.
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }

    def _exchange(self, is_last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.data.world_size, scale_wrt_gas=False)  # its exchange takes the mean

    def clip_gradients(self, max_norm: float) -> float:
        """Only the norm, which the engine computes again when it clips, in `update`."""
        if self._stage == 3:
            norms = [float(norm) for norm in self._zero._get_norm_groups()]
            norm = math.hypot(*norms) if min(norms) >= 0 else math.nan
        else:
            norm = float(self._zero.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed says -1 for what is not finite

    def update(self, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)
        self._engine.step()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if hasattr(tensor, "ds_id"):
                with self._deepspeed.zero.GatheredParameters([tensor]):
                    full = tensor.detach().clone()
                yield name, full
            else:
                yield name, tensor.detach()

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        read = self._deepspeed.utils.safe_get_full_optimizer_state
        updates = max(float(state["step"]) for state in self.optimizer.state.values())
        for name in self.trained:
            for kind in STATE_KINDS:
                whole = torch.tensor(updates) if kind == "step" else read(self._parameters[name], kind)
                yield state_name(kind, name), whole

    def load_optimizer_state(self, file: OptimizerFile) -> None:
        states = {name: file.state(name) for name in self.trained}
        updates = {float(state["step"]) for state in states.values() if state}
        if len(updates) > 1:
            raise CheckpointError(
                f"the checkpoint's parameters were updated {sorted(int(count) for count in updates)} times, DeepSpeed "
                "keeps one count for all; resume with distributed.strategy ddp or fsdp"
            )
        for flat in self._flat_partitions():
            self.optimizer.state[flat]["step"].fill_(max(updates, default=0.0))
        write = self._deepspeed.utils.safe_set_full_optimizer_state
        for name, state in states.items():
            for kind in STATE_KINDS:
                if kind != "step" and state:
                    write(self._parameters[name], state[kind].to(self.world.device), kind)

    def _flat_partitions(self) -> list[Tensor]:
        """What AdamW updates: this worker's part of each parameter group, one vector."""
        return (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )


def _import_quietly(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise find out by trying, its log kept to errors."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        # Its own all-reduce for CPUs would be compiled now, by every worker that starts; gloo's is there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    return deepspeed
