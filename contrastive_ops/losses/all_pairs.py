"""Losses on the distances of all pairs of a labelled batch: contrastive (Hadsell) and lifted structure.

Roots of distances are no fold, so rows are streamed: 8 N^2 D operations, and never a matrix of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows
from ..core.ordered import ordered_sum
from ..reference.pairs import inner_products
from ..reference.stream import stream_rows
from ._columns import wide
from ._labels import labelled

MEANS = ("nonzero", "pairs")
# A graph of a chunk holds some twenty matrices of it.
ELEMENTS = CHUNK_ELEMENTS // 8


def batch_contrastive(
    x: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    squared: bool = False,
    mean_over: str = "nonzero",
    normalize: bool = True,
) -> Tensor:
    """Contrastive loss of all pairs of a batch: pull those of one label together, push the others to a margin.

    Equivalent to::

        d = torch.cdist(F.normalize(x), F.normalize(x))
        same, others = labels[:, None] == labels, ~torch.eye(N, dtype=torch.bool)
        near, far = (d - positive_margin).relu()[same & others], (negative_margin - d).relu()[~same]
        near, far = near ** 2 / 2, far ** 2 / 2                             # squared
        near[near > 0].mean() + far[far > 0].mean()                         # "pairs": near.mean() + far.mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 is no label: such a row is a negative of all others.
        positive_margin: the distance below which positives are not pulled, >= 0.
        negative_margin: the distance that negatives are pushed to, >= 0.
        squared: half the squared hinges, as in the paper; False: hinges, as pytorch-metric-learning has them.
        mean_over: "nonzero" hinges, or all "pairs"; of positives and of negatives apart.
        normalize: scale all rows to length 1 first; False where lengths shall count.

    Returns:
        0-d, in float32 (float64 for float64 inputs). Never negative; 0 where there is no pair. Rows that are alike up
        to rounding have no direction to move in: their gradient is 0.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D) and one chunk of rows. Distances are made of inner products: those below 3e-4 in float32 are
        rounding.

    Source:
        Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, 2006; equal to ``ContrastiveLoss`` of
        pytorch-metric-learning. Of given pairs: `contrastive`.

    Examples:
        >>> x, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, -1])
        >>> bool(batch_contrastive(x, labels) >= 0)
        True
    """
    name = "batch_contrastive"
    low, high = (
        checks.number(name, argument, value, "[0, inf)")
        for argument, value in (("positive_margin", positive_margin), ("negative_margin", negative_margin))
    )
    checks.flag(name, "squared", squared)
    checks.check_choice(name, "mean_over", mean_over, MEANS)
    x, labels = _checked(name, x, labels, normalize)

    def hinges(distance: Tensor, same: Tensor, others: Tensor, rows: slice, more: Tensor) -> tuple[Tensor, ...]:
        sides = ((distance - low).relu() * same, (high - distance).relu() * others)
        counted = [side > 0 for side in sides] if mean_over == "nonzero" else [same, others]
        sums = [(side.square() / 2 if squared else side).sum(1) for side in sides]
        return (*sums, *(each.sum(1) for each in counted))

    with autocast.disabled(x):
        near, far, pulled, pushed = _over_pairs(hinges, x, labels)
        return ordered_sum(near) / pulled.sum().clamp_min(1) + ordered_sum(far) / pushed.sum().clamp_min(1)


def lifted_structure(
    x: Tensor, labels: Tensor, *, margin: float = 1.0, positive_margin: float = 0.0, normalize: bool = True
) -> Tensor:
    """Lifted structure loss: each positive pair against all negatives of both of its rows.

    Equivalent to::

        d = torch.cdist(F.normalize(x), F.normalize(x))
        same, others = labels[:, None] == labels, ~torch.eye(N, dtype=torch.bool)
        lse = (margin - d).masked_fill(same, -torch.inf).logsumexp(1)
        hinges = (torch.logaddexp(lse[:, None], lse) + d - positive_margin).relu()
        hinges[same & others].square().mean() / 2

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        labels: (N,) int64. -1 is no label: such a row is a negative of all others.
        margin: subtracted from the distance of negatives before their logsumexp.
        positive_margin: subtracted from that of positives.
        normalize: scale all rows to length 1 first; False where lengths shall count.

    Returns:
        0-d, in float32 (float64 for float64 inputs). Never negative; 0 without positives or without negatives.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D) and one chunk of rows: two passes, one for the logsumexps and one for positive pairs.

    Source:
        Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, 2016; equal to
        ``LiftedStructureLoss`` of pytorch-metric-learning.

    Examples:
        >>> x, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, -1])
        >>> bool(lifted_structure(x, labels) >= 0)
        True
    """
    name = "lifted_structure"
    margin, low = (
        checks.number(name, argument, value)
        for argument, value in (("margin", margin), ("positive_margin", positive_margin))
    )
    x, labels = _checked(name, x, labels, normalize)

    def pushed(distance: Tensor, same: Tensor, others: Tensor, rows: slice, more: Tensor) -> Tensor:
        has = others.any(1)
        logits = (margin - distance).masked_fill(~others & has[:, None], -torch.inf)
        # Without negatives the hinge of no pair is open, and no slope is NaN.
        return torch.where(has, logits.logsumexp(1), torch.finfo(logits.dtype).min / 4)

    def hinges(distance: Tensor, same: Tensor, others: Tensor, rows: slice, lse: Tensor) -> tuple[Tensor, Tensor]:
        open_ = (torch.logaddexp(lse[rows, None], lse) + distance - low).relu() * same
        return open_.square().sum(1) / 2, same.sum(1)

    with autocast.disabled(x):
        lse = _over_pairs(pushed, x, labels)
        sums, counts = _over_pairs(hinges, x, labels, lse)
        return ordered_sum(sums) / counts.sum().clamp_min(1)


def _checked(function: str, x: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The rows in the accumulation dtype, of length 1 if asked for, and their labels."""
    x, *_ = labelled(function, x, labels, None, None, None, 1.0, 1.0, "mean", None, normalize)
    return wide(x, normalize), checks.check_index(function, "labels", labels, x.shape[0], "x", x)


