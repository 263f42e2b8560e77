"""Regularisers of embeddings by distances and by rows: alignment, uniformity, KoLeo, sparsity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks, extension
from ..core.backends import choose
from ..core.numerics import merge_lse
from ..core.offsets import from_common_row
from ..core.ordered import ordered_logsumexp
from ..core.problem import Problem
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows
from ..ops.coarse import Coarse
from ..ops.similarity_reduce import fold
from ..ops.similarity_topk import BACKENDS, similarity_topk
from . import _arguments
from ._distances import distance_between, points

SPARSITIES = ("flops", "l1")
# Cosines above which rounding could take another row for the nearest one: half a squared distance is 1 - cosine.
_NEAR = 1 - 1e-3
# Fewer rows are compared in full precision at once; and candidates of a first pass of more.
_MANY, _CANDIDATES = 8192, 8


def alignment(
    x: Tensor,
    y: Tensor,
    *,
    power: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """Alignment: the distance of each row from its partner, to some power.

    Equivalent to::

        (F.normalize(x) - F.normalize(y)).norm(dim=1).pow(power).mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (N, D); row i is the partner of row i of ``x``.
        power: of the distance; a number > 0.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Equal rows have gradient 0.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D).

    Source:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere, 2020.

    Examples:
        >>> x = torch.randn(4, 8)
        >>> alignment(x, 2 * x)
        tensor(0.)
    """
    name = "alignment"
    power = checks.number(name, "power", power, "(0, inf)")
    x, y, _ = _arguments.two_sides(
        name,
        (("x", x), ("y", y)),
        temperature=None,
        scale=None,
        default_temperature=1.0,
        reduction=reduction,
        weight=weight,
        partners=True,
        anchors=2,
    )
    with autocast.disabled(x):
        # In the accumulation dtype before rows are normalised: partners differ by less than bfloat16 can tell.
        x, y = (each.to(checks.accumulator(each.dtype)) for each in (x, y))
        x, y = (unit_rows(x), unit_rows(y)) if normalize else (x, y)
        squared = (x - y).square().sum(1)
        # The slope of a root at 0 is infinite, and would turn the gradient of equal rows into NaN.
        apart = squared != 0
        losses = torch.where(apart, torch.where(apart, squared, 1.0).pow(power / 2), 0.0)
    return _arguments.reduce_rows(losses, weight, reduction)


def uniformity(
    x: Tensor,
    queue: Tensor | None = None,
    *,
    t: float = 2.0,
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Uniformity: the logarithm of the mean Gaussian potential of all pairs of rows.

    Equivalent to::

        x, queue = F.normalize(x), F.normalize(queue)
        squared = torch.cat([torch.pdist(x), torch.cdist(x, queue).flatten()]).square()
        squared.mul(-t).exp().mean().log()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        queue: (K, D) rows that are compared with those of ``x`` but not with each other, such as MoCo's queue; None for
            none. Differentiable; queues are usually without a gradient.
        t: factor of the squared distances; a number > 0.
        normalize: scale all rows to length 1 first, as the paper does.
        memory_budget: bytes of inner products kept for backward by each sweep; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, in float32 (float64 for float64 inputs): at most 0, and at least -4 t for normalised rows. Lower is more
        uniform. 0 with gradient 0 for one row without a queue, such as that of a last batch, which has no pair; NaN for
        no rows.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + K) D) beside ``memory_budget``. Work: a self-similarity sweep, 4 N^2 D with its gradient, and
        8 N K D for the queue.

    Source:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere, 2020; the queue: the authors' MoCo experiments.

    Examples:
        >>> x = torch.eye(4)
        >>> uniformity(x)                                                     # all squared distances are 2
        tensor(-4.)
    """
    name = "uniformity"
    t = checks.number(name, "t", t, "(0, inf)")
    x, queue = autocast.cast(x, queue)
    checks.check_matrix(name, "x", x)
    if queue is not None:
        checks.check_matrices(name, "x", x, "queue", queue)
    if x.shape[0] == 1 and (queue is None or queue.shape[0] == 0):
        return (x[:0] if queue is None else torch.cat([x[:0], queue])).sum(dtype=checks.accumulator(x.dtype))
    unit = _arguments.in_sweep(normalize, x)
    if normalize:
        (x,), queue = _arguments.unit_sides(True, x), None if queue is None else _arguments.unit_sides(True, queue)[0]
    else:
        # Distances do not change, and not in 16 bits, which differences need more than.
        with autocast.disabled(x):
            dtype = checks.accumulator(x.dtype)
            x, queue = from_common_row(x.to(dtype), None if queue is None else queue.to(dtype))
    lengths = None if normalize else _potential_of_lengths(x, t)
    options: dict[str, Any] = {"scale": 2.0 * t, "unit": unit, "memory_budget": memory_budget, "backend": backend}
    names = (name, "x", "queue")
    (of_rows,), *_ = fold(Problem.of(names, x, None, lengths, lengths), pairs=Pairs(diagonal=0), **options)
    rows = of_rows.new_full((), x.shape[0])
    total, count = ordered_logsumexp(of_rows), rows * (rows - 1)
    if queue is not None:
        of_queue = None if normalize else _potential_of_lengths(queue, t)
        (across,), *_ = fold(Problem.of(names, x, queue, lengths, of_queue), **options)
        # Pairs of x are counted twice, from either side.
        total = merge_lse(total - math.log(2.0), ordered_logsumexp(across))
        count = count / 2 + rows * queue.shape[0]
    return total - count.log() - (2.0 * t if normalize else 0.0)


