"""Softmax losses: InfoNCE, CLIP, NT-Xent.

Each is softplus(lse over the other columns - target logit) per row. How their gradients are formed:

    loss      reduction      gradients                                multiply-adds (2 each), N = M
    info_nce  mean, sum      in the forward pass (softplus_total)     6 N^2 D
    info_nce  none           recomputed in backward, or kept          8 N^2 D, 6 if kept
    clip      any            recomputed in backward, or kept          8 N^2 D, 6 if kept
    nt_xent   any            recomputed in backward, or kept          4 N^2 D, 3 if kept (N = both views)

Both directions of clip need every column's statistics before the first gradient, and so do the mirrored tiles of
nt_xent, which is why they cannot form gradients in their forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _autocast, _checks
from ..ops.pairs import Pairs
from ..ops.similarity_reduce import fold, merge_lse, needs_gradient, softplus_total
from . import _arguments


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)), exact on both sides (torch's softplus becomes the identity above 20)."""
    return -logsigmoid(-z)


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    row_negatives: Tensor | None = None,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE in one direction: every query must find its key among all keys.

    Equivalent to::

        logits = query @ torch.cat([key, negatives]).T                              # (N, M + K)
        logits = torch.cat([logits, torch.einsum("nd,nkd->nk", query, row_negatives)], 1) / temperature
        F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (M, D); query i belongs to key ``target[i]``.
        negatives: (K, D), more columns for every query.
        row_negatives: (N, K', D), more columns for each query alone.
        target: (N,) int64 in [0, M). None: query i belongs to key i, and M >= N.
        temperature: divides the inner products; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        label_smoothing: share of the target distribution that is spread evenly over all columns.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D).
        memory_budget: bytes kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative without label
        smoothing. For N = 0 the mean is NaN, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D). A mean or sum forms its gradients in the forward pass (6 N M D); without gradients only
        the forward is paid (2 N M D).

    Source:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.

    Example:
        >>> query, key = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = info_nce(query, key, temperature=0.1)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(query @ key.T / 0.1, torch.arange(8)), atol=1e-5)
        True
    """
    name = "info_nce"
    _arguments.check_reduction(name, reduction)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    query, key, negatives, row_negatives = _autocast.cast(query, key, negatives, row_negatives)
    _checks.check_matrices(name, "query", query, "key", key)
    scale = _arguments.resolve_scale(name, temperature, scale, 0.07)
    target = _own_column(name, query, key) if target is None else _checked_target(name, target, query, key)
    if negatives is not None:
        _checks.check_matrices(name, "query", query, "negatives", negatives)
        key = torch.cat([key, negatives])
    if row_negatives is not None:
        _check_row_negatives(name, query, row_negatives)
    if weight is not None:
        _checks.check_vector(name, "weight", weight, query.shape[0], "query", query)
    if normalize:
        query, key = _arguments.normalized(query), _arguments.normalized(key)
        row_negatives = None if row_negatives is None else _arguments.normalized(row_negatives)

    own = None if row_negatives is None else _row_logits(query, row_negatives, scale)
    extra = None if own is None else own.logsumexp(1)
    mean_logit = _mean_logit(query, key, own, scale) if label_smoothing else None
    if reduction != "none" and needs_gradient(query, key, scale, weight, extra):
        return _info_nce_total(
            query, key, scale, target, weight, extra, mean_logit, label_smoothing, reduction, backend
        )
    names = (name, "query", "key")
    rows, _, target_logit = fold(
        query, key, scale=scale, target=target, memory_budget=memory_budget, names=names, backend=backend
    )
    losses = softplus((rows if extra is None else merge_lse(rows, extra)) - target_logit)
    if mean_logit is not None:
        losses = losses + label_smoothing * (target_logit - mean_logit)
    return _arguments.reduce_rows(losses, weight, reduction)


def clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """CLIP's loss: InfoNCE from images to texts and from texts to images, averaged, from one sweep.

    Equivalent to::

        logits, labels = scale * image @ text.T, torch.arange(N)
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        temperature: divides the inner products; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D).
        memory_budget: bytes of inner products kept for backward: 0 keeps none (8 N^2 D), 4 N^2 keeps all of them
            (6 N^2 D). None: 128 MiB. Does not change the result.
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``.

    Source:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.

    Example:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> logits, labels = 10.0 * image @ text.T, torch.arange(8)
        >>> both = [torch.nn.functional.cross_entropy(each, labels) for each in (logits, logits.T)]
        >>> torch.allclose(clip(image, text, scale=10.0), sum(both) / 2, rtol=1e-4)
        True
    """
    name = "clip"
    _arguments.check_reduction(name, reduction)
    image, text = _autocast.cast(image, text)
    _check_partners(name, "image", image, "text", text)
    if weight is not None:
        _checks.check_vector(name, "weight", weight, image.shape[0], "image", image)
    scale = _arguments.resolve_scale(name, temperature, scale, 0.07)
    if normalize:
        image, text = _arguments.normalized(image), _arguments.normalized(text)
    target = torch.arange(image.shape[0], device=image.device)
    names = (name, "image", "text")
    rows, cols, target_logit = fold(
        image, text, dim=(0, 1), scale=scale, target=target, memory_budget=memory_budget, names=names, backend=backend
    )
    losses = (softplus(rows - target_logit) + softplus(cols - target_logit)) / 2
    return _arguments.reduce_rows(losses, weight, reduction)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """NT-Xent (SimCLR): two views of N samples, each must find the other among all 2 N - 1 others.

    Equivalent to::

        z = F.normalize(torch.cat([z0, z1]))                                        # (2 N, D)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        F.cross_entropy(logits, (torch.arange(2 * N) + N) % (2 * N))

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.5.
        scale: 1 / temperature instead; not both.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does; O(N D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (2 N,) for ``reduction="none"`` (first the rows of ``z0``), in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. The similarity matrix is symmetric and only its tiles on and above
        the diagonal are computed: half the work.

    Source:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020.

    Example:
        >>> z0, z1 = torch.randn(4, 16), torch.randn(4, 16)
        >>> nt_xent(z0, z1, reduction="none").shape
        torch.Size([8])
    """
    name = "nt_xent"
    _arguments.check_reduction(name, reduction)
    z0, z1 = _autocast.cast(z0, z1)
    _check_partners(name, "z0", z0, "z1", z1)
    scale = _arguments.resolve_scale(name, temperature, scale, 0.5)
    z = torch.cat([z0, z1])
    if normalize:
        z = _arguments.normalized(z)
    count = z0.shape[0]
    target = torch.arange(2 * count, device=z.device).roll(count)
    names, pairs = (name, "z0", "z1"), Pairs(diagonal=0)
    rows, _, target_logit = fold(
        z, scale=scale, target=target, pairs=pairs, memory_budget=memory_budget, names=names, backend=backend
    )
    return _arguments.reduce_rows(softplus(rows - target_logit), None, reduction)


def _info_nce_total(
    query: Tensor,
    key: Tensor,
    scale: float | Tensor,
    target: Tensor,
    weight: Tensor | None,
    extra: Tensor | None,
    mean_logit: Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str,
) -> Tensor:
    dtype = _checks.accumulator(query.dtype)
    row_weight = query.new_ones(query.shape[:1], dtype=dtype) if weight is None else weight.to(dtype)
    total = softplus_total(
        query,
        key,
        scale=scale,
        target=target,
        weight=row_weight,
        extra=extra,
        target_weight=None if mean_logit is None else label_smoothing * row_weight,
        names=("info_nce", "query", "key"),
        backend=backend,
    )
    if mean_logit is not None:
        total = total - label_smoothing * (row_weight * mean_logit).sum()
    return total if reduction == "sum" else _arguments.divide(total, row_weight, weight)


def _own_column(function: str, query: Tensor, key: Tensor) -> Tensor:
    if key.shape[0] < query.shape[0]:
        raise ValueError(
            f"{function}: key must have at least as many rows as query where target is not given, "
            f"got query {_checks.shape(query)} and key {_checks.shape(key)}"
        )
    return torch.arange(query.shape[0], device=query.device)


def _checked_target(function: str, target: Tensor, query: Tensor, key: Tensor) -> Tensor:
    _checks.check_index(function, "target", target, query.shape[0], "query", query)
    # Of the keys alone: a target among the shared negatives is a mistake that the operator could not see.
    _checks.check_index_values(function, "target", target, key.shape[0])
    return target


def _check_partners(function: str, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    _checks.check_matrices(function, x_name, x, y_name, y)
    if x.shape != y.shape:
        raise ValueError(
            f"{function}: {y_name} must have the same shape as {x_name}, "
            f"got {x_name} {_checks.shape(x)} and {y_name} {_checks.shape(y)}"
        )


def _check_row_negatives(function: str, query: Tensor, row_negatives: object) -> None:
    if not isinstance(row_negatives, Tensor):
        raise TypeError(f"{function}: row_negatives must be a tensor, got {type(row_negatives).__name__}")
    if row_negatives.dim() != 3 or row_negatives.shape[::2] != query.shape:
        raise ValueError(
            f"{function}: row_negatives must have shape ({query.shape[0]}, K, {query.shape[1]}), "
            f"got {_checks.shape(row_negatives)}"
        )
    if row_negatives.dtype != query.dtype:
        raise TypeError(
            f"{function}: row_negatives must have the same dtype as query, "
            f"got query {query.dtype} and row_negatives {row_negatives.dtype}"
        )
    _checks.check_device(function, "query", query, "row_negatives", row_negatives)


def _row_logits(query: Tensor, row_negatives: Tensor, scale: float | Tensor) -> Tensor:
    """(N, K) logits of each query with its own negatives, in the accumulation dtype."""
    dtype = _checks.accumulator(query.dtype)
    with _autocast.disabled(query):
        dots = torch.einsum("nd,nkd->nk", query.to(dtype), row_negatives.to(dtype))
    return _by_row(scale, dots) * dots


def _mean_logit(query: Tensor, key: Tensor, own: Tensor | None, scale: float | Tensor) -> Tensor:
    """(N,) mean logit over all columns; linear, so that sums of columns are enough."""
    dtype = _checks.accumulator(query.dtype)
    with _autocast.disabled(query):
        dots = query.to(dtype) @ key.to(dtype).sum(0)
    total = (scale.to(dtype) if isinstance(scale, Tensor) else scale) * dots
    if own is None:
        return total / key.shape[0]
    return (total + own.sum(1)) / (key.shape[0] + own.shape[1])


def _by_row(scale: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return scale
    scale = scale.to(device=like.device, dtype=like.dtype)
    return scale[:, None] if scale.dim() == 1 else scale
