"""Sigmoid losses: SigLIP, several positives, graded relevance, lists of pairs.

Each pair is a binary classification of its own, -log sigmoid(l) for a positive and -log sigmoid(-l) for a negative, so
that a row is a plain sum of softplus. How their gradients are formed:

    loss                  reduction      gradients                                multiply-adds (2 each)
    siglip                mean, sum      in the forward pass                      6 N^2 D
    bixse, one grade      mean, sum      in the forward pass                      6 N M D
    any other             any            recomputed in backward, or kept          8 N M D, 6 if kept
    pair_bce              any            of the listed pairs alone                6 P D
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.column_lists import check_lists
from ..core.folds import Fold
from ..core.ordered import repeated, segment_sums
from ..core.rules import Pairs
from ..ops.similarity_reduce import fold
from . import _arguments
from ._binary import check_once, checked_labels, cross_entropy, one_grade, pair_logits, shared_bias
from ._columns import check_own_column, check_pairs, checked_target
from ._eager import PARTNERS, eager_loss


def siglip(
    image: Tensor,
    text: Tensor,
    *,
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
    """SigLIP's loss: tell each image's own text from every other text, pair by pair.

    Equivalent to::

        image, text = F.normalize(image), F.normalize(text)
        logits = scale * image @ text.T + bias
        sign = 2 * torch.eye(N) - 1                             # +1 for the own text, -1 for every other
        -F.logsigmoid(sign * logits).sum() / N

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        bias: added to every logit; float or 0-d tensor, differentiable. It starts at about -log(N): most pairs are
            negative.
        pairs: which texts are negatives of an image: ids of false negatives, bounds on the similarity, a guide, ... Its
            own text always takes part.
        col_bias: (N,), added to the logits of each text; differentiable.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none"; of rows, each of which is a sum over its N pairs.
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        memory_budget: bytes kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. The mean of no
        rows is NaN, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D). A mean or sum forms its gradients in the forward pass (6 N^2 D); without gradients only the
        forward is paid (2 N^2 D).

    Source:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023; equal to open_clip's ``SigLipLoss``.

    Example:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> cosines = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
        >>> sign = 2 * torch.eye(8) - 1
        >>> truth = -torch.nn.functional.logsigmoid(sign * (2.0 * cosines - 3.0)).sum() / 8
        >>> torch.allclose(siglip(image, text, scale=2.0, bias=-3.0), truth, rtol=1e-4)
        True
    """
    name = "siglip"
    if (
        pairs is None
        and col_bias is None
        and (
            loss := eager_loss(
                "sigmoid",
                PARTNERS,
                image,
                text,
                temperature=temperature,
                scale=scale,
                default_temperature=0.1,
                bias=bias,
                weight=weight,
                reduction=reduction,
                normalize=normalize,
                memory_budget=memory_budget,
                backend=backend,
            )
        )
        is not None
    ):
        return loss
    check_pairs(name, pairs)
    image, text, scale = _arguments.two_sides(
        name,
        (("image", image), ("text", text)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
        anchors=1,
    )
    names = (name, "image", "text")
    bias = repeated(shared_bias(name, bias, image), image.shape[0])
    unit = _arguments.in_sweep(normalize, image)
    return one_grade(
        names,
        image,
        text,
        scale,
        bias,
        None,
        None,
        weight,
        reduction,
        unit,
        memory_budget,
        backend,
        pairs,
        col_bias,
    )


def multi_positive_siglip(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    col_labels: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor = -10.0,
    col_bias: Tensor | None = None,
    balanced: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """SigLIP with any number of positives per row: the pairs with equal ids.

    Equivalent to::

        x, y = F.normalize(x), F.normalize(y)
        logits = scale * x @ y.T + bias
        positive = (labels[:, None] == col_labels) & (labels[:, None] != -1)
        pulled = torch.where(positive, F.softplus(-logits), 0).sum(1)
        pushed = torch.where(positive, 0, F.softplus(logits)).sum(1)
        if balanced:
            pulled, pushed = pulled / positive.sum(1).clamp(min=1), pushed / (~positive).sum(1).clamp(min=1)
        (pulled + pushed).mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D).
        labels: (N,) int64. -1 equals nothing: a row of negatives alone.
        col_labels: (M,) int64. None: those of the rows, and M = N.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        bias: added to every logit; float or 0-d tensor, differentiable.
        col_bias: (M,), added to the logits of each column; differentiable.
        balanced: divide each row's sum over positives and its sum over negatives by their numbers. False: every pair
            counts the same, as in SigLIP.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none"; of rows, each of which is a sum over its M pairs.
        normalize: scale all rows to length 1 first; O((N + M) D). False where they have it already, or lengths
            shall count.
        memory_budget: bytes kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. A row without
        positives keeps the loss of its negatives and counts. The mean of no rows is NaN.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D) beside ``memory_budget``. Positives and negatives share one sweep: 8 N M D.

    Source:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, with the sign +1 for every pair of one id.

    Example:
        >>> x, y = torch.randn(6, 16), torch.randn(4, 16)
        >>> labels, col_labels = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 3])
        >>> multi_positive_siglip(x, y, labels, col_labels, reduction="none").shape
        torch.Size([6])
    """
    name = "multi_positive_siglip"
    x, y, scale = _arguments.two_sides(
        name,
        (("x", x), ("y", y)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        anchors=1,
    )
    labels = checks.check_index(name, "labels", labels, x.shape[0], "x", x)
    col_labels = labels if col_labels is None else col_labels
    col_labels = checks.check_index(name, "col_labels", col_labels, y.shape[0], "x", x)
    same, differ = Pairs(same=(labels, col_labels)), Pairs(differ=(labels, col_labels))
    folds: tuple[Fold, ...] = (Fold("sum_softplus", pairs=same, negate=True), Fold("sum_softplus", pairs=differ))
    if balanced:
        folds += (Fold("count", pairs=same, negate=True), Fold("count", pairs=differ))
    row_bias, names = repeated(shared_bias(name, bias, x), x.shape[0]), (name, "x", "y")
    (pulled, pushed, *counts), *_ = fold(
        x,
        y,
        reduce=folds,
        scale=scale,
        row_bias=row_bias,
        col_bias=col_bias,
        unit=_arguments.in_sweep(normalize, x),
        memory_budget=memory_budget,
        names=names,
        backend=backend,
    )
    if balanced:
        pulled, pushed = pulled / counts[0].clamp_min(1), pushed / counts[1].clamp_min(1)
    return _arguments.reduce_rows(pulled + pushed, weight, reduction)


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

    Example:
        >>> query, key = torch.randn(4, 16), torch.randn(6, 16)
        >>> loss = bixse(query, key, torch.tensor([1.0, 0.7, 0.0, 0.3]))
        >>> indptr, listed = torch.tensor([0, 2, 2, 3, 4]), torch.tensor([0, 5, 2, 3])
        >>> bixse(query, key, torch.rand(4), target=listed, indptr=indptr, reduction="none").shape
        torch.Size([4])
    """
    name, names = "bixse", ("bixse", "query", "key")
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
    row_bias, unit = repeated(shared_bias(name, bias, query), query.shape[0]), _arguments.in_sweep(normalize, query)
    if indptr is None:
        target, grades = (_arguments.of_weighted(weight, each) for each in (target, grades))
        if target is None:
            check_own_column(name, query, key)
        else:
            target = checked_target(name, "target", target, "query", query, key.shape[0])
        grades = checked_labels(name, "grades", grades, query.shape[0], "query", query)
        return one_grade(
            names, query, key, scale, row_bias, target, grades, weight, reduction, unit, memory_budget, backend
        )
    if target is None:
        raise ValueError(f"{name}: target must be given with indptr, got None\n  it holds the keys of all lists")
    target = checks.check_index(name, "target", target, None, "query", query)
    checks.check_vector(name, "grades", grades, target.shape[0], "query", query)
    indptr, target, grades = _arguments.lists_of_weighted(weight, indptr, target, grades)
    grades = checked_labels(name, "grades", grades, target.shape[0], "query", query)
    indptr, cols, order = check_lists(name, "target", (indptr, target), query, key)
    rows = torch.repeat_interleave(indptr.diff(), output_size=cols.shape[0])
    check_once(name, rows, cols)
    pairs = Pairs(exclude=(indptr, cols))
    (negatives,), *_ = fold(
        query,
        key,
        reduce=("sum_softplus",),
        scale=scale,
        row_bias=row_bias,
        pairs=pairs,
        unit=unit,
        memory_budget=memory_budget,
        names=names,
        backend=backend,
    )
    logits = pair_logits(name, "query", query, key, rows, cols, scale, bias, unit)
    graded = segment_sums(cross_entropy(logits, grades[order]), rows, negatives.shape[0])
    return _arguments.reduce_rows(negatives + graded, weight, reduction)


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

    Example:
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
        if rows.shape[0]:  # a pair that counts in place of one that does not: what row 0 holds may count nowhere
            used, first = weight != 0, (weight != 0).to(torch.uint8).argmax()
            rows, cols = (torch.where(used, each, each.index_select(0, first.view(1))) for each in (rows, cols))
    checks.check_index_values(name, "rows", rows, x.shape[0])
    checks.check_index_values(name, "cols", cols, y.shape[0])
    labels = checked_labels(name, "labels", labels, rows.shape[0], "x", x)
    logits = pair_logits(name, "x", x, y, rows, cols, scale, bias, _arguments.in_sweep(normalize, x))
    losses = cross_entropy(logits, labels)
    return _arguments.reduce_rows(losses, weight, reduction)
