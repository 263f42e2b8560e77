"""Recipes without negatives of the usual kind: alignment, decorrelation, sparse codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..core import checks
from ..core.numerics import softplus
from ..losses import RunningCovariance, alignment, barlow_twins, log_det, uniformity, vicreg
from ..losses._columns import wide
from ..losses._sweep import Sweep
from ..ops import Pairs


def align_uniform(
    x: Tensor, y: Tensor, queue: Tensor | None = None, *, align: float | None = None, uniform: float = 1.0
) -> Tensor:
    """Alignment of positives and uniformity of both views, or of queries among themselves and a queue.

    Equivalent to::

        align * (x - y).norm(dim=1).square().mean() + uniform * (u(x) + u(y)) / 2       # unit rows; align = 1
        u = lambda z: torch.pdist(z).square().mul(-2).exp().mean().log()
        d = torch.cat([torch.pdist(x), torch.cdist(x, queue).flatten()])                # with a queue; align = 3
        align * ... + uniform * d.square().mul(-3).exp().mean().log()

    Args:
        x: (N, D) two views, or queries and their keys.
        y: as `x`.
        queue: (K, D) keys of earlier batches, for the MoCo form: align = 3, and t = 3 in the exponent.
        align: weight of alignment; None: 1, or 3 with a queue.
        uniform: weight of uniformity.

    Source:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity, 2020 (S053);
        released code. S032 has the first form.
    """
    if queue is None:
        spread = (uniformity(x) + uniformity(y)) / 2
        return (1.0 if align is None else align) * alignment(x, y) + uniform * spread
    return (3.0 if align is None else align) * alignment(x, y) + uniform * uniformity(x, queue, t=3.0)


def unsee(
    first: Tensor,
    second: Tensor,
    target_first: Tensor,
    target_second: Tensor,
    *,
    kind: str = "vicreg",
    states: tuple[RunningCovariance, RunningCovariance] | None = None,
) -> Tensor:
    """UNSEE: predictions of two dropout views against the other view by an averaged encoder.

    Equivalent to::

        loss(first, target_second) + loss(second, target_first)
        loss = vicreg | barlow_twins | alignment                                # "vicreg" | "barlow" | "byol"
        2000 * F.mse_loss(p, t) - 0.2 / D * (log_det(R(p)) + log_det(R'(t)))    # "corinfomax", running covariances

    Args:
        first: (N, D) predictions.
        second: as `first`.
        target_first: (N, D) by the averaged encoder; no gradient.
        target_second: as `target_first`.
        states: for "corinfomax", of predictions and of targets; both terms of a step use them, one after another.
        kind: "vicreg", "barlow", "byol" or "corinfomax".

    Source:
        Çağatan, UNSEE, 2024 (S063); released code.
    """
    checks.check_choice("unsee", "kind", kind, ("vicreg", "barlow", "byol", "corinfomax"))
    pairs = ((first, target_second.detach()), (second, target_first.detach()))
    if kind != "corinfomax":
        losses = {"vicreg": vicreg, "barlow": barlow_twins, "byol": alignment}
        return sum((losses[kind](*each) for each in pairs), first.new_zeros(()))  # type: ignore[operator]
    if states is None:
        raise ValueError("unsee: states must be two RunningCovariance with kind='corinfomax', got None")
    total = first.new_zeros(())
    for each in pairs:
        spread = sum(log_det(state(rows), covariance=True) for state, rows in zip(states, each, strict=True))
        total = total + 2000 * mse_loss(*each) - 0.2 / first.shape[1] * spread
    return total


def csr(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    centre: Tensor,
    *,
    k: int = 8,
    contrast: float = 0.1,
    temperature: float = 0.2,
) -> Tensor:
    """CSR: a sparse autoencoder that keeps the k largest codes, and contrast of the codes.

    Equivalent to::

        a = (x - centre) @ encoder.T + bias
        z = lambda k: torch.zeros_like(a).scatter(1, *reversed(a.topk(k, 1))).relu()
        error = lambda z: F.mse_loss(z @ encoder + centre, x)
        error(z(k)) + error(z(4 * k)) / 8 + contrast * nt_xent(z(k), z(k), temperature=temperature)

    Args:
        x: (N, D) embeddings of the backbone.
        encoder: (H, D), tied.
        bias: (H,) of the codes.
        centre: (D,), subtracted first and added last.
        k: codes that are kept; four times as many in the second reconstruction. At most H / 4.
        contrast: 0.1 for text and images. Each row's positive is a copy of itself, which leaves uniformity.
        temperature: divides the cosines of codes.

    Source:
        Wen et al., Beyond Matryoshka: Revisiting Sparse Coding for Adaptive Representation, 2025 (S076); released code,
        whose term for codes that are never chosen is the caller's.
    """
    k = checks.integer("csr", "k", k, 1, encoder.shape[0] // 4)
    codes = (x - centre) @ encoder.T + bias
    values, places = codes.topk(4 * k, 1)
    few, many = (torch.zeros_like(codes).scatter(1, places[:, :n], values[:, :n]).relu() for n in (k, 4 * k))
    first, second = (mse_loss(z @ encoder + centre, x) for z in (few, many))
    unit, sweep = wide(few, True), Sweep(("csr", "codes", "codes"), 1 / temperature, Pairs(diagonal=0))
    (others,) = sweep.fold(unit, None, "logsumexp").rows  # each stands for two copies, one's own for the positive
    own = unit.square().sum(1) / temperature
    return first + second / 8 + contrast * softplus(others + math.log(2) - own).mean()
