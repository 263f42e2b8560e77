"""Activation checkpointing: what is computed twice must be the same both times, and must reach its gradient.

Both kinds of torch.utils.checkpoint compute a part of a model again while a backward pass runs, which is how such a
second time is known here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

_CHECKPOINT = torch.utils.checkpoint.__file__


# States of generators before they were drawn from: one that has been set back to such a state repeats a draw.
_DRAWN_FROM: set[tuple[str, int]] = set()
_MOST = 1 << 16


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which only the arguments are kept for a gradient; the transforms of torch.func keep all of it."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function
    return functools.partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def may_overwrite() -> bool:
    """Whether nothing keeps what an operation made: no graph, and no transform of torch.func."""
    return not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def in_backward() -> bool:
    """Whether a backward pass is running, so that what is computed now was computed before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def random_options(function: str, generator: object) -> dict[str, Any]:
    """Keyword arguments of torch's random functions for the caller's generator: none for None.

    A generator of the caller has moved on when a checkpointed part is computed again, and nobody sets it back, as
    checkpointing does with torch's own: gradients would be those of other random numbers. One that is made or set back
    by the function that is computed again draws the same, and is taken.
    """
    if generator is None:  # not handed on: a traced program takes no None
        return {}
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{function}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if torch.compiler.is_compiling():
        return {"generator": generator}
    state = generator.get_state().view(torch.int64)
    known = (str(generator.device), int((state * torch.arange(1, state.shape[0] + 1)).sum()))
    if not in_backward():
        if len(_DRAWN_FROM) >= _MOST:
            _DRAWN_FROM.clear()
        _DRAWN_FROM.add(known)
    elif known not in _DRAWN_FROM:
        raise NotImplementedError(
            f"{function}: generator must be None where activation checkpointing computes a part of the model again, "
            "got one, whose second draw is another one\n"
            "  without a generator torch's own is used, which checkpointing sets back; or set the generator's "
            "seed in the function that is checkpointed"
        )
    return {"generator": generator}


def must_reach(function: str, losses: Iterable[Tensor]) -> None:
    """Raise at the end of a backward pass that computed losses again and brought no gradient to any of them.

    Reentrant checkpointing connects those tensors with the graph that its function returns by themselves or in a tuple.
    A loss inside another object is a constant to it, and the model would train without.
    """
    if not torch.is_grad_enabled() or not in_backward():
        return
    losses = [loss for loss in losses if loss.requires_grad]
    if not losses or not _reentrant():
        return
    reached: list[Tensor] = []
    for loss in losses:
        # Called with None where the operator that made the loss has a gradient by another output.
        loss.register_hook(lambda gradient: None if gradient is None else reached.append(gradient))

    def check() -> None:
        if not reached:
            raise NotImplementedError(
                f"{function}: losses must not be hidden in a Routing that a reentrant checkpoint returns, got no "
                "gradient for any of them\n"
                "  use checkpoint(..., use_reentrant=False), or return routing.loss as a tensor beside the output; a "
                "router whose losses are not trained on has losses=()"
            )

    torch.autograd.Variable._execution_engine.queue_callback(check)


def _reentrant() -> bool:
    """Whether this computation has a graph of its own: what the other kind computes again only fills in tensors."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT and frame.f_code.co_name in ("backward", "unpack_hook"):
            return frame.f_code.co_name == "backward"
        frame = frame.f_back
    return False
