"""What is compiled ahead of time: kernels with the types and compile-time switches that users can reach.

Each module of kernels has ``variants(arch)``, which yields a `Variant` for every combination that is to be checked for
a target of `TARGETS`. A machine without a GPU compiles them and reads their shared memory and register spills.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Has the tiles of sm_90, and no test of every kernel.
NEWER = {"sm_100": GPUTarget("cuda", 100, 32)}
# Bytes that one program may have: 164 KiB and 228 KiB less 1 KiB for the system, 64 KiB.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compilation.

    Attributes:
        name: what is switched on, for people.
        kernel: the function under ``triton.jit``.
        types: type of each run-time argument: "*bf16", "*fp32", "*i64", "i32", "fp32", ...; "i32:16" for a number
            that is a multiple of 16 (strides, as a rule); a tuple of these for a tuple.
        constants: value of each compile-time argument.
        options: "num_warps", "num_stages".
        has_dot: whether a matrix product is in it, which must use tensor cores in 16 bits.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    has_dot: bool = False


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compilation needs: shared memory, memory of a thread for spilled registers, in bytes; its assembly."""

    shared: int
    spills: int
    assembly: str


def compile_for(variant: Variant, arch: str) -> Compiled:
    """Compile for one of `TARGETS` or `NEWER`; nothing asks for a device."""
    signature: dict[str, Any] = {}
    # As at run time: pointers of torch are aligned, and other numbers are not specialised.
    aligned = {}
    for i, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        given = variant.types[name]
        parts = {(i,): given} if isinstance(given, str) else {(i, k): each for k, each in enumerate(given)}
        aligned.update({path: [["tt.divisibility", 16]] for path, t in parts.items() if t[0] == "*" or ":16" in t})
        types = tuple(each.removesuffix(":16") for each in parts.values())
        signature[name] = types[0] if isinstance(given, str) else types
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=aligned)
    compiled = triton.compile(source, target={**TARGETS, **NEWER}[arch], options=dict(variant.options))
    if arch == "gfx942":
        assembly = compiled.asm["amdgcn"]
        # Not the counts of spilled registers: scalar ones move to lanes of vector registers, which stay on the chip.
        spills = sum(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s*(\d+)", assembly))
    else:
        assembly = compiled.asm["ptx"]
        spills = _local_memory(compiled.asm["cubin"])
    return Compiled(compiled.metadata.shared, spills, assembly)


def _local_memory(cubin: bytes) -> int:
    """Bytes of local memory of a thread, which is where registers are spilled to."""
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(?:LOCAL|STACK):(\d+)", usage.stdout))
