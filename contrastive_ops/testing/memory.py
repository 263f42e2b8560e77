"""Memory as tests prove it: bytes that autograd keeps, and the peak resident set of a process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..core import extension

T = TypeVar("T")


def saved_bytes(function: Callable[[], T]) -> tuple[int, T]:
    """Bytes of the distinct storages that autograd keeps for backward, and what the function returns."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = function()
    return sum(storages.values()), value


def resident_bytes(key: str) -> int:
    """`VmRSS`, what this process has resident, or `VmHWM`, its peak since the last reset; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise ValueError(f"resident_bytes: key must be in /proc/self/status, got {key!r}")


def reset_peak() -> int:
    """Return free memory to the system, bring the peak down to what is resident and return that.

    What kernels keep for their next call is free memory too, so that a peak counts what a call takes of it.
    `ru_maxrss` would start at the peak of the parent process and cannot be reset.
    """
    module = extension.load()
    if module is not None:
        module.release_scratch()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")
