"""InfoNCE: softplus(lse over the other columns - target logit) of each row.

A mean or sum forms its gradients in the forward pass: 6 N M D operations. Losses of rows, a margin, a z-loss, label
smoothing of filtered pairs and diagnostics need the folds, whose products are made again in backward, or kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.records import changed
from ..core.rules import Pairs
from . import _arguments
from ._columns import (
    check_filters,
    check_pairs,
    checked_own_target,
    checked_row_mask,
    checked_row_negatives,
    partner_similarity,
    smoothing_share,
    wide,
    with_margin,
)
from ._distances import LOGITS, METRICS, as_products, take_rows
from ._eager import COLUMNS, eager_loss, is_off
from ._euclidean import euclidean_info_nce
from ._hardness import checked_hardness
from ._row_softmax import OwnColumns, given_softmax, row_softmax
from ._rules import of_blocks
from ._sweep import Prepared, Sweep
from .diagnostics import Diagnostics

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = ...,
    *,
    row_negatives: Tensor | None = ...,
    row_negative_bias: float | Tensor | None = ...,
    row_negative_mask: Tensor | None = ...,
    negative_pairs: Pairs | None = ...,
    in_batch: bool = ...,
    target: Tensor | None = ...,
    margin: float | Tensor = ...,
    smooth: str = ...,
    hardness: float = ...,
    z_loss: float = ...,
    metric: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.FilteredOptions],
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = ...,
    *,
    row_negatives: Tensor | None = ...,
    row_negative_bias: float | Tensor | None = ...,
    row_negative_mask: Tensor | None = ...,
    negative_pairs: Pairs | None = ...,
    in_batch: bool = ...,
    target: Tensor | None = ...,
    margin: float | Tensor = ...,
    smooth: str = ...,
    hardness: float = ...,
    z_loss: float = ...,
    metric: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.FilteredOptions],
) -> tuple[Tensor, Diagnostics]: ...


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    row_negatives: Tensor | None = None,
    row_negative_bias: float | Tensor | None = None,
    row_negative_mask: Tensor | None = None,
    in_batch: bool = True,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    negative_pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    margin: float | Tensor = 0.0,
    label_smoothing: float | Tensor = 0.0,
    smooth: str = "all",
    hardness: float = 0.0,
    z_loss: float = 0.0,
    metric: str = "dot",
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """InfoNCE in one direction: every query must find its key among all keys.

    Equivalent to::

        query, key, negatives, row_negatives = (F.normalize(each, dim=-1) for each in ...)
        s = query @ torch.cat([key, negatives]).T                                   # (N, M + K)
        s = s.masked_fill(~keep, -torch.inf)                                        # the rules of both, not the target
        s = torch.cat([s, torch.einsum("nd,nkd->nk", query, row_negatives)], 1)
        is_target = F.one_hot(target, s.shape[1])
        logits = (s - margin * is_target) / temperature + biases
        logits = logits + hardness * s.detach() * (1 - is_target)
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        (loss + z_loss * logits.logsumexp(1) ** 2).mean()

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (M, D); query i belongs to key ``target[i]``.
        negatives: (K, D), more columns for every query. Rows have no ids: one that is given twice counts twice.
        row_negatives: (N, D) or (N, K', D), more columns for each query alone; the same is true of them.
        row_negative_bias: added to the logits of ``row_negatives``: a number, or (N,) or (N, K') numbers,
            differentiable. SimCSE's weight of one's own hard negative; logQ of those that a query's own sampler drew.
        row_negative_mask: (N,) or (N, K') bool, False where a query has fewer: what stands there is not looked at.
        in_batch: whether keys of other queries are negatives. False: of the batch each query meets its own key alone,
            beside what is given as ``negatives`` and ``row_negatives``, and the batch costs nothing.
        target: (N,) int64 in [0, M). None: query i belongs to key i, and M >= N.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        pairs: which of the M keys are negatives of a query: ids of false negatives, bounds on the similarity, a guide,
            ... The target always takes part, and so do ``row_negatives``.
        negative_pairs: which of the K ``negatives`` are negatives of a query.
        col_bias: (M + K,), added to the logits of each column, positives included; differentiable. The logQ correction
            is minus the logarithm of how often a key is drawn. Not of ``row_negatives``.
        margin: subtracted from the similarity of each query with its key (additive margin); a number >= 0, or (N,) with
            one for each query, differentiable.
        label_smoothing: share of the target distribution that is spread evenly over all columns that take part; a
            float, or (N,) with a share for each row, differentiable.
        smooth: "all" columns share it, the target too, or the "others" alone.
        hardness: bonus of each negative's logit, ``hardness`` times its similarity, which is not differentiated: what
            is close counts more. Not with label smoothing, nor with a ``col_bias`` that requires a gradient.
        z_loss: factor of the squared logarithm of the softmax's denominator, which is added to the loss.
        metric: "dot": inner products, cosines where rows are normalised. "sqeuclidean": minus the squared distances, of
            the normalised rows unless ``normalize=False``, in the dtype of sums; bounds of ``pairs``, the margin and
            diagnostics are of that. "euclidean": minus the distances, of which a mean or a sum with ``negatives``,
            ``target``, ``margin`` and a constant ``weight`` is formed in 6 N M D operations; differentiable once.
        diagnostics: also return `Diagnostics` (accuracy, ranks, mean similarities) from the same sweep.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        memory_budget: bytes kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton", "triton_persistent", "cuda" or "hopper"; as in
            `similarity_reduce`.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs); with ``diagnostics`` the pair
        (loss, Diagnostics). Never negative without label smoothing. A row without any negative has loss 0 and
        gradient 0. For N = 0 the mean is NaN, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D). A mean or sum forms its gradients in the forward pass (6 N M D), unless ``margin``,
        ``z_loss``, ``diagnostics`` or ``label_smoothing`` with ``pairs`` need the rows themselves (8 N M D, 6 if
        kept); without gradients only the forward is paid (2 N M D).

    Source:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018. The margin: Yang et al.,
        Improving Multilingual Sentence Embedding using Bi-directional Dual Encoder with Additive Margin Softmax, 2019.

    Examples:
        >>> query, key = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = info_nce(query, key, temperature=0.1)
        >>> cosines = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(cosines / 0.1, torch.arange(8)), atol=1e-5)
        True
    """
    plain = negatives is None and row_negatives is None and pairs is None and col_bias is None and in_batch is True
    plain = plain and diagnostics is False and negative_pairs is None and row_negative_bias is None and smooth == "all"
    plain = plain and row_negative_mask is None
    plain = plain and metric == "dot"
    loss = None
    if plain and is_off(margin, label_smoothing, hardness, z_loss):
        loss = eager_loss(
            "softmax",
            COLUMNS,
            query,
            key,
            temperature=temperature,
            scale=scale,
            default_temperature=0.07,
            target=target,
            weight=weight,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
    if loss is not None:
        return loss
    given: dict[str, Any] = {"row_negatives": row_negatives, "row_negative_bias": row_negative_bias}
    given["row_negative_mask"] = row_negative_mask
    given.update({"in_batch": in_batch, "target": target, "temperature": temperature, "scale": scale, "pairs": pairs})
    given.update({"negative_pairs": negative_pairs, "col_bias": col_bias, "margin": margin, "smooth": smooth})
    given.update({"label_smoothing": label_smoothing, "hardness": hardness, "z_loss": z_loss, "weight": weight})
    given.update({"metric": metric, "reduction": reduction, "normalize": normalize, "diagnostics": diagnostics})
    checks.check_choice("info_nce", "metric", metric, LOGITS)
    if metric == "euclidean":
        del given["metric"]
        return euclidean_info_nce(query, key, negatives, **given)
    return prepared_info_nce(query, key, negatives, **given, memory_budget=memory_budget, backend=backend).loss()


def prepared_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    *,
    row_negatives: Tensor | None,
    row_negative_bias: float | Tensor | None,
    row_negative_mask: Tensor | None,
    in_batch: bool,
    target: Tensor | None,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    pairs: Pairs | None,
    negative_pairs: Pairs | None,
    col_bias: Tensor | None,
    margin: float | Tensor,
    label_smoothing: float | Tensor,
    smooth: str,
    hardness: float,
    z_loss: float,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    diagnostics: bool,
    memory_budget: int | None,
    backend: str,
    metric: str = "dot",
    shifted: bool = True,
) -> Prepared:
    """`info_nce`, checked; all of its options are given, and whether distances are of rows less a common one."""
    name = "info_nce"
    _arguments.check_reduction(name, reduction)
    z_loss = checks.number(name, "z_loss", z_loss, "[0, inf)")
    query, key, negatives, row_negatives = autocast.cast(query, key, negatives, row_negatives)
    checks.check_matrices(name, "query", query, "key", key)
    if weight is not None:
        _arguments.check_weight(name, weight, query.shape[0], "query", query)
        of_rows = (query, row_negatives, target, row_negative_bias, label_smoothing, margin)
        of_rows = tuple(_arguments.of_weighted(weight, each) for each in of_rows)
        query, row_negatives, target, row_negative_bias, label_smoothing, margin = of_rows
        temperature, scale = (_arguments.of_weighted(weight, each, 1) for each in (temperature, scale))
    scale = _arguments.resolve_scale(name, temperature, scale, 0.07)
    target = checked_own_target(name, target, query, key)
    if negatives is not None:
        checks.check_matrices(name, "query", query, "negatives", negatives)
    margin = _arguments.one_or_each(name, "margin", margin, "[0, inf)", "query", query)
    rules = rules_of_columns(in_batch, query, key, negatives, row_negatives, pairs, negative_pairs)
    more = key[:0] if negatives is None else negatives
    check_filters(name, None, col_bias, key.shape[0] + more.shape[0], "query", query)
    unit, sides = _arguments.in_sweep(normalize, query), _arguments.unit_sides(normalize, query, key, more)
    query, key, more = sides
    keep = None
    if row_negatives is not None:
        row_negatives = checked_row_negatives(name, query, row_negatives)
        if row_negative_mask is not None:
            keep = checked_row_mask(name, "row_negative_mask", row_negative_mask, row_negatives)
            row_negatives = left_out(row_negatives, keep)
        (row_negatives,) = _arguments.unit_sides(normalize, row_negatives)
    checks.check_choice(name, "metric", metric, METRICS)
    if metric == "sqeuclidean":
        alone = [] if row_negatives is None else [row_negatives]
        query, key, more, *alone = as_products([query], [key, more, *alone], unit, shifted)
        row_negatives, unit = (alone[0] if alone else None), False
    own = _own_columns(query, row_negatives, row_negative_bias, row_negative_mask, keep, unit)
    share = smoothing_share(name, label_smoothing, "query", query, smooth)
    sweep = Sweep((name, "query", "key"), scale, rules[0], col_bias, unit, memory_budget, backend, rules[1])
    options: dict[str, Any] = {
        "own": own,
        "own_logit": with_margin(scale, margin),
        "share": share,
        "smooth": smooth,
        "hardness": checked_hardness(name, hardness, scale, share, col_bias),
        "z_loss": z_loss,
        "weight": weight,
        "reduction": reduction,
        "diagnostics": diagnostics,
    }
    if in_batch:
        columns = key if negatives is None else torch.cat([key, more])
        return Prepared(row_softmax, sweep, query, columns, {**options, "target": target})
    with autocast.disabled(query):
        sweep, query, *given, biases = _without_batch(sweep, query, key, more, target, weight)
    return Prepared(_given, sweep, query, given[1], {**options, "positive": given[0], "positive_bias": biases})


def _given(sweep: Sweep, x: Tensor, y: Tensor, *, positive: Tensor, positive_bias: Any, **options: Any) -> Any:
    with autocast.disabled(x):  # the gradients of a row meet in float32
        return given_softmax(sweep, x, positive, y, positive_bias, **options)


def rules_of_columns(
    in_batch: bool,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    row_negatives: Tensor | None,
    pairs: Pairs | None,
    negative_pairs: Pairs | None,
) -> tuple[Pairs | None, Pairs | None]:
    """The rules of the sweep's columns, in one set or in two."""
    check_pairs("info_nce", pairs)
    check_pairs("info_nce", negative_pairs, "negative_pairs")
    checks.flag("info_nce", "in_batch", in_batch)
    if negatives is None and negative_pairs is not None:
        raise ValueError("info_nce: negatives must be given with negative_pairs, got None")
    if in_batch:
        if negatives is None:
            return pairs, None
        blocks = ("pairs", pairs, key.shape[0]), ("negative_pairs", negative_pairs, negatives.shape[0])
        return of_blocks("info_nce", query, *blocks)
    if negatives is None and row_negatives is None:
        raise ValueError("info_nce: negatives or row_negatives must be given with in_batch=False, got neither")
    if pairs is not None:
        raise ValueError(
            "info_nce: pairs must be None with in_batch=False, where keys of other queries take no part, got Pairs\n"
            "  use negative_pairs for what is given as negatives"
        )
    return negative_pairs, None