def _over_pairs(
    fn: Callable[[Tensor, Tensor, Tensor, slice, Tensor], Any], x: Tensor, labels: Tensor, more: Tensor | None = None
) -> Any:
    """`fn` of the distances of a chunk's rows to all rows, of which pairs are of one label and which of another.

    `more` (N,) is handed to `fn` in whole; both it and x are differentiated.
    """
    more = x.new_zeros(()) if more is None else more
    plain = not torch.is_grad_enabled() or torch.compiler.is_compiling()
    if plain or torch._C._are_functorch_transforms_active():
        return _streamed(fn, x, labels, more)
    return _OverPairs.apply(fn, labels, x, more)


def _rows(x: Tensor) -> int:
    return max(1, ELEMENTS // max(1, x.shape[0]))


def _streamed(fn: Callable[..., Any], x: Tensor, labels: Tensor, more: Tensor) -> Any:
    return stream_rows(_chunk_of(fn, x, labels, more), x, chunk_rows=_rows(x))


def _chunk_of(fn: Callable[..., Any], x: Tensor, labels: Tensor, more: Tensor) -> Callable[[Tensor, slice], Any]:
    lengths, floor = x.square().sum(1), torch.finfo(x.dtype).eps

    def chunk(dots: Tensor, rows: slice) -> Any:
        distance = (lengths[rows, None] + lengths - 2 * dots).clamp_min(floor).sqrt()
        others = torch.ones_like(dots, dtype=torch.bool)
        others[:, rows].fill_diagonal_(False)
        same = (labels[rows, None] == labels) & (labels != -1) & others
        return fn(distance, same, others & ~same, rows, more)

    return chunk


class _OverPairs(torch.autograd.Function):
    """The pass with a graph of one chunk at a time.

    A graph of all chunks, also one without their tensors, is small blocks of memory between the large ones of each
    chunk, which the allocator then cannot reuse: the peak would grow with N^2.
    """

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., Any], labels: Tensor, x: Tensor, more: Tensor) -> Any:
        ctx.fn = fn
        ctx.save_for_backward(labels, x, more)
        parts = _streamed(fn, x, labels, more)
        if isinstance(parts, tuple):
            ctx.mark_non_differentiable(*(part for part in parts if not part.is_floating_point()))
        return parts

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        labels, *inputs = ctx.saved_tensors
        needed = [each for each in inputs if each.requires_grad]
        if torch.is_grad_enabled():  # a gradient that is differentiated in turn
            found = _gradients(
                stream_rows(_chunk_of(ctx.fn, inputs[0], labels, inputs[1]), inputs[0]), needed, upstream
            )
        else:
            x, more = (each.detach().requires_grad_(each.requires_grad) for each in inputs)
            needed, found = [each for each in (x, more) if each.requires_grad], None
            for rows in chunks_of_rows(x.shape[0], _rows(x)):
                with torch.enable_grad():
                    parts = _chunk_of(ctx.fn, x, labels, more)(inner_products(x[rows], x), rows)
                of_chunk = _gradients(parts, needed, [each[rows] for each in upstream])
                found = of_chunk if found is None else [a.add_(b) for a, b in zip(found, of_chunk, strict=True)]
        given = iter(found or [torch.zeros_like(each) for each in needed])
        return None, None, *(next(given) if each.requires_grad else None for each in inputs)


def _gradients(parts: Any, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of what has one."""
    parts = parts if isinstance(parts, tuple) else (parts,)
    used = [(part, each) for part, each in zip(parts, upstream, strict=True) if part.requires_grad]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    if torch.is_grad_enabled():
        values, factors = [part for part, _ in used], [each for _, each in used]
        return list(torch.autograd.grad(values, inputs, factors, create_graph=True, **options))
    # Of one number: with gradients of outputs torch imports sympy, 45 MB, at the first call.
    with torch.enable_grad():
        total = torch.stack([(part * each).sum() for part, each in used]).sum()
    return list(torch.autograd.grad(total, inputs, **options))
