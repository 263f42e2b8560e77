"""Launches of kernels, which can be recorded instead: what is compiled ahead of time is then what really runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from ._variants import Variant

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclasses.dataclass
class Recording:
    """Launches that were asked for on one of the targets of `_variants`."""

    arch: str
    launches: list[tuple[Any, Mapping[str, Any], Mapping[str, Any]]] = dataclasses.field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[Recording]:
    """Launchers that are called in here record their kernels and run none; what they return is not filled."""
    global _recording
    outer, _recording = _recording, Recording(arch)
    try:
        yield _recording
    finally:
        _recording = outer


def arch_of(x: Tensor) -> str:
    """The target whose tiles fit the device of `x`, or "interpreter"."""
    if _recording is not None:
        return _recording.arch
    if _triton.interprets():
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(x.device)
    if (9, 0) <= capability < (12, 0):
        return "sm_90"
    # What has less shared memory (8.6, 8.9, 12.0) gets the tiles of the target with the least.
    return "sm_80" if capability == (8, 0) else "gfx942"


def launch(
    kernel: Any, programs: int, x: Tensor, *arguments: Any, options: Mapping[str, Any], **constants: Any
) -> None:
    """Enqueue a kernel on the device of `x`, if it has any programs."""
    if not programs:
        return
    if _recording is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        given = {**dict(zip(names, arguments, strict=True)), **constants}
        _recording.launches.append((kernel, given, options))
        return
    with torch.cuda.device_of(x):
        kernel[(programs,)](*arguments, **constants, **options)


def variants(name: str, recorded: Recording, *, has_dot: bool = False) -> Iterator[Variant]:
    """The compilations that recorded launches need."""
    for kernel, arguments, options in recorded.launches:
        free = {p.name for p in kernel.params if p.do_not_specialize}
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        # None is a value at compile time, and so is a 1 that may be specialised.
        fixed |= {n for n, value in arguments.items() if value is None or (_is_one(value) and n not in free)}
        constants = {n: value for n, value in arguments.items() if n in fixed}
        types = {n: _type(value, n in free) for n, value in arguments.items() if n not in fixed}
        yield Variant(f"{name} {kernel.__name__}", kernel, types, constants, options, has_dot)


def _type(value: Tensor | int | float, free: bool) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    width = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return width if free or value % 16 else f"{width}:16"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1
