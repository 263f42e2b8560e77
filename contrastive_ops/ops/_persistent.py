"""The persistent Triton kernels of a similarity matrix as a backend, and what they do not run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..core import triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend
from ..core.problem import Layout
from ..cuda import _products, hopper

STEP = 8
_KINDS = ("logsumexp", "sum_softplus")


def unsupported(x: Tensor) -> list[str]:
    """Reasons why they cannot run on rows like `x`, of which there are none to look at in an empty one."""
    reasons = [*triton_kernels.unsupported(x), *_products.unsupported(x)]
    if len(x) and x.dtype == torch.float32:
        reasons.append(f"dtype={x.dtype} (supported: bfloat16, float16)")
    if len(x) and (x.shape[-1] % STEP or x.shape[-1] == 0):
        reasons.append(f"D={x.shape[-1]} (supported: a multiple of {STEP})")
    return reasons


def no_room(layout: Layout) -> list[str]:
    """Reasons why the sets, rules and folds of a call are not for them."""
    reasons = hopper.no_room(layout)
    kinds = sorted({fold.kind for fold in layout.folds} - {*_KINDS})
    if kinds:
        reasons.append(f"{', '.join(kinds)} (supported: {', '.join(_KINDS)})")
    sides = [fold.cols for fold in layout.folds]
    if len({fold.kind for fold in layout.folds}) > 1 or len(sides) > len(set(sides)):
        reasons.append("several folds of a direction, or of two kinds (supported: one of rows and one of columns)")
    return reasons


BACKEND = Backend(
    source="kernels/similarity_reduce_persistent.py",
    functions=functools.cache(lambda: triton_kernels.functions("similarity_reduce_persistent")),
    unsupported=unsupported,
    no_room=no_room,
    by_name=NEVER_ON_A_DEVICE,
)
