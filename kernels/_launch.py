"""Launches of kernels as values: the same one runs on a device or is compiled ahead of time."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core import triton_kernels

from ._variants import Variant

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the function under ``triton.jit``.
        programs: how many.
        arguments: every argument of the kernel by its name; None is a compile-time value, and so is a tuple of
            structures (named tuples), whose elements kernels hand on to the functions that they call.
        options: "num_warps", "num_stages".
        descriptors: whether the kernel makes tensor descriptors, for which Triton asks for memory.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    options: Mapping[str, int]
    descriptors: bool = False

    def run(self) -> None:
        """Enqueue the kernel on the device of its tensors; nothing to do for no programs."""
        if not self.programs:
            return
        if _recording is not None:
            _recording.launches.append(self)
            return
        with torch.cuda.device_of(next(each for each in self.arguments.values() if isinstance(each, Tensor))):
            # In a copy of the context, so that an allocator of the program's own stays where it is.
            run = contextvars.copy_context().run if self.descriptors else _call
            run(self._start)

    def _start(self) -> None:
        if self.descriptors:
            triton.set_allocator(_scratch)
        self.kernel[(self.programs,)](**self._passed(), **self.options)

    def _passed(self) -> dict[str, Any]:
        """The arguments as Triton takes them."""
        return {name: _whole_structures(value) for name, value in self.arguments.items()}

    def variant(self, name: str, *, has_dot: bool = False) -> Variant:
        """What `run` would compile."""
        arguments = self._passed()
        free = {p.name for p in self.kernel.params if p.do_not_specialize}
        compiled_in = {p.name for p in self.kernel.params if p.is_constexpr}
        # None is a value at compile time, and so is a 1 that may be specialised.
        compiled_in |= {n for n, value in arguments.items() if value is None or (_is_one(value) and n not in free)}
        constants = {n: value for n, value in arguments.items() if n in compiled_in}
        types = {
            n: tuple(_type(each, n in free) for each in value) if isinstance(value, tuple) else _type(value, n in free)
            for n, value in arguments.items()
            if n not in compiled_in
        }
        return Variant(name, self.kernel, types, constants, self.options, has_dot)


def _call(function: Callable[[], None]) -> None:
    function()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of the current device; what is launched later on its stream may have it again."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(kernel: Any, programs: int, *arguments: Any, options: Mapping[str, Any], **constants: Any) -> None:
    """Run a kernel on its run-time arguments in order, and compile-time ones by name."""
    names = [name for name in kernel.arg_names if name not in constants]
    Launch(kernel, programs, {**dict(zip(names, arguments, strict=True)), **constants}, options).run()


@dataclasses.dataclass
class Recording:
    """Launches that were asked for on one of the targets of `_variants`."""

    arch: str
    launches: list[Launch] = dataclasses.field(default_factory=list)

    def variants(self, about: str, *, has_dot: bool = False) -> Iterator[Variant]:
        """The compilations that they need."""
        for each in self.launches:
            yield each.variant(f"{about} {each.kernel.__name__}", has_dot=has_dot)


_recording: Recording | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[Recording]:
    """Launches in here are recorded, and none runs; what they would write is not filled."""
    global _recording
    outer, _recording = _recording, Recording(arch)
    try:
        yield _recording
    finally:
        _recording = outer


def _whole_structures(value: Any) -> Any:
    """A tuple of structures, each as one compile-time value.

    Otherwise Triton before 3.8 takes them apart, and what a kernel finds in the tuple has no names any more. The
    interpreter, on the other hand, looks for the names on the value itself.
    """
    if triton_kernels.interprets() or not isinstance(value, tuple):
        return value
    return tuple(tl.constexpr(each) if isinstance(each, tuple) else each for each in value)


def _type(value: Tensor | int | float, free: bool) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    width = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return width if free or value % 16 else f"{width}:16"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


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
    if _recording is not None:
        return _recording.arch
    return "interpreter" if triton_kernels.interprets() else _arch_of(x.device.index)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` and a side of a tile."""
    return max(16, triton.next_power_of_2(n))
