"""Every worker holds the whole model; the gradients are averaged. One worker is the same without the exchange."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.nn.parallel import DistributedDataParallel

from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.training.parallel import Forward, Parallelism


class DataParallel(Parallelism):
    """torch's DistributedDataParallel. Gradients are exchanged once a step, in the last micro-batch's backward."""

    _wrapped: DistributedDataParallel | None = None

    def _shard(self, model: DeepSeekForCausalLM) -> Forward:
        model.to(self.world.device)
        if self.world.world_size == 1:
            return model
        # Buffers are not broadcast: every worker moves the correction biases by the same counts.
        self._wrapped = DistributedDataParallel(
            model,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        return self._wrapped

    def _exchange(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last or self._wrapped is None else self._wrapped.no_sync()
