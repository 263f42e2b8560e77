"""The compiled module contrastive_ops._eager, or why it is not used.

It makes whole losses and unit rows of plain tensors on the CPU, and routes tokens, with checks and autograd in C++.
Without it, or with one that was built for another torch, the same calls go through the operators and give the same;
only host time differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import _checkout
from . import extension


def _load() -> tuple[ModuleType | None, str | None]:
    kernels = extension.load()
    if kernels is None:
        return None, extension.reason()
    file = Path(str(kernels.__file__)).parent / _checkout.EAGER
    if not file.exists():
        others = sorted(path.name for path in file.parent.glob("_eager.*"))
        return None, f"{file} was not built" + (f", only {', '.join(others)}" if others else "")
    made_for = extension.report().get("torch")  # of a wheel, say, which serves every torch but for this module
    if made_for not in (None, str(torch.__version__)):
        return None, f"{file} was built for torch {made_for}, and this is {torch.__version__}"
    try:
        module = _checkout.load("contrastive_ops._eager", file)
    except ImportError as error:
        return None, f"{file} does not load with torch {torch.__version__}: {error}"
    if module.torch != str(torch.__version__):
        return None, f"{file} was built for torch {module.torch}, and this is {torch.__version__}"
    if not module.connect(kernels.kernels()):
        return None, "it was built from other C++ sources than the kernels"
    return module, None


_MODULE, _REASON = _load()
_closed = False


def reason() -> str | None:
    """Return None if the module is used, else why it is not."""
    return _REASON


def function(name: str, second_derivative: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a function of the module (csrc/eager.cpp), or None without it.

    Args:
        name: of the function.
        second_derivative: what it calls where its gradients are differentiated again.
    """
    if _MODULE is None:
        return None
    _MODULE.differentiate_again(name, second_derivative)
    found: Callable[..., Any] = getattr(_MODULE, name)
    return found


def on_host(kernels: int) -> None:
    """Run ``backend="cuda"`` for tensors on the CPU by kernels that were compiled for it, for tests.

    Args:
        kernels: the address of a `CudaKernels` (csrc/kernels.h); 0 ends it.
    """
    if _MODULE is not None:
        _MODULE.on_host(kernels)


def is_open() -> bool:
    """Whether calls may go by the module."""
    return not _closed


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """A region in which all calls go through the operators."""
    global _closed
    before, _closed = _closed, True
    try:
        yield
    finally:
        _closed = before
