"""Every loss of the registry: the usual ones against formulas of papers, all against the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_ops.core import eager
from contrastive_ops.testing import LOSSES

from .cases import One, Refused, Subject
from .judge import Call
from .layouts import BACKENDS, DTYPES, laid_out, needing


def _unit(t: Tensor) -> Tensor:
    return F.normalize(t, dim=-1)


def _own(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bool)


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")


def _info_nce(i: dict[str, Tensor]) -> Tensor:
    return _cross_entropy(i["scale"] * _unit(i["query"]) @ _unit(i["key"]).T)


def _clip(i: dict[str, Tensor]) -> Tensor:
    logits = i["scale"] * _unit(i["image"]) @ _unit(i["text"]).T
    return (_cross_entropy(logits) + _cross_entropy(logits.T)) / 2


def _siglip(i: dict[str, Tensor]) -> Tensor:
    logits = i["scale"] * _unit(i["image"]) @ _unit(i["text"]).T + i["bias"]
    sign = 2 * _own(len(logits)).to(logits.dtype) - 1
    return F.softplus(-sign * logits, threshold=1e9).sum(1)


def _nt_xent(i: dict[str, Tensor]) -> Tensor:
    z = _unit(torch.cat([i["z0"], i["z1"]]))
    logits = (i["scale"] * z @ z.T).masked_fill(_own(len(z)), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2), reduction="none")


def _sup_con(i: dict[str, Tensor]) -> Tensor:
    z, labels = _unit(i["x"]), i["labels"]
    logits = (i["scale"] * z @ z.T).masked_fill(_own(len(z)), -torch.inf)
    positive = (labels[:, None] == labels) & ~_own(len(z))
    log_p = logits - logits.logsumexp(1, keepdim=True)
    return -log_p.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)


def _moco(i: dict[str, Tensor]) -> Tensor:
    query = _unit(i["query"])
    own = (query * _unit(i["key"])).sum(1, keepdim=True)
    logits = i["scale"] * torch.cat([own, query @ _unit(i["queue"]).T], 1)
    return -logits.log_softmax(1)[:, 0]


def _gte(i: dict[str, Tensor]) -> Tensor:
    q, d, own = _unit(i["query"]), _unit(i["document"]), _own(len(i["query"]))
    blocks = [i["scale"] * block for block in (q @ d.T, q @ q.T, d @ q.T, d @ d.T)]
    blocks = [b.masked_fill(own, -torch.inf) if at in (1, 3) else b for at, b in enumerate(blocks)]
    return torch.cat(blocks, 1).logsumexp(1) - i["scale"] * (q * d).sum(1)


def _linear_cross_entropy(i: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(i["hidden"] @ i["head"].T, i["labels"], reduction="none")


FORMULAS = {
    "info_nce": _info_nce,
    "clip": _clip,
    "siglip": _siglip,
    "nt_xent": _nt_xent,
    "sup_con": _sup_con,
    "moco": _moco,
    "gte": _gte,
    "linear_cross_entropy": _linear_cross_entropy,
}


class Losses(Subject):
    """A loss of the registry with the inputs that every test of losses takes."""

    name = "losses"
    weight = 8
    space = {
        "loss": One(tuple(sorted(LOSSES, key=lambda name: name not in FORMULAS))),
        "rows": One((3, 2, 1, 0, 5, 8, 16, 17, 31, 33, 64, 65, 130, 260)),
        "d": One((1, 2, 3, 5, 8, 16, 17, 64, 65, 100)),
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
                found = formula(g)
                return [found if reduction == "none" else found.sum() if reduction == "sum" else found.mean()]
            with eager.closed():
                return [case(g, reduction, "reference")]

        logits = float(drawn["scale"].detach().max()) if rows and "scale" in drawn else 1.0
        logits *= 1 if reduction == "mean" else max(rows, 1) ** 0.5
        return Call(given, lambda g: [case(g, reduction, backend)], dense, size=logits)
