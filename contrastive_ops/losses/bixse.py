"""Binary cross-entropy of graded relevance: of all pairs (BiXSE), and of a list of pairs.

With one grade for each row a mean or sum forms its gradients in the forward pass: 6 N M D operations. Else products are
made again in backward, or kept: 8 N M D, 6 if kept. A list of P pairs costs 6 P D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.column_lists import check_lists
from ..core.ordered import repeated, segment_sums
from ..core.records import changed
from ..core.rules import Pairs
from . import _arguments
from ._binary import check_once, checked_labels, cross_entropy, one_grade, pair_logits, shared_bias
from ._columns import check_filters, checked_own_target
from ._sweep import Sweep


def bixse(
    query: Tensor,
    key: Tensor,
    grades: Tensor,
    *,
    target: Tensor | None = None,
    indptr: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor = -10.0,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """BiXSE: binary cross-entropy on graded relevance, all other keys of the batch being negatives.

    Equivalent to::

        query, key = F.normalize(query), F.normalize(key)
        logits = scale * query @ key.T + bias
        label = torch.zeros(N, M)
        label[torch.arange(N), target] = grades                  # with indptr: label[i, target[a:b]] = grades[a:b]
        F.binary_cross_entropy_with_logits(logits, label, reduction="none").sum(1).mean()

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (M, D).
        grades: (N,) relevance in [0, 1] of one key per query, or (P,) of lists of keys. Differentiable.
        target: (N,) int64 in [0, M), the graded key of each query; or (P,), the lists. None: query i's is key i.
        indptr: (N + 1,) int64: query i's graded keys are ``target[indptr[i]:indptr[i + 1]]``; a key that is listed
            twice for a query is an error. None: one per query.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        bias: added to every logit; float or 0-d tensor, differentiable.
        pairs: which keys are negatives of a query: ids of false negatives, bounds on the similarity, a guide, ...
            Graded keys always take part.
        col_bias: (M,), added to the logits of each key; differentiable.
        weight: (N,) weight >= 0 of each query; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none"; of queries, each of which is a sum over its M keys.
        normalize: scale all rows to length 1 first; O((N + M) D). False where they have it already, or lengths
            shall count.
        memory_budget: bytes kept for backward with lists or ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). The mean of no rows is NaN.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D + P). One grade per query forms the gradients of a mean or sum in the forward pass
        (6 N M D); lists take 8 N M D.

    Source:
        Tsirigotis et al., BiXSE: Improving Dense Retrieval via Probabilistic Graded Relevance Distillation, 2025:
        ``softplus(l) - grade * l`` on the labelled pair and ``softplus(l)`` on in-batch pairs. Scale and bias are
        those of SigLIP here.

    Examples:
        >>> query, key = torch.randn(4, 16), torch.randn(6, 16)
        >>> loss = bixse(query, key, torch.tensor([1.0, 0.7, 0.0, 0.3]))
        >>> indptr, listed = torch.tensor([0, 2, 2, 3, 4]), torch.tensor([0, 5, 2, 3])
        >>> bixse(query, key, torch.rand(4), target=listed, indptr=indptr, reduction="none").shape
        torch.Size([4])
    """
    name = "bixse"
    query, key, scale = _arguments.two_sides(
        name,
        (("query", query), ("key", key)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        anchors=1,
    )
    check_filters(name, pairs, col_bias, key.shape[0], "query", query)
    row_bias, unit = repeated(shared_bias(name, bias, query), query.shape[0]), _arguments.in_sweep(normalize, query)
    sweep = Sweep((name, "query", "key"), scale, pairs, col_bias, unit, memory_budget, backend)
    if indptr is None:
        target, grades = (_arguments.of_weighted(weight, each) for each in (target, grades))
        target = checked_own_target(name, target, query, key)
        grades = checked_labels(name, "grades", grades, query.shape[0], "query", query)
        return one_grade(sweep, query, key, row_bias, target, grades, weight, reduction)
    if target is None:
        raise ValueError(f"{name}: target must be given with indptr, got None\n  it holds the keys of all lists")
    target = checks.check_index(name, "target", target, None, "query", query)
    checks.check_vector(name, "grades", grades, target.shape[0], "query", query)
    indptr, target, grades = _arguments.lists_of_weighted(weight, indptr, target, grades)
    grades = checked_labels(name, "grades", grades, target.shape[0], "query", query)
    indptr, cols, order = check_lists(name, "target", (indptr, target), query, key)
    rows = torch.repeat_interleave(indptr.diff(), output_size=cols.shape[0])
    check_once(name, rows, cols)
    sweep = changed(sweep, pairs=_without_graded(name, pairs, indptr, cols))
    (negatives,), *_ = sweep.fold(query, key, "sum_softplus", row_bias=row_bias)
    logits = pair_logits(name, "query", query, key, rows, cols, scale, bias, unit)
    logits = logits if col_bias is None else logits + col_bias.to(logits.dtype)[cols]
    graded = segment_sums(cross_entropy(logits, grades[order]), rows, negatives.shape[0])
    return _arguments.reduce_rows(negatives + graded, weight, reduction)


def _without_graded(function: str, pairs: Pairs | None, indptr: Tensor, cols: Tensor) -> Pairs:
    """The rules of the keys that have no grade."""
    for rule in ("exclude", "fill"):
        if getattr(pairs, rule, None) is not None:
            raise ValueError(f"{function}: pairs.{rule} must be None with indptr, which lists the graded keys")
    return changed(Pairs() if pairs is None else pairs, exclude=(indptr, cols))


def pair_bce(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    cols: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Binary cross-entropy of a list of pairs, each a row of x and a row of y.

    Equivalent to::

        logits = scale * (x[rows] * y[cols]).sum(1) + bias                                      # (P,)
        F.binary_cross_entropy_with_logits(logits, labels, weight=weight, reduction=reduction)

    except that a weighted mean divides by the sum of weights.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D); may be ``x``.
        rows: (P,) int64 in [0, N), the row of x of each pair. A pair that is listed twice counts twice, each time with
            its own label.
        cols: (P,) int64 in [0, M), the row of y of each pair.
        labels: (P,) probability in [0, 1] that the pair belongs together. Differentiable.
        temperature: divides the inner products; float, 0-d or (N,) tensor, differentiable. Default 1.
        scale: 1 / temperature instead; not both.
        bias: added to every logit; float or 0-d tensor, differentiable.
        weight: (P,) weight >= 0 of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none"; of pairs.
        normalize: scale all rows to length 1 first; O((N + M) D).

    Returns:
        0-d, or (P,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative, and exact for
        logits of any size. The mean of no pairs is NaN.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(P + (N + M) D): gathered rows exist for a chunk of pairs (4 MiB) at a time. Work 6 P D.

    Source:
        Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality, 2013 (negative
        sampling), for labels of 0 and 1.

    Examples:
        >>> x, y = torch.randn(4, 16), torch.randn(6, 16)
        >>> rows, cols = torch.tensor([0, 0, 3]), torch.tensor([5, 1, 1])
        >>> pair_bce(x, y, rows, cols, torch.tensor([1.0, 0.0, 0.2]), reduction="none").shape
        torch.Size([3])
    """
    name = "pair_bce"
    x, y, scale = _arguments.two_sides(
        name,
        (("x", x), ("y", y)),
        temperature=temperature,
        scale=scale,
        default_temperature=1.0,
        reduction=reduction,
        normalize=normalize,
    )
    rows = checks.check_index(name, "rows", rows, None, "x", x)
    cols = checks.check_index(name, "cols", cols, rows.shape[0], "x", x)
    if weight is not None:
        _arguments.check_weight(name, weight, rows.shape[0], "x", x)
        rows, cols, labels = (_arguments.of_weighted(weight, each) for each in (rows, cols, labels))
        if rows.shape[0] > 0:  # a pair that counts in place of one that does not: what row 0 holds may count nowhere
            used, first = weight != 0, (weight != 0).to(torch.uint8).argmax()
            rows, cols = (torch.where(used, each, each.index_select(0, first.view(1))) for each in (rows, cols))
    checks.check_index_values(name, "rows", rows, x.shape[0])
    checks.check_index_values(name, "cols", cols, y.shape[0])
    labels = checked_labels(name, "labels", labels, rows.shape[0], "x", x)
    logits = pair_logits(name, "x", x, y, rows, cols, scale, bias, _arguments.in_sweep(normalize, x))
    losses = cross_entropy(logits, labels)
    return _arguments.reduce_rows(losses, weight, reduction)