def _potential_of_lengths(x: Tensor, t: float) -> Tensor:
    """What each row adds to -t times a squared distance beside the inner product."""
    with autocast.disabled(x):
        return -t * x.square().sum(1)


def koleo(
    x: Tensor,
    *,
    eps: float = 1e-8,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """KoLeo: minus the logarithm of each row's distance from its nearest neighbour, which spreads a batch out.

    Equivalent to::

        x = F.normalize(x)
        distance = torch.cdist(x, x).fill_diagonal_(torch.inf).amin(1)
        -(distance + eps).log().mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        eps: added to the distances; a number > 0.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out, though not
            as a neighbour of others.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as DINOv2 does.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Rows that are equal have loss
        -log(eps) and gradient 0, a row alone has loss and gradient 0, and the mean of no rows is NaN. The gradient goes
        to both rows of a distance; which row is the nearest is not differentiated.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_topk`.

    Note:
        Memory O(N D), in one sweep over half of the pairs: N^2 D operations. Where the processor multiplies bfloat16 in
        tiles (AMX), many rows are compared in that first, and in full precision where it could have hidden another.
        Distances are those of differences, and rows that are nearly equal to another are compared with all by them.

    Source:
        Sablayrolles et al., Spreading Vectors for Similarity Search, 2019; Oquab et al., DINOv2, 2023.

    Examples:
        >>> koleo(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))             # all at sqrt(2) from the nearest
        tensor(-0.3466)
    """
    name = "koleo"
    eps = checks.number(name, "eps", eps, "(0, inf)")
    _arguments.check_reduction(name, reduction)
    (x,) = autocast.cast(x)
    checks.check_matrix(name, "x", x)
    if weight is not None:
        _arguments.check_weight(name, weight, x.shape[0], "x", x)
    with autocast.disabled(x):
        rows = x.to(checks.accumulator(x.dtype))
        rows = unit_rows(rows) if normalize else rows
        nearest = _nearest_rows(rows.detach(), normalize, backend)
        all_rows = points(rows, "euclidean")
        distance = distance_between(all_rows, all_rows.take(nearest), "euclidean")
        losses = torch.where(nearest >= 0, -(distance + eps).log(), 0.0)
    return _arguments.reduce_rows(losses, weight, reduction)


def _nearest_rows(x: Tensor, unit: bool, backend: str) -> Tensor:
    """(N,) the nearest other row of each, -1 where there is none."""
    alone = Pairs(diagonal=0)
    if not unit or not checks.may_read(x, waits=True):
        return similarity_topk(x, k=1, metric="sqeuclidean", pairs=alone, backend=backend).indices[:, 0]
    nearest, cosine, proven = _nearest_by_cosine(x, alone, backend)
    close = ((cosine > _NEAR) | ~proven).nonzero()[:, 0]
    if len(close):
        own = torch.arange(len(close) + 1, device=x.device), close
        again = similarity_topk(x[close], x, 1, metric="sqeuclidean", pairs=Pairs(exclude=own), backend=backend)
        nearest[close] = again.indices[:, 0]
    return nearest


def _nearest_by_cosine(x: Tensor, alone: Pairs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) the nearest other row of each, their cosine, and whether no rounding to 16 bits can have hidden another."""
    if x.shape[0] >= _MANY and choose("koleo", BACKENDS, x, backend) == "cpu" and extension.has_bfloat16_tiles():
        coarse = Coarse(torch.bfloat16, candidates=_CANDIDATES, retry=False)
        values, indices, _, proven = similarity_topk(x, k=1, pairs=alone, coarse=coarse, backend=backend)
        if proven is not None and int((~proven).sum()) * 8 <= x.shape[0]:
            return indices[:, 0], values[:, 0], proven
    # The largest cosine of a self-similarity takes half of the products of a search.
    found = fold(Problem.of(("koleo", "x", "x"), x, None), reduce=("max",), pairs=alone, backend=backend)
    return found.row_argmax[0].clone(), found.rows[0], torch.ones_like(found.rows[0], dtype=torch.bool)


def sparsity(x: Tensor, *, kind: str = "flops") -> Tensor:
    """Sparsity of activations: SPLADE's FLOPS regulariser, or the L1 norm.

    Equivalent to::

        x.abs().mean(0).square().sum()                                        # kind="flops"
        x.abs().sum(1).mean()                                                 # kind="l1"

    Args:
        x: (N, V) float32, bfloat16, float16 or float64: one row of term weights per text.
        kind: "flops", which is proportional to the expected work of scoring a document through an inverted index, and
            presses hardest on terms that many texts use; or "l1".

    Returns:
        0-d, in float32 (float64 for float64 inputs). NaN for no rows.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        FLOPS is a square of means over the batch: the mean over micro-batches is another, larger number.

    Source:
        Formal et al., SPLADE: Sparse Lexical and Expansion Model for First Stage Ranking, 2021; Paria et al.,
        Minimizing FLOPs to Learn Efficient Sparse Representations, 2020.

    Examples:
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> sparsity(x), sparsity(x, kind="l1")
        (tensor(1.), tensor(1.))
    """
    name = "sparsity"
    checks.check_matrix(name, "x", x)
    checks.check_choice(name, "kind", kind, SPARSITIES)
    with autocast.disabled(x):
        magnitude = x.to(checks.accumulator(x.dtype)).abs()
        if kind == "flops":
            return magnitude.mean(0).square().sum()
        return magnitude.mean(0).sum()
