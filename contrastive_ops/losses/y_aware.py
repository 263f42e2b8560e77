"""InfoNCE with continuous labels: keys are positives by how close their labels are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core import autocast, checks
from ..ops.similarity_values import similarity_values
from . import _arguments
from ._columns import by_row, scaled, wide
from ._distances import as_products
from ._one_pass import Part, sum_of_rows
from ._row_softmax import row_softmax
from ._sweep import Sweep

# Of (rows, N) distances of labels: numbers >= 0.
Weights = Callable[[Tensor], Tensor]


def y_aware_info_nce(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    *,
    bandwidth: float = 1.0,
    kernel: Weights | None = None,
    negative_weight: Weights | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """y-aware InfoNCE: each query's positives are all keys, weighted by a Gaussian of the difference of their labels.

    Equivalent to::

        s = F.normalize(query) @ F.normalize(key).T / temperature
        w = torch.exp(-torch.cdist(labels, labels) ** 2 / (2 * bandwidth**2))
        -((w / w.sum(1, keepdim=True)) * s.log_softmax(1)).sum(1).mean()
        w = kernel(torch.cdist(labels, labels))                                         # where it is given
        s - (s + negative_weight(torch.cdist(labels, labels)).log()).logsumexp(1)       # for s.log_softmax(1)

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (N, D); row i belongs to row i of ``query``, such as another view, and has its label.
        labels: (N,) or (N, L) numbers, such as an age; not differentiated.
        bandwidth: sigma of the Gaussian, in units of the labels; > 0. Towards 0 keys of equal labels are positives, as
            in `sup_con`; towards infinity all keys are alike.
        kernel: weights of the positives, in place of the Gaussian: a function of the distances of labels of some rows
            from all, (rows, N), which returns numbers >= 0, such as ``lambda d: 1 / (1 + d)``. A row without any is 0.
        negative_weight: how often each key counts in the sum below, as such a function: ``lambda d: 1 + d`` makes those
            far away count more (SupReMix).
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        memory_budget: bytes kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`; ``reduction="none"``, a weight or second
            derivatives that need a gradient, with functions.

    Note:
        Memory O(N D) beside ``memory_budget``: no weight is stored. The labels' softmax sums the keys
        (`similarity_values`), as what is linear in the logits needs no sweep over them: 10 N^2 D in all. With `kernel`
        or `negative_weight` 6 N^2 D in plain torch on any device, a chunk of rows at a time.

    Source:
        Dufumier et al., Contrastive Learning with Continuous Proxy Meta-Data for 3D MRI Classification, 2021.

    Examples:
        >>> query, key, age = torch.randn(8, 16), torch.randn(8, 16), torch.rand(8) * 60
        >>> y_aware_info_nce(query, key, age, bandwidth=5.0).shape
        torch.Size([])
    """
    name = "y_aware_info_nce"
    bandwidth = checks.number(name, "bandwidth", bandwidth, "(0, inf)")
    query, key, factor = _arguments.two_sides(
        name,
        (("query", query), ("key", key)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
        anchors=1,
    )
    places = _places(name, labels, query)
    unit = _arguments.in_sweep(normalize, query)
    if kernel is not None or negative_weight is not None:
        if kernel is None:
            kernel = lambda apart: (apart.square() / (-2 * bandwidth**2)).exp()  # noqa: E731
        x, y = (wide(each, unit) for each in (query, key))
        return _of_functions(x * by_row(factor, x), y, places, kernel, negative_weight, weight, reduction)
    sweep = Sweep((name, "query", "key"), factor, memory_budget=memory_budget, backend=backend)
    with autocast.disabled(query):
        # The gradients of both terms meet before those of 16 bits are rounded.
        x, y = wide(query, unit), wide(key, unit)
        loss: Tensor = row_softmax(sweep, x, y, target=None, weight=weight, reduction=reduction)
        left, right = as_products([places], [places])
        on = "auto" if backend == "cuda" else backend
        mean = similarity_values(left, right, y, scale=1 / (2 * bandwidth**2), backend=on)
        apart = scaled(factor, (x * (y - mean)).sum(1))
    return loss + _arguments.reduce_rows(apart, weight, reduction)


def _of_functions(
    x: Tensor,
    y: Tensor,
    places: Tensor,
    kernel: Weights,
    negative_weight: Weights | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The loss with any functions of the labels' distances, from logits `x @ y.T`."""
    name = "y_aware_info_nce"
    if reduction == "none":
        raise NotImplementedError(
            f"{name}: reduction must be 'mean' or 'sum' with kernel or negative_weight, got 'none'"
        )
    if weight is not None:
        checks.check_constant(name, "weight", weight)
    used = None if weight is None else _arguments.of_weighted(weight, weight).to(x.dtype)

    def losses(logits: Tensor, rows: slice, _: slice, needs: bool) -> Part:
        apart = torch.cdist(places[rows], places, compute_mode="donot_use_mm_for_euclid_dist")
        shares = kernel(apart)
        total = shares.sum(1, keepdim=True)
        has = total > 0
        shares = shares / torch.where(has, total, 1.0)
        counted = logits if negative_weight is None else logits + negative_weight(apart).log()
        lse = counted.logsumexp(1, keepdim=True)
        of_row = has.to(x.dtype) if used is None else used[rows, None] * has
        values = ((lse[:, 0] - (shares * logits).sum(1)).masked_fill(~has[:, 0], 0.0)) * of_row[:, 0]
        return Part(values, ((counted - lse).exp_() - shares) * of_row if needs else None)

    total = sum_of_rows(name, losses, x, y)
    return total if reduction == "sum" else _arguments.divide(total, x[:, 0], weight)


def _places(function: str, labels: Tensor, query: Tensor) -> Tensor:
    """(N, L) labels in the dtype of sums."""
    checks.check_tensor(function, "labels", labels)
    if labels.dim() not in (1, 2) or labels.shape[0] != query.shape[0]:
        rows = query.shape[0]
        raise ValueError(f"{function}: labels must have shape ({rows},) or ({rows}, L), got {checks.shape(labels)}")
    if labels.is_complex():
        raise TypeError(f"{function}: labels must be real numbers, got {labels.dtype}")
    checks.check_device(function, "query", query, "labels", labels)
    places = labels.detach().to(checks.accumulator(query.dtype))
    return places[:, None] if places.dim() == 1 else places
