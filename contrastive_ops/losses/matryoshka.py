"""Matryoshka losses: the softmax losses of several prefixes of the embeddings at once, with one matmul for all.

What is learned this way can be truncated to any of the prefixes. A loss of its own for each prefix would multiply the
first columns again and again; here the inner products of a prefix are those of the one before it and some more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import softplus
from ..core.problem import Problem
from ..core.rules import Pairs
from ..ops.similarity_prefix import check_dims, prefix_folds
from . import _arguments
from ._columns import check_pairs, checked_target, own_column
from ._views import weight_of_views, without_itself


def matryoshka_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    dims: Sequence[int],
    dim_weights: Sequence[float] | None = None,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Matryoshka InfoNCE: every query must find its key among all keys, by each prefix of the embeddings.

    Equivalent to::

        unit = F.normalize if normalize else lambda z: z
        sum(
            w * info_nce(unit(query[:, :d]), unit(key[:, :d]), target=target, temperature=temperature, ...)
            for d, w in zip(dims, dim_weights)
        )

    which is ``MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), dims, dim_weights)`` of sentence-transformers
    with ``scale=20.0`` and the negatives behind the keys.

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (M, D); query i belongs to key ``target[i]``. Further rows, such as hard negatives, are columns for all.
        dims: lengths of the prefixes, ascending, such as ``(64, 128, 256, 512, 768)``. The whole embedding is one of
            them only if it is named; columns after the last take no part.
        dim_weights: weight of each prefix. None: 1 each. The weighted losses are summed, not averaged.
        target: (N,) int64 in [0, M). None: query i belongs to key i, and M >= N.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        pairs: which keys are negatives of a query: the rules ``diagonal`` and ``differ`` (ids of false negatives) of
            `Pairs`. The target always takes part.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale every prefix of every row to length 1: a truncated embedding is none. O(N D).
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_prefix`.

    Note:
        Memory O((N + M) D), whatever the number of prefixes. As many products as one `info_nce` of the longest
        prefix that keeps none.

    Source:
        Kusupati et al., Matryoshka Representation Learning, 2022.

    Examples:
        >>> from contrastive_ops import info_nce
        >>> query, key = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = matryoshka_info_nce(query, key, dims=(4, 16), dim_weights=(0.5, 1.0))
        >>> short = info_nce(query[:, :4], key[:, :4])
        >>> torch.allclose(loss, 0.5 * short + info_nce(query, key), rtol=1e-4)
        True
    """
    name = "matryoshka_info_nce"
    query, key, scale = _arguments.two_sides(
        name,
        (("query", query), ("key", key)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        anchors=1,
    )
    check_pairs(name, pairs)
    target = _arguments.of_weighted(weight, target)
    if target is None:
        target = own_column(name, query, key)
    else:
        target = checked_target(name, "target", target, "query", query, key.shape[0])
    dims, weights = _dims(name, check_dims(name, dims, "query", query), dim_weights)
    rows, _, own = prefix_folds(
        Problem.of((name, "query", "key"), query, key, target=target),
        dims=dims,
        scale=scale,
        normalize=normalize,
        pairs=pairs,
        backend=backend,
    )
    return _arguments.reduce_rows(_row_losses(weights, own, rows), weight, reduction)


def matryoshka_clip(
    image: Tensor,
    text: Tensor,
    *,
    dims: Sequence[int],
    dim_weights: Sequence[float] | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Matryoshka CLIP: CLIP's loss of each prefix of the embeddings, both directions, from one sweep.

    Equivalent to::

        unit = F.normalize if normalize else lambda z: z
        sum(w * clip(unit(image[:, :d]), unit(text[:, :d]), scale=scale, ...) for d, w in zip(dims, dim_weights))

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        dims: as in `matryoshka_info_nce`.
        dim_weights: as in `matryoshka_info_nce`.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        pairs: which images and texts are negatives of each other: the rules ``diagonal`` and ``differ`` of `Pairs`.
            An image and its own text always take part.
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale every prefix of every row to length 1: a truncated embedding is none. O(N D).
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_prefix`.

    Note:
        Memory O(N D), whatever the number of prefixes. As many products as one `clip` of the longest
        prefix that keeps none.

    Source:
        Kusupati et al., Matryoshka Representation Learning, 2022; the loss: Radford et al., Learning Transferable
        Visual Models From Natural Language Supervision, 2021.

    Examples:
        >>> from contrastive_ops import clip
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = matryoshka_clip(image, text, dims=(4, 16))
        >>> both = [clip(image[:, :d], text[:, :d]) for d in (4, 16)]
        >>> torch.allclose(loss, sum(both), rtol=1e-4)
        True
    """
    name = "matryoshka_clip"
    image, text, scale = _arguments.two_sides(
        name,
        (("image", image), ("text", text)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        partners=True,
    )
    check_pairs(name, pairs)
    dims, weights = _dims(name, check_dims(name, dims, "image", image), dim_weights)
    rows, cols, own = prefix_folds(
        Problem.of((name, "image", "text"), image, text, target=torch.arange(image.shape[0], device=image.device)),
        dims=dims,
        dim=(0, 1),
        scale=scale,
        normalize=normalize,
        pairs=pairs,
        backend=backend,
    )
    return _arguments.reduce_rows(_row_losses(weights, own, rows, cols), weight, reduction)


def matryoshka_nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    dims: Sequence[int],
    dim_weights: Sequence[float] | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Matryoshka NT-Xent: SimCLR's loss of each prefix of the embeddings, from one sweep at half the work.

    Equivalent to::

        sum(w * nt_xent(z0[:, :d], z1[:, :d], temperature=temperature, ...) for d, w in zip(dims, dim_weights))

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        dims: as in `matryoshka_info_nce`.
        dim_weights: as in `matryoshka_info_nce`.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.5.
        scale: 1 / temperature instead; not both.
        pairs: which of the other rows are negatives: the rule ``differ`` of `Pairs`, with 2 N ids, those of z0 first.
        weight: (N,) weight of each sample, or (2 N,) of each row; the mean divides by its sum. Differentiable.
            0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale every prefix of every row to length 1, as the paper does; O(N D).
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (2 N,) for ``reduction="none"`` (first the rows of ``z0``), in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_prefix`.

    Note:
        Memory O(N D), whatever the number of prefixes. As many products as one `nt_xent` of the longest
        prefix that keeps none.

    Source:
        Kusupati et al., Matryoshka Representation Learning, 2022; the loss: Chen et al., A Simple Framework for
        Contrastive Learning of Visual Representations, 2020.

    Examples:
        >>> z0, z1 = torch.randn(4, 16), torch.randn(4, 16)
        >>> matryoshka_nt_xent(z0, z1, dims=(8, 16), reduction="none").shape
        torch.Size([8])
    """
    name = "matryoshka_nt_xent"
    z0, z1, scale = _arguments.two_sides(
        name,
        (("z0", z0), ("z1", z1)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.5,
        reduction=reduction,
        partners=True,
    )
    check_pairs(name, pairs)
    weight = weight_of_views(name, weight, z0)
    dims, weights = _dims(name, check_dims(name, dims, "z0", z0), dim_weights)
    other = torch.arange(2 * len(z0), device=z0.device).roll(len(z0))
    rows, _, own = prefix_folds(
        Problem.of((name, "z0", "z1"), torch.cat([z0, z1]), None, target=other),
        dims=dims,
        scale=scale,
        normalize=normalize,
        pairs=without_itself(name, pairs),
        backend=backend,
    )
    return _arguments.reduce_rows(_row_losses(weights, own, rows), weight, reduction)


def _dims(function: str, dims: list[int], weights: Sequence[float] | None) -> tuple[list[int], list[float]]:
    """The prefixes and the weight of each; those of weight 0 are left out, unless all are."""
    if weights is None:
        return dims, [1.0] * len(dims)
    found = checks.listed(function, "dim_weights", weights)
    if len(found) != len(dims):
        raise ValueError(
            f"{function}: dim_weights must be as many as dims, got {len(found)} weights and {len(dims)} dims"
        )
    numbers = [checks.number(function, "dim_weights", each, "[0, inf)") for each in found]
    used = [place for place, number in enumerate(numbers) if number] or list(range(len(numbers)))
    return [dims[place] for place in used], [numbers[place] for place in used]


def _row_losses(weights: list[float], own: Tensor | None, *folds: Tensor | None) -> Tensor:
    """The weighted sum over prefixes of the cross-entropy, averaged over directions, of each row."""
    each = sum(softplus(fold - own) for fold in folds if fold is not None and own is not None)
    return sum(weight / len(folds) * losses for weight, losses in zip(weights, each, strict=True))  # type: ignore[arg-type,return-value]
