"""The CUDA kernels of the extension, or why they cannot run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The same functions compiled for the processor, for tests: see `on_host`.
_host: Any = None


@contextlib.contextmanager
def on_host(functions: Any) -> Iterator[None]:
    """Run kernels by other functions than the extension's, on tensors of the CPU."""
    global _host
    outer, _host = _host, functions
    try:
        yield
    finally:
        _host = outer


def kernels() -> Any:
    """The object with the functions of csrc/cuda/functions.h, each named cuda_<name>."""
    return extension.load() if _host is None else _host


@functools.cache
def why_missing() -> str | None:
    """Return None if the extension has CUDA kernels, else the reason and how to fix it."""
    missing = extension.why_missing()
    if missing is not None:
        return missing
    module: Any = extension.load()
    if module.build_config()["cuda"] == "no":
        why = extension.report().get("why_no_cuda")
        because = f" ({why})" if why else ""
        return f"the extension was built without CUDA kernels{because}; install again with CONTRASTIVE_OPS_CUDA=1"
    return None


@functools.cache
def _why_not_on(device: int) -> str | None:
    """Return None if there is code for this GPU, else the reason."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs (for AMD there is backend='triton')"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"compute capability {major}.{minor} (supported: 8.0 and newer)"
    module: Any = extension.load()
    built = module.build_config()["cuda"]
    if not has_code_for((major, minor), built):
        own = f'TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
        return f"no code for compute capability {major}.{minor} in CUDA {built}; install again with {own}"
    return None


def runs_on(device: int) -> bool:
    """Whether the kernels run on this GPU."""
    return why_missing() is None and _why_not_on(device) is None


def has_code_for(capability: tuple[int, int], built: str) -> bool:
    """Whether a build, named as the extension names it, runs on GPUs of a compute capability.

    sm_XY is code for X.Y and newer ones of the same X, sm_XYa for X.Y alone, sm_XYf as sm_XY with features of that
    family. compute_XY is PTX, for X.Y and all that are newer; of a or f as code is.
    """
    major, minor = capability
    for kind, x, y, features in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)\b", built):
        at = int(x), int(y)
        if features == "a":
            runs = at == capability
        elif kind == "sm" or features == "f":
            runs = at[0] == major and at[1] <= minor
        else:
            runs = at <= capability
        if runs:
            return True
    return False


def unsupported(x: Tensor) -> list[str]:
    """Reasons why no CUDA kernel can run on `x`."""
    reasons = []
    if x.device.type != ("cuda" if _host is None else "cpu"):
        reasons.append(f"device={x.device} (supported: cuda)")
    wrong = why_missing() if _host is None else None
    if wrong is None and x.device.type == "cuda":
        wrong = _why_not_on(x.device.index)
    if wrong is not None:
        reasons.insert(0, wrong)
    if x.dtype not in DTYPES:
        reasons.append(f"dtype={x.dtype} (supported: float32, bfloat16, float16)")
    return reasons


@functools.cache
def functions(stem: str) -> ModuleType:
    """Return the module with a primitive's launchers, which have the names and arguments of its reference."""
    return importlib.import_module(f"..cuda.{stem}", __package__)
