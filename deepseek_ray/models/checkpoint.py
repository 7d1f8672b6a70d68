"""Reading a checkpoint directory: config.json and safetensors with the names of the public DeepSeek checkpoints.

Everything is checked from file headers before any weight is read; weights are memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.mapped_memory import is_mapped, let_go
from deepseek_ray.models.safetensors_file import DTYPES, open_safetensors, require_finite
from deepseek_ray.models.shapes import mtp_shapes, parameter_shapes, repeats_main_model

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
SCALE_SUFFIX = "_scale_inv"
MAX_LISTED = 5
DEFAULT_FP8_BLOCK = (128, 128)


class CheckpointReader:
    """The tensors of one checkpoint directory, by name.

    Raises CheckpointError when the directory, its weights or its index are missing or wrong, ConfigError when its
    config.json is. Files are opened on first use.
    """

    def __init__(self, directory: str | Path, check_finite: bool = True) -> None:
        """check_finite: `tensor` refuses NaN and infinity; it costs one pass over what is read."""
        self.directory = Path(directory)
        self.config = ModelConfig.from_dir(self.directory)
        self._check_finite = check_finite
        self._handles: dict[str, Any] = {}
        self._is_mapped: dict[str, bool] = {}
        self._files = self._find_files()
        self.names = tuple(name for name in self._files if not self._is_scale(name))
        """Every tensor, without the scales of FP8 weights."""

    @property
    def has_mtp(self) -> bool:
        """Whether config.json asks for multi-token-prediction layers and the files hold the first one."""
        first = f"model.layers.{self.config.num_hidden_layers}.eh_proj.weight"
        return self.config.num_nextn_predict_layers > 0 and first in self._files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype `tensor(name)` comes out with: the stored one, bfloat16 for FP8."""
        stored = self._stored_dtype(name)
        return torch.bfloat16 if stored == torch.float8_e4m3fn else stored

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, memory-mapped when `dtype` is None or the stored one; FP8 blocks come out dequantised.

        Raises CheckpointError when it is not there or (see `check_finite`) holds NaN or infinity.
        """
        wanted = dtype or self.dtype(name)
        tensor = self._handle(name).get_tensor(name)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = self._dequantised(name, tensor)
        if self._check_finite:
            require_finite(name, tensor, self.directory)
        return tensor.to(wanted)

    def let_go(self, name: str, tensor: Tensor) -> None:
        """What `tensor(name)` gave is not needed any more: what was mapped for it need not be in memory."""
        stored = tensor if tensor.dtype == self._stored_dtype(name) else self._handle(name).get_tensor(name)
        file = self._files[name]
        if file not in self._is_mapped:
            self._is_mapped[file] = is_mapped(stored, self.directory / file)
        if self._is_mapped[file]:
            let_go(stored)

    def check_finite(self) -> None:
        """Read every tensor once; raise CheckpointError naming the first that holds NaN or infinity."""
        for name in self.names:
            require_finite(name, self.tensor(name), self.directory)

    def identity(self) -> str:
        """Changes whenever a file of the checkpoint does: a digest of names, sizes and times, and of config.json."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in sorted(set(self._files.values())):
            found = (self.directory / file).resolve()
            status = found.stat()
            digest.update(f"{found} {status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode())
        return digest.hexdigest()

    def validate(self) -> None:
        """Compare every header with config.json; raise CheckpointError naming missing, extra and misshapen tensors.

        Reads headers only. Multi-token-prediction layers may be absent (a warning, `has_mtp` is then False).
        """
        expected = self._expected_shapes()
        missing = [name for name in expected if name not in self._files and not repeats_main_model(name)]
        extra = [name for name in self.names if name not in expected and not self._may_stay(name)]
        wrong = [
            f"{name} has shape {list(self.shape(name))}, config.json asks for {list(shape)}"
            for name, shape in expected.items()
            if name in self._files and self.shape(name) != shape
        ]
        problems = [
            _listed("missing", [f"{name} {list(expected[name])}" for name in missing]),
            _listed("unknown", [f"{name} {list(self.shape(name))}" for name in extra]),
            _listed("misshapen", wrong),
            _listed("badly scaled", self._bad_scales()),
        ]
        if any(problems):
            raise CheckpointError(
                f"{self.directory}: the weights do not fit config.json: {'; '.join(filter(None, problems))}. "
                "Take config.json and weights from the same model, or download the files again"
            )

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.config
        expected = parameter_shapes(config)
        if config.num_nextn_predict_layers and not self.has_mtp:
            logger.warning(
                "%s: num_nextn_predict_layers is %d but there is no model.layers.%d; multi-token prediction is off",
                self.directory,
                config.num_nextn_predict_layers,
                config.num_hidden_layers,
            )
            expected = parameter_shapes(config.model_copy(update={"num_nextn_predict_layers": 0}))
        if not config.num_nextn_predict_layers:  # layers that are there but not wanted are known, not extra
            layer = config.num_hidden_layers
            while f"model.layers.{layer}.eh_proj.weight" in self._files:
                expected.update(mtp_shapes(config, layer))
                layer += 1
        return expected

    def _may_stay(self, name: str) -> bool:
        """Tensors that carry nothing: a tied head, rotary frequencies of old exports, empty shared experts."""
        if name == "lm_head.weight":
            return self.config.tie_word_embeddings and self.shape(name) == (
                self.config.vocab_size,
                self.config.hidden_size,
            )
        return name.endswith("rotary_emb.inv_freq") or 0 in self.shape(name)

    def _bad_scales(self) -> list[str]:
        rows, columns = self._fp8_block
        problems = []
        for name in self.names:
            if self._stored_dtype(name) != torch.float8_e4m3fn:
                continue
            shape, scale = self.shape(name), name + SCALE_SUFFIX
            wanted = (-(-shape[0] // rows), -(-shape[1] // columns)) if len(shape) == 2 else None
            if scale not in self._files:
                problems.append(f"{name} is FP8 and has no {scale}")
            elif wanted is None or self.shape(scale) != wanted:
                problems.append(f"{scale} has shape {list(self.shape(scale))}, {name} {list(shape)} asks for {wanted}")
        return problems

    def _dequantised(self, name: str, weight: Tensor) -> Tensor:
        """float32 weight of FP8 e4m3 [rows, columns] times one scale per block."""
        if name + SCALE_SUFFIX not in self._files:
            raise CheckpointError(
                f"{self.directory}: {name} is FP8 and has no {name + SCALE_SUFFIX}; download it again"
            )
        scale = self._handle(name + SCALE_SUFFIX).get_tensor(name + SCALE_SUFFIX).float()
        rows, columns = self._fp8_block
        scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]]
        return weight.float() * scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]

    @property
    def _fp8_block(self) -> tuple[int, int]:
        quantization = self.config.quantization_config
        return quantization.weight_block_size if quantization else DEFAULT_FP8_BLOCK

    def _is_scale(self, name: str) -> bool:
        return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self._files

    def _stored_dtype(self, name: str) -> torch.dtype:
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise CheckpointError(
                f"{self.directory}: tensor {name} has dtype {code}; known are {', '.join(DTYPES)}. Use a bf16, "
                "fp32 or FP8 checkpoint of this model"
            )
        return DTYPES[code]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _handle(self, name: str) -> Any:
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}; take config.json and weights of the same model"
            )
        if file not in self._handles:
            handle = open_safetensors(self.directory / file)
            held = set(handle.keys())
            absent = [key for key, where in self._files.items() if where == file and key not in held]
            if absent:
                raise CheckpointError(
                    f"{self.directory}: {INDEX_FILE} places {absent[0]} in {file}, which does not hold it; download "
                    "both again"
                )
            self._handles[file] = handle
        return self._handles[file]

    def _find_files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.directory / INDEX_FILE).is_file():
            return _read_index(self.directory)
        if (self.directory / SINGLE_FILE).is_file():
            handle = self._handles[SINGLE_FILE] = open_safetensors(self.directory / SINGLE_FILE)
            return dict.fromkeys(handle.keys(), SINGLE_FILE)
        raise CheckpointError(_no_weights(self.directory))


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_FILE
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, Mapping):
            raise TypeError("weight_map is not an object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no safetensors index ({error!r}); it needs a weight_map of tensor name to file: get it again"
        ) from None
    for file in sorted({str(value) for value in weight_map.values()}):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} points at {file!r}; only the names of .safetensors files beside it are followed, never a path "
                "that leaves the directory"
            )
        if not (directory / file).is_file():
            raise CheckpointError(f"{path} names {file}, which is not there; download the missing file")
    return {str(name): str(file) for name, file in weight_map.items()}


def _no_weights(directory: Path) -> str:
    files = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in files if name.endswith(PICKLE_SUFFIXES)]
    parts = [name for name in files if name.endswith(".safetensors")]
    if parts:
        return (
            f"{directory} has {parts[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}; add the index, or rename a single "
            f"file to {SINGLE_FILE}"
        )
    if pickles:
        return (
            f"{directory} has weights only as {', '.join(pickles[:MAX_LISTED])}; such pickle files can run any code "
            "while loading, so they are refused. Convert them to safetensors (save_pretrained of transformers does) "
            "and try again"
        )
    return f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; download or train them first"


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{len(items)} {what}: {', '.join(items[:MAX_LISTED])}{more}"
