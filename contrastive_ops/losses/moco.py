"""Contrast with a queue of keys from earlier batches: MoCo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.records import changed
from ..core.rules import Pairs
from . import _arguments
from ._columns import check_filters, smoothing_share
from ._row_softmax import row_softmax
from ._rules import refuse, within
from ._sweep import Prepared, Sweep
from .diagnostics import Diagnostics

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    labels: Tensor | None = ...,
    queue_labels: Tensor | None = ...,
    smooth: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.FilteredOptions],
) -> Tensor: ...


@overload
def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    labels: Tensor | None = ...,
    queue_labels: Tensor | None = ...,
    smooth: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.FilteredOptions],
) -> tuple[Tensor, Diagnostics]: ...


def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    labels: Tensor | None = None,
    queue_labels: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    smooth: str = "all",
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """MoCo: every query must find its own key among the keys of a queue; other keys of the batch are no negatives.

    Equivalent to::

        q, k, queue = F.normalize(query), F.normalize(key), F.normalize(queue.detach())
        negatives = (q @ queue.T).masked_fill(labels[:, None] == queue_labels, -torch.inf)
        logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], 1) / temperature
        F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (N, D); row i is the positive of query i. Differentiable, although the keys of a momentum encoder need no
            gradient: compute them under `torch.no_grad`.
        queue: (K, D) of the same dtype, after the region's cast under autocast. Frozen: it is detached.
        labels: (N,) int64 with ``queue_labels``; -1 equals nothing.
        queue_labels: (K,) int64: a query drops the entries with its own label, such as earlier keys of the same sample.
            Give an entry that was never filled to nobody by leaving it out: ``queue[:filled]``.
        temperature: divides the similarities; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        pairs: which entries of the queue are negatives of a query: bounds on the similarity, a guide, ... ``labels``
            take the place of ``differ``; the own key always takes part, and ``fill`` is refused.
        col_bias: (K,), added to the logits of each entry of the queue; differentiable.
        label_smoothing: share of the target distribution that is spread evenly over the own key and the entries that
            take part; a float, or (N,) with a share for each row, differentiable.
        smooth: "all" columns share it, the own key too, or the "others" alone.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O((N + K) D).
        diagnostics: also return `Diagnostics` (accuracy, ranks, mean similarities) from the same sweep.
        memory_budget: bytes kept for backward where it recomputes; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs); with ``diagnostics`` the pair
        (loss, Diagnostics). Never negative without label smoothing. A row whose entries are all dropped has
        loss 0 and gradient 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + K) D). Work 4 N (N + K) D for a mean or sum, because the queue needs no gradient and that of the
        queries is formed in the forward pass; 6 with ``reduction="none"``, label smoothing or diagnostics; 2 without
        gradients. The part in N^2 is that of keys that other queries do not meet.

    Source:
        He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020.

    Examples:
        >>> query, key, queue = torch.randn(6, 16), torch.randn(6, 16), torch.randn(64, 16)
        >>> loss, measures = moco(query, key, queue, diagnostics=True)
        >>> measures.rank.shape
        torch.Size([6])
    """
    given: dict[str, Any] = {"labels": labels, "queue_labels": queue_labels, "temperature": temperature, "scale": scale}
    given.update({"pairs": pairs, "col_bias": col_bias, "label_smoothing": label_smoothing, "smooth": smooth})
    given.update({"weight": weight, "reduction": reduction, "normalize": normalize, "diagnostics": diagnostics})
    return prepared_moco(query, key, queue, **given, memory_budget=memory_budget, backend=backend).loss()


def prepared_moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    labels: Tensor | None,
    queue_labels: Tensor | None,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    pairs: Pairs | None,
    col_bias: Tensor | None,
    label_smoothing: float | Tensor,
    smooth: str,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    diagnostics: bool,
    memory_budget: int | None,
    backend: str,
) -> Prepared:
    """`moco`, checked; all of its options are given."""
    name = "moco"
    query, key, scale = _arguments.two_sides(
        name,
        (("query", query), ("key", key)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
        anchors=2,
    )
    (queue,) = autocast.cast(queue)
    checks.check_matrices(name, "query", query, "queue", queue)
    (queue,) = _arguments.unit_sides(normalize, queue.detach())
    count, entries = query.shape[0], queue.shape[0]
    check_filters(name, pairs, col_bias, entries, "query", query)
    if (labels is None) != (queue_labels is None):
        raise ValueError(f"{name}: labels and queue_labels must both be given, or neither")
    if labels is not None and queue_labels is not None:
        labels = checks.check_index(name, "labels", labels, count, "query", query)
        queue_labels = checks.check_index(name, "queue_labels", queue_labels, entries, "query", query)
        refuse(name, "pairs", pairs, {"differ": "labels take its place"})
        pairs = changed(Pairs() if pairs is None else pairs, differ=(labels, queue_labels))
    # The keys join the sweep although each is a column for its own query alone: the positive and the negatives close to
    # it nearly cancel in the gradient, which must therefore be summed before it is rounded to 16 bits.
    sweep = Sweep(
        (name, "query", "key and queue"),
        scale,
        pairs=within(name, "pairs", pairs, query, count, entries, 0),
        col_bias=None if col_bias is None else torch.cat([col_bias.new_zeros(count), col_bias]),
        unit=_arguments.in_sweep(normalize, query),
        memory_budget=memory_budget,
        backend=backend,
    )
    options: dict[str, Any] = {
        "target": None,
        "share": smoothing_share(name, _arguments.of_weighted(weight, label_smoothing), "query", query, smooth),
        "smooth": smooth,
        "weight": weight,
        "reduction": reduction,
        "diagnostics": diagnostics,
    }
    return Prepared(row_softmax, sweep, query, torch.cat([key, queue]), options)
