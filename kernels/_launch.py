"""Launches of kernels as values: the same one runs on a device or is compiled ahead of time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from contrastive_ops import _triton

from ._variants import Variant

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the function under ``triton.jit``.
        programs: how many.
        arguments: every argument of the kernel by its name; None is a compile-time value.
        options: "num_warps", "num_stages".
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    def run(self) -> None:
        """Enqueue the kernel; nothing to do for no programs."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)

    def variant(self, name: str, *, has_dot: bool = False) -> Variant:
        """What `run` would compile."""
        compiled_in = {p.name for p in self.kernel.params if p.is_constexpr}
        compiled_in |= {name for name, value in self.arguments.items() if value is None}
        free = {p.name for p in self.kernel.params if p.do_not_specialize}
        constants = {name: value for name, value in self.arguments.items() if name in compiled_in}
        types = {
            name: tuple(_type(each, name in free) for each in value)
            if isinstance(value, tuple)
            else _type(value, name in free)
            for name, value in self.arguments.items()
            if name not in compiled_in
        }
        return Variant(name, self.kernel, types, constants, self.options, has_dot)


def _type(value: Tensor | int, free: bool) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    width = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return width if free or value % 16 else f"{width}:16"


@functools.cache
def _arch_of(device: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if (9, 0) <= capability < (12, 0):
        return "sm_90"
    # What has less shared memory (8.6, 8.9, 12.0) gets the tiles of the target with the least.
    return "sm_80" if capability == (8, 0) else "gfx942"


def arch_of(x: Tensor) -> str:
    """The key of `_variants.TARGETS` whose tiles fit the device of `x`, or "interpreter"."""
    return "interpreter" if _triton.interprets() else _arch_of(x.device.index)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` and a side of a tile."""
    return max(16, triton.next_power_of_2(n))
