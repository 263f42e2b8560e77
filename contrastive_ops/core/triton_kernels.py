"""Triton kernels, or why they cannot run. Triton is imported when a kernel is first used, never before."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# That of torch 2.8. Kernels cannot read the elements of compile-time tuples in older ones.
OLDEST = (3, 4)


def interprets() -> bool:
    """Whether Triton runs its kernels on the CPU, slowly, instead of compiling them; set before it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


@functools.cache
def why_missing() -> str | None:
    """Return None if Triton can be imported, else the reason and how to fix it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None


@functools.cache
def _why_too_old() -> str | None:
    """Return None if this Triton, which is imported, can compile the kernels, else the reason."""
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} (supported: {'.'.join(map(str, OLDEST))} and newer)"
    return None


@functools.cache
def _why_not_on(device: int) -> str | None:
    """Return None if kernels compile for this GPU, else the reason."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor} (supported: 8.0 and newer)"
    return None


def unsupported(x: Tensor) -> list[str]:
    """Reasons why no Triton kernel can run on `x`."""
    reasons = []
    wrong = why_missing()
    if x.device.type != "cuda" and not interprets():
        reasons.append(f"device={x.device} (supported: cuda, or any with TRITON_INTERPRET=1)")
    else:
        wrong = wrong or _why_too_old() or (None if interprets() else _why_not_on(x.device.index))
    if wrong is not None:
        reasons.insert(0, wrong)
    if x.dtype not in DTYPES:
        reasons.append(f"dtype={x.dtype} (supported: float32, bfloat16, float16)")
    return reasons


@functools.cache
def functions(stem: str) -> ModuleType:
    """Return the module with a primitive's launchers, which have the names and arguments of its reference."""
    return importlib.import_module(f"..kernels.{stem}", __package__)
