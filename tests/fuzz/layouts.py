"""Numbers, sizes and memory layouts that subjects share."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from similarity_cases import Inputs, mapped
from torch import Tensor

from .cases import One, Refused

# Of the matrices of plain torch.
MOST_PAIRS = 1_500_000
MOST_NUMBERS = 3_000_000  # of the operands
# The interpreter of Triton takes minutes for a call that has many tiles: those of its runs have one or two.
MOST = 65 if os.environ.get("TRITON_INTERPRET") == "1" else math.inf


def affordable(*choices: int) -> One:
    """Of one kind; those alone that this run can afford."""
    return One(tuple(size for size in choices if size <= MOST))


# Primes, none, one, and what tiles, vectors and blocks end at; the simplest first.
ROWS = affordable(1, 2, 3, 5, 0, 7, 8, 13, 16, 17, 31, 32, 33, 64, 65, 127, 128, 131, 257, 1030, 4099)
COLUMNS = affordable(1, 2, 3, 5, 0, 7, 9, 16, 17, 33, 64, 65, 127, 129, 130, 257, 301)
DEPTHS = affordable(1, 2, 3, 4, 7, 8, 16, 17, 33, 64, 65, 100, 130, 1030, 4099)
BACKENDS = One(("cpu", "reference"))
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Numbers(Inputs):
    """`Inputs` of other kinds of numbers.

    "grid": quarters, whose products and sums are exact, so that equal scores and bounds are met; "normal"; "equal":
    one number; "tiny": below the smallest normal float32 where they are multiplied; "broken": with a NaN.
    """

    def __init__(self, n: int, m: int, d: int, kind: str = "grid", **options: Any) -> None:
        self.kind = kind
        columns = n if options.get("itself") else m
        if n * columns > MOST_PAIRS or (n + columns) * d > MOST_NUMBERS:
            raise Refused
        super().__init__(n, m, d, **options)

    def random(self, *shape: int) -> Tensor:
        if self.kind == "normal":
            return super().random(*shape)
        if self.kind == "equal":
            return torch.ones(shape)
        grid = torch.randint(-8, 9, shape, generator=self.generator) / 4
        if self.kind == "tiny":
            return grid * 2.0**-70
        if self.kind == "broken" and grid.numel():  # not -inf, which is a logit that takes no part
            grid.view(-1)[torch.randint(grid.numel(), (1,), generator=self.generator)] = torch.nan
        return grid


def laid_out(tree: Any, layout: str) -> Any:
    """The same numbers elsewhere in memory: between others, off every alignment, or columns first."""

    def change(t: Tensor) -> Tensor:
        if layout == "plain" or not t.dim():
            return t
        kept = t.detach()
        if layout == "gaps":
            wide = kept.new_full((*kept.shape[:-1], 2 * kept.shape[-1]), 7)
            wide[..., ::2] = kept
            kept = wide[..., ::2]
        elif layout == "offset":
            whole = torch.cat([kept.new_full((1,), 7), kept.reshape(-1)])
            kept = whole[1:].view(kept.shape)
        else:
            kept = kept.transpose(0, -1).contiguous().transpose(0, -1)
        return kept.requires_grad_(t.requires_grad)

    known: dict[int, Tensor] = {}
    return mapped(tree, lambda t: known.setdefault(id(t), change(t)))


def needing(tree: Any, needs: int) -> Any:
    """Only some of the tensors that could, require a gradient: a bit each, in the order of the tree."""
    place: dict[int, int] = {}

    def change(t: Tensor) -> Tensor:
        if t.requires_grad or id(t) in place:
            at = place.setdefault(id(t), len(place))
            t.requires_grad_(bool(needs >> min(at, 62) & 1))
        return t

    return mapped(tree, change)