def _own_columns(
    query: Tensor,
    row_negatives: Tensor | None,
    bias: float | Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    unit: bool,
) -> OwnColumns | None:
    """The negatives of each row alone, their bias and mask, checked; all rows are as the sweep takes them."""
    if row_negatives is None:
        for key, each in (("row_negative_bias", bias), ("row_negative_mask", mask)):
            if each is not None:
                raise ValueError(f"info_nce: row_negatives must be given with {key}, got None")
        return None
    found = partner_similarity(query, row_negatives, unit)
    return OwnColumns(found, None if bias is None else _bias_of(found, bias, query), keep)


def _bias_of(similarity: Tensor, bias: float | Tensor, query: Tensor) -> Tensor:
    """(N, K): the biases of each row's own columns."""
    if not isinstance(bias, Tensor):
        return similarity.new_full((), checks.number("info_nce", "row_negative_bias", bias, "[-inf, inf]"))
    checks.check_tensor("info_nce", "row_negative_bias", bias)
    if bias.numel() == 1:
        return checks.one_number("info_nce", "row_negative_bias", bias, "query", query)
    rows, each = similarity.shape
    if bias.shape not in ((rows,), (rows, each)):
        raise ValueError(
            f"info_nce: row_negative_bias must be a number or have shape ({rows},) or ({rows}, {each}), "
            f"got {checks.shape(bias)}"
        )
    checks.check_floating("info_nce", "row_negative_bias", bias)
    checks.check_device("info_nce", "query", query, "row_negative_bias", bias)
    bias = bias.to(similarity.dtype)
    return bias[:, None] if bias.dim() == 1 else bias


def _without_batch(
    sweep: Sweep, query: Tensor, key: Tensor, negatives: Tensor, target: Tensor | None, weight: Tensor | None
) -> tuple[Sweep, Tensor, Tensor, Tensor, Tensor | None]:
    """The sweep over the negatives, the queries, their positives, those columns, and the positives' biases.

    The gradients of the positive and of the negatives nearly cancel: those of 16-bit rows meet in float32. Keys and
    negatives stay apart, so that a queue without a gradient costs none.
    """
    own = torch.arange(query.shape[0], device=query.device) if target is None else target
    query, key, negatives = (wide(each, sweep.unit) for each in (query, key, negatives))
    positive, keys = _arguments.of_weighted(weight, take_rows(key, own)), key.shape[0]
    biases = None if sweep.col_bias is None else sweep.col_bias.to(query.dtype)
    of_positive = None if biases is None else take_rows(biases[:keys, None], own)[:, 0]
    of_negatives = None if biases is None else biases[keys:]
    sweep = changed(sweep, unit=False, col_bias=of_negatives)
    return sweep, query, positive, negatives, of_positive
