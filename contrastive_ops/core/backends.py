"""Which backend runs a call: one table per operator, one rule, one wording of refusals."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks, extension

ENVIRONMENT_VARIABLE = "CONTRASTIVE_OPS_BACKEND"
_logger = logging.getLogger("contrastive_ops")
_warned: set[str] = set()
# The table of every primitive; its file enrols it.
_TABLES: dict[str, Mapping[str, Backend]] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of a primitive.

    Attributes:
        source: the file that holds the code, relative to the repository.
        functions: returns the object with the launchers; called only when the backend is used.
        unsupported: reasons why these inputs cannot run; alone chooses, refuses and explains.
        keeps: whether forward can keep inner products, so that backward need not compute them again.
        no_room: reasons why the sets and folds of a call (a `Layout`), or what a search asks for, cannot run.
        by_name: why "auto" leaves it out, or None: it runs where it is named, and nowhere else.
    """

    source: str
    functions: Callable[[], Any]
    unsupported: Callable[[Tensor], list[str]]
    keeps: bool = False
    no_room: Callable[[Any], list[str]] = lambda layout: []
    by_name: str | None = None


# Kernels are tested interpreted, compiled for devices or run on the processor; what no device has run is no default.
NEVER_ON_A_DEVICE = "taken by name only: these kernels have not run on a device yet"

# In order of preference per device type. That of GPUs was measured on an H200, where CUDA kernels took 0.2 to 1.0 of
# the time of the Triton ones in every primitive that has both (benchmarks/results/kernel-notes.md).
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}


def unsupported_by_cpu(x: Tensor) -> list[str]:
    """Reasons why the C++ backend cannot run on `x`."""
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"device={x.device} (supported: cpu)")
    if extension.MISSING is not None:
        reasons.append(extension.why_missing() or extension.MISSING)
    return reasons


def _reasons(backend: Backend, x: Tensor, layout: Any) -> list[str]:
    return [*backend.unsupported(x), *([] if layout is None else backend.no_room(layout))]


def choose(function: str, table: Mapping[str, Backend], x: Tensor, backend: str, layout: Any = None) -> str:
    """Return the name of the backend that runs `function` on inputs like `x`, with these sets and folds."""
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"
    if backend != "auto":
        if backend not in table:
            known = ", ".join(repr(name) for name in ("auto", *table))
            raise ValueError(f"{function}: backend must be one of {known}, got {checks.shown(backend)}")
        reasons = _reasons(table[backend], x, layout)
        if reasons:
            lines = "\n    ".join(reasons)
            raise NotImplementedError(
                f"{function}: backend {backend!r} cannot run these inputs:\n    {lines}\n"
                '  use backend="auto" to let contrastive_ops choose'
            )
        return backend
    refused: list[str] = []
    for name in ORDER.get(x.device.type, ("reference",)):
        if name not in table:
            continue
        by_name = table[name].by_name
        reasons = _reasons(table[name], x, layout) if by_name is None else [by_name]
        if not reasons:
            # A logger would break a traced graph, and tracing runs once anyway.
            if name == "reference" and refused and not torch.compiler.is_compiling():
                _warn_once(function, x.device.type, refused)
            return name
        refused.append(f"{name}: {'; '.join(reasons)}")
    raise NotImplementedError(f"{function}: no backend can run these inputs: {refused}")


def _warn_once(function: str, device: str, refused: list[str]) -> None:
    key = f"{function} {device}"
    if key not in _warned:
        _warned.add(key)
        _logger.warning("%s runs on the slow reference backend: %s", function, " | ".join(refused))


def has_warned() -> bool:
    """Whether it was said that calls run on the reference, and why."""
    return bool(_warned)


def enrol(primitive: str, table: Mapping[str, Backend]) -> Mapping[str, Backend]:
    """Make a primitive's table known to `backends`, and return it."""
    _TABLES[primitive] = table
    return table


def backends() -> dict[str, dict[str, str | None]]:
    """Return, for each primitive, its backends with None where one can run on a device of this machine, else why not.

    One that can run and that "auto" leaves out is none that cannot: `by_name` lists those.

    Examples:
        >>> backends()["similarity_topk"]["reference"] is None
        True
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    samples = [torch.empty(0, 1, device=device) for device in devices]

    def why(backend: Backend) -> str | None:
        fewest = min((backend.unsupported(x) for x in samples), key=len)
        return "; ".join(fewest) or None

    return {primitive: {name: why(backend) for name, backend in table.items()} for primitive, table in _TABLES.items()}


def by_name() -> dict[str, dict[str, str]]:
    """Return, for each primitive, the backends that "auto" leaves out, and why.

    Examples:
        >>> list(by_name()["similarity_values"])
        ['triton']
    """
    return {
        primitive: {name: backend.by_name for name, backend in table.items() if backend.by_name is not None}
        for primitive, table in _TABLES.items()
    }
