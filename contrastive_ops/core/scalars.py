"""Parameters that are one number: their shape in checkpoints, and an upper bound that they can come back from."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Scalars(nn.Module):
    """A module with parameters of one number, which load from checkpoints in which they have another shape.

    Attributes:
        scalars: their names.
    """

    scalars: ClassVar[tuple[str, ...]] = ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in self.scalars:
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and isinstance(given, Tensor) and given.numel() == 1 and given.shape != own.shape:
                state_dict[prefix + name] = given.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def bounded(value: Tensor, bound: float) -> Tensor:
    """min(value, bound), whose gradient at or above the bound is kept where a step along it leads back.

    A clamp in the graph would have gradient 0 there, and the value could never come back; a clamp in place would change
    a parameter that other parts of the graph may need.
    """
    return _Bounded.apply(value, bound)


class _Bounded(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, bound: float) -> Tensor:
        return value.clamp(max=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        value, ctx.bound = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        # A descent step against a negative gradient leads further up.
        return gradient.masked_fill((value >= ctx.bound) & (gradient < 0), 0.0), None
