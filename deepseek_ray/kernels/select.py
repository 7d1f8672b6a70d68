"""Which implementation of the operators this process uses."""

from __future__ import annotations

import functools
import logging
import os

from deepseek_ray.kernels.base import Kernels
from deepseek_ray.kernels.fast import FastKernels
from deepseek_ray.kernels.native import KernelBuildError, NativeKernels
from deepseek_ray.kernels.reference import ReferenceKernels

logger = logging.getLogger(__name__)


def select_kernels(deterministic: bool) -> Kernels:
    """The operators a deployment is to compute with."""
    return default_kernels() if deterministic else FastKernels()


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
