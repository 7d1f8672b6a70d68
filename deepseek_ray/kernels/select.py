"""Which implementation of the operators this process uses."""

from __future__ import annotations

import functools
import logging
import os

import torch

from deepseek_ray.errors import ConfigError
from deepseek_ray.kernels.base import Kernels
from deepseek_ray.kernels.build import KernelBuildError
from deepseek_ray.kernels.fast import FastKernels
from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.reference import ReferenceKernels

logger = logging.getLogger(__name__)


def select_kernels(deterministic: bool, device: torch.device) -> Kernels:
    """The operators a deployment is to compute with on a device."""
    if deterministic:
        return default_kernels()
    if device.type != "cuda":
        return FastKernels()
    try:
        from deepseek_ray.kernels.gpu.operators import GpuKernels  # triton comes with torch for CUDA only
    except ImportError as error:
        logger.warning("no Triton (%s): the GPU computes with torch's operators alone", error)
        return FastKernels()
    return GpuKernels()


def usable_device(name: str) -> torch.device:
    """The device of this name. ConfigError when torch sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'a device is "cuda" and torch sees no CUDA device in this process; set attention_device and expert_device '
            'to "cpu", or start it on a node with a GPU and with a torch that was built for it'
        )
    return torch.device(name)


@functools.cache
def default_kernels() -> Kernels:
    """The C++ operators; torch row by row where they do not build or `DEEPSEEK_RAY_KERNELS=reference` is set."""
    if os.environ.get("DEEPSEEK_RAY_KERNELS") == "reference":
        return ReferenceKernels()
    try:
        return NativeKernels()
    except KernelBuildError as error:
        logger.warning("%s Generation is exact but slow.", error)
        return ReferenceKernels()
