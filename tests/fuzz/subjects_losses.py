"""Every loss of the registry: most against formulas of papers, the rest against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.core import eager
from contrastive_ops.testing import LOSSES

from .cases import One, Refused, Subject
from .formulas import FORMULAS
from .judge import Call
from .layouts import BACKENDS, DTYPES, affordable, laid_out, needing


def length_of_first_numbers(t: Tensor) -> float:
    """Of rows whose shortest prefix is one number: gradients are as large as the inverse of that."""
    if t.dim() < 2 or not t.numel():
        return t.detach().double().norm().item()
    return len(t) / t.detach().double()[:, 0].abs().clamp(min=1e-6).reciprocal().norm().item()


class Losses(Subject):
    """A loss of the registry with the inputs that every test of losses takes."""

    name = "losses"
    weight = 8
    space = {
        "loss": One(tuple(sorted(LOSSES, key=lambda name: name not in FORMULAS))),
        "rows": affordable(3, 2, 1, 0, 5, 8, 16, 17, 31, 33, 64, 65, 130, 260),
        "d": affordable(1, 2, 3, 5, 8, 16, 17, 64, 65, 100),
        "reduction": One(("mean", "sum", "none")),
        "scale": One((None, 0.1, 1.0, 30.0, 100.0, 200.0)),
        "equal": One((False, True)),
        "backend": BACKENDS,
    }

    def build(self, *, seed, dtype, layout, needs, loss, rows, d, reduction, scale, equal, backend) -> Call:
        case = LOSSES[loss]
        if reduction not in case.reductions or (not rows and reduction == "mean") or (d < 3 and "matryoshka" in loss):
            raise Refused
        if d == 1 and scale is not None and scale > 10:
            raise Refused  # cosines of 1 and -1: what is left of differences of exact numbers
        drawn = case.inputs(rows, d, DTYPES[dtype], seed)
        with torch.no_grad():
            if scale is not None and "scale" in drawn:
                drawn["scale"].fill_(scale)
            if equal and rows:  # all rows of one side are one row, as at the collapse of a model
                first = next(iter(drawn.values()))
                first.copy_(first[:1].clone().expand_as(first))
        given = needing(laid_out(drawn, layout), needs)
        formula = FORMULAS.get(loss) if rows > 1 else None

        def dense(g: dict[str, Any]) -> list[Tensor]:
            if formula is not None:
                found = formula(g, case.options)
                found = found * g["weight"] if "weight" in g else found
                return [found if reduction == "none" else found.sum() if reduction == "sum" else case.mean(g, found)]
            with eager.closed():
                return [case(g, reduction, "reference")]

        logits = float(drawn["scale"].detach().max()) if rows and "scale" in drawn else 1.0
        size = logits * (1 if reduction == "mean" else max(rows, 1) ** 0.5)
        own = {"length": length_of_first_numbers} if "matryoshka" in loss else {}
        return Call(
            given, lambda g: [case(g, reduction, backend)], dense, size=size, lse=logits + math.log(max(rows, 1)), **own
        )
