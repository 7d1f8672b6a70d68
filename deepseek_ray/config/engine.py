"""What an engine and a deployment are: the settings behind `LLM(...)` and `deepseek-ray serve`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig

Device = Literal["cpu", "cuda"]
InferenceDtype = Literal["float32", "bfloat16"]


class SpeculativeConfig(FrozenConfig):
    """Drafts of the next tokens that the model checks in one step; what it gives stays the same, see
    `engine/speculation.py`."""

    method: Literal["mtp", "ngram"]
    """"mtp" asks the checkpoint's multi-token-prediction layer, "ngram" takes what followed the last tokens before."""
    num_tokens: int = Field(default=1, ge=1, le=32)
    """Most tokens drafted at once; the multi-token-prediction layer drafts one."""

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        if self.method == "mtp" and self.num_tokens != 1:
            raise ValueError(f"num_tokens is {self.num_tokens} and method mtp, which drafts one token; set it to 1")
        return self


class EngineConfig(FrozenConfig):
    """Continuous batching and the latent KV cache of one attention worker."""

    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens per cache block."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """Bytes of latent KV cache; None takes room for `max_num_seqs` sequences of `max_model_len`, at most 1 GiB."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that run in one step."""
    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Most tokens computed in one step; longer prompts are prefilled in chunks."""
    max_waiting: int = Field(default=256, ge=0)
    """Most requests that wait in one engine; beyond it a request is refused."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt + output in tokens; None takes the model's `max_position_embeddings`."""
    deterministic: bool = True
    """Whether a row's bits depend on nothing but the row, so that output is the same whatever the batch, the shards and
    the failures; False takes torch's operators, which may part at near-ties."""
    prefix_caching: bool = True
    """Keep the latents of computed tokens until their room is needed, for sequences that begin with the same tokens."""
    micro_batches: int = Field(default=1, ge=1, le=8)
    """Parts of a step of which one is with the experts while another is with attention; 3 or 4 hide experts and network
    where the shards are on nodes of their own and steps are large. Each part reads the weights once more."""
    speculative: SpeculativeConfig | None = None
    """Draft tokens and check several in one step; None computes one token of each sequence at a time."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs where attention and experts are on the GPU of one process (`LLM`); off, every
    operator of a step is launched by itself, which saves the seconds that capturing takes."""
    seed: int = 0
    """Seed of requests that bring none (mixed with the request id)."""

    @property
    def uses_mtp(self) -> bool:
        """Whether the multi-token-prediction layer is loaded and run."""
        return self.speculative is not None and self.speculative.method == "mtp"


