"""Chunks that autograd computes again instead of keeping what they made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which only the arguments are kept for a gradient; the transforms of torch.func keep all of it."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def may_overwrite() -> bool:
    """Whether nothing keeps what an operation made: no graph, and no transform of torch.func."""
    return not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