class AutoscaleConfig(FrozenConfig):
    """Limits within which a deployment follows its load; see `control/autoscale.py`."""

    min_workers: int = Field(default=1, ge=1)
    """Fewest attention workers."""
    max_workers: int = Field(default=4, ge=1)
    """Most attention workers."""
    min_shards: int = Field(default=1, ge=1)
    """Fewest expert shards."""
    max_shards: int = Field(default=8, ge=1)
    """Most expert shards."""
    up_seconds: float = Field(default=5.0, ge=0)
    """How long there must be too much to do before one is added."""
    down_seconds: float = Field(default=120.0, ge=0)
    """How long there must be too little before one ends."""
    rest_seconds: float = Field(default=30.0, ge=0)
    """After a change the next one waits this long, so that its effect is seen."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        for role in ("workers", "shards"):
            least, most = getattr(self, f"min_{role}"), getattr(self, f"max_{role}")
            if least > most:
                raise ValueError(f"min_{role} is {least} and max_{role} {most}; raise max_{role}")
        return self


class DeploymentConfig(FrozenConfig):
    """One served model: a router, attention workers and expert shards."""

    name: str = Field(default="default", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$")
    """Name of the deployment on its cluster."""
    model_dir: str
    """Checkpoint directory in the Hugging Face layout, readable on every node under this path."""
    served_model_name: str | None = None
    """Name clients use; None takes the directory's name."""
    dtype: InferenceDtype = "bfloat16"
    """Type of weights and activations."""
    quantization: Literal["int8", "int4"] | None = None
    """Experts and linear layers with weights of fewer bits than `dtype`, made when the checkpoint is read; "int8" has
    a scale for each output, "int4" one for each 32 inputs of an output."""
    attention_device: Device = "cpu"
    """What attention workers compute on; "cuda" needs `engine.deterministic: false`."""
    expert_device: Device = "cpu"
    """What expert shards compute on, whatever attention does."""
    gpus_per_member: float = Field(default=1.0, gt=0)
    """GPUs that each member on "cuda" asks Ray for; 0.5 puts two on one."""
    attention_workers: int = Field(default=1, ge=1)
    """Processes that own attention and the KV cache, each of its own sequences."""
    expert_shards: int = Field(default=2, ge=1)
    """Processes among which the routed experts of every layer are divided."""
    expert_replicas: int = Field(default=1, ge=1)
    """Expert shards that hold each expert; with 2 the loss of one shard is not waited for."""
    extra_replicas: int = Field(default=0, ge=0)
    """Replicas that a layer may have beyond these, for the experts that have most to do."""
    rebalance_interval_seconds: float | None = Field(default=None, gt=0)
    """How often experts are moved to where the load asks for it; None leaves it to `deepseek-ray rebalance`."""
    autoscale: AutoscaleConfig | None = None
    """Follow the load between these limits; None keeps the numbers above until `deepseek-ray scale`."""
    standby_shards: int = Field(default=0, ge=0)
    """Processes that hold no experts and take the place of an expert shard that is lost."""
    stand_in_after_seconds: float | None = Field(default=8.0, gt=0)
    """An expert shard that is away for this long has its experts loaded by the others, as far as their memory allows,
    until it is back; a process that ends is started again sooner, a host that is cut off is not. None waits for it."""
    attention_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that attention workers run on (`ray start --labels`); empty takes any node."""
    expert_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that expert shards run on; empty takes any node."""
    threads: int | None = Field(default=None, ge=1)
    """Cores the whole engine may use; None takes all of them."""
    reserve_cpus: bool = False
    """Attention workers and expert shards ask Ray for as many CPUs as they have threads: its autoscaler starts nodes
    for them, and nothing else is put on their cores. Off, they fit on what is left after a loss, and beside training.
    """
    transport: Literal["auto", "shared_memory", "tcp"] = "auto"
    """How frames travel; auto is shared memory on one node and TCP between nodes, and NCCL for activations that go from
    one GPU to another."""
    packed_files: bool = True
    """Keep the experts as the kernels want them in files of each node, which replicas, standbys, restarted shards and
    the next `LLM` of a model with 256 MB of experts or more map in no time; it takes as much disk as the experts do."""
    kv_copies: bool = False
    """Each attention worker sends copies of its cache blocks to the next one, which goes on from there when it dies;
    without them the requests of a lost worker are computed again from their tokens."""
    hedge_after_seconds: float = Field(default=0.3, gt=0)
    """An expert shard that has not answered for this long (four times its slowest recent answer if that is longer, ten
    times this at most) is not waited for where another one holds the experts."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long an attention worker that leaves may finish what it has; then its sequences go on elsewhere."""
    orphan_timeout_seconds: float = Field(default=30.0, gt=0)
    """The router ends a deployment whose owners were not heard for this long, and its actors exit when the router no
    longer exists, or the cluster cannot be asked, for this long."""
    request_timeout_seconds: float = Field(default=600.0, gt=0)
    """Deadline of a request that brings none; also the longest a request may ask for."""
    engine: EngineConfig = EngineConfig()

    @property
    def sends_tensors(self) -> bool:
        """Whether activations go from GPU to GPU, where two processes have different ones."""
        return self.transport == "auto" and self.attention_device == self.expert_device == "cuda"

    @model_validator(mode="after")
    def _check_devices(self) -> Self:
        if self.engine.deterministic and "cuda" in (self.attention_device, self.expert_device):
            raise ValueError(
                f"attention_device is {self.attention_device} and expert_device {self.expert_device}, and "
                "engine.deterministic is true: operators whose rows do not depend on each other exist for the CPU "
                "only; set engine.deterministic to false"
            )
        return self

    @model_validator(mode="after")
    def _check_copies(self) -> Self:
        if self.kv_copies and self.attention_workers < 2:
            raise ValueError(
                f"kv_copies needs another attention worker to keep the copies and attention_workers is "
                f"{self.attention_workers}; raise attention_workers to 2 or more"
            )
        if self.kv_copies and not self.engine.prefix_caching:
            raise ValueError("kv_copies needs the prefix cache; set engine.prefix_caching to true")
        return self

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.expert_replicas > self.expert_shards:
            raise ValueError(
                f"expert_replicas is {self.expert_replicas} and expert_shards {self.expert_shards}; each replica needs "
                "a shard of its own: raise expert_shards"
            )
        return self
