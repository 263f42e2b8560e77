"""Hinge losses on similarities: VSE and VSE++, the energy-based hinge, SimCTG.

    relu(margin + s_ij - s_ii)          negatives j of row i against its partner, summed or the hardest alone

A sum over negatives is linear in the logits once it is known which of them violate the margin, and that is a bound on
their similarity. So one sweep folds the sum and the number of violators, and the partner's logit leaves it as the
target, from the same accumulators: sum - number * (s_ii - margin). That makes both directions one sweep, and the
gradients of violators and partner meet in the tile before anything is rounded.

The hardest negatives are selected by a sweep without gradients and compared again row by row, for O(N D).

Rows that are normalised here stay in float32 and are swept in it, because rounding would turn hinges on and off. Rows
of a lower precision that have length 1 already are swept as they are, and faster, with ``normalize=False``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.folds import Fold
from ..core.masks import left_out
from ..core.problem import Problem
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows
from ..ops.similarity_reduce import fold
from ..reference.similarity_loss import usual_target
from . import _arguments
from ._columns import partner_similarity
from ._distances import take_rows


def vse(
    image: Tensor,
    text: Tensor,
    *,
    margin: float = 0.2,
    hardest: bool = False,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """VSE and VSE++: hinge of each pair against in-batch negatives in both directions, all of them or the hardest.

    Equivalent to::

        s = F.normalize(image) @ F.normalize(text).T
        rows = F.relu(margin + s - s.diag()[:, None]).fill_diagonal_(0)                 # other texts of an image
        cols = F.relu(margin + s - s.diag()).fill_diagonal_(0)                          # other images of a text
        (rows.sum(1) + cols.sum(0)).mean()                                              # hardest: amax in place of sum

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        margin: by how much a pair must be more similar than a negative; a number >= 0.
        hardest: only the most similar negative of each row and of each column (VSE++).
        labels: (N,) int64; pairs with equal labels, such as captions of one image, are no negatives. -1 equals nothing.
        weight: (N,) weight >= 0 of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" (the authors') or "none".
        normalize: scale all rows to length 1 first, as the papers do; O(N D).
        memory_budget: bytes kept for backward without ``hardest``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``: row i's loss plus column i's; in float32 (float64 for float64 inputs).
        Never negative; 0 without negatives. The mean of no rows is NaN.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. Both directions share one sweep: 8 N^2 D. ``hardest``: 2 N^2 D.

    Source:
        Kiros et al., Unifying Visual-Semantic Embeddings with Multimodal Neural Language Models, 2014; Faghri et al.,
        VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, 2018.

    Examples:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> bool(vse(image, text, hardest=True) <= vse(image, text))
        True
    """
    name = "vse"
    image, text = _partners(name, ("image", "text"), image, text, margin, weight, reduction, normalize)
    if labels is not None:
        labels = checks.check_index(name, "labels", labels, image.shape[0], "image", image)
    differ = None if labels is None else (labels, labels)
    if hardest:
        pairs = Pairs(diagonal=0, differ=differ)
        with torch.no_grad(), autocast.disabled(image):
            problem = Problem.of((name, "image", "text"), image, text)
            found = fold(problem, reduce=("max",), dim=(0, 1), pairs=pairs, backend=backend)
        image, text = _accumulated(image), _accumulated(text)
        losses = _against(image, text, text, found.row_argmax[0], margin)
        losses = losses + _against(text, image, image, found.col_argmax[0], margin)
        return _arguments.reduce_rows(losses, weight, reduction)
    bound = _violation(image, text, margin)
    of_rows, of_cols = Pairs(above=bound, differ=differ), Pairs(above=bound[None], differ=differ)
    with autocast.disabled(image):
        folded = fold(
            Problem.of((name, "image", "text"), image, text, target=usual_target(image, text)),
            reduce=(Fold("sum"), Fold("count"), Fold("sum", pairs=of_cols), Fold("count", pairs=of_cols)),
            dim=(0, 1),
            pairs=of_rows,
            memory_budget=memory_budget,
            backend=backend,
        )
    losses = _hinge(folded.rows[0], folded.rows[1], folded.target, margin)
    losses = losses + _hinge(folded.cols[2], folded.cols[3], folded.target, margin)
    return _arguments.reduce_rows(losses, weight, reduction)


def energy_hinge(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Energy-based hinge: each query's key must have a lower energy (minus the cosine) than its negatives.

    Equivalent to::

        s = F.normalize(query) @ F.normalize(torch.cat([key, negatives])).T             # (N, N + K)
        own = s.diag()[:, None]
        hinges = F.relu(margin + s - own).masked_fill(torch.eye(N, N + K) == 1, 0)
        hinges.amax(1).mean()                                                           # hardest=False: sum(1)

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (N, D); key i belongs to query i and is a negative of every other query.
        negatives: (K, D), more negatives of every query.
        margin: by how much the energies must differ; a number >= 0.
        hardest: only the negative of lowest energy, as in the paper. False: the sum over all negatives.
        weight: (N,) weight >= 0 of each query; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does; O((N + K) D).
        memory_budget: bytes kept for backward with ``hardest=False``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative; 0 without
        negatives. The mean of no rows is NaN.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + K) D) beside ``memory_budget``. Work 2 N (N + K) D, and 8 N (N + K) D with ``hardest=False``.

    Source:
        Jiang et al., Improved Universal Sentence Embeddings with Prompt-based Contrastive Learning and Energy-based
        Learning, 2022 (PromCSE): ``relu(margin + max over negatives of cos - cos of the pair)``, added to InfoNCE.

    Examples:
        >>> query, key, negatives = torch.randn(4, 16), torch.randn(4, 16), torch.randn(9, 16)
        >>> energy_hinge(query, key, negatives, reduction="none").shape
        torch.Size([4])
    """
    name = "energy_hinge"
    query, key, negatives = autocast.cast(query, key, negatives)
    if negatives is not None:
        checks.check_matrices(name, "query", query, "negatives", negatives)
    query, key = _partners(name, ("query", "key"), query, key, margin, weight, reduction, normalize, anchors=1)
    columns = key if negatives is None else torch.cat([key, _rows(negatives, normalize)])
    if hardest:
        with torch.no_grad(), autocast.disabled(query):
            problem = Problem.of((name, "query", "key"), query, columns)
            found = fold(problem, reduce=("max",), pairs=Pairs(diagonal=0), backend=backend)
        query, columns = _accumulated(query), _accumulated(columns)
        losses = _against(query, columns[: key.shape[0]], columns, found.row_argmax[0], margin)
        return _arguments.reduce_rows(losses, weight, reduction)
    with autocast.disabled(query):
        folded = fold(
            Problem.of((name, "query", "key"), query, columns, target=usual_target(query, columns)),
            reduce=("sum", "count"),
            pairs=Pairs(above=_violation(query, key, margin)),
            memory_budget=memory_budget,
            backend=backend,
        )
    losses = _hinge(folded.rows[0], folded.rows[1], folded.target, margin)
    return _arguments.reduce_rows(losses, weight, reduction)


def simctg(
    x: Tensor,
    segments: Tensor,
    *,
    margin: float = 0.5,
    average: str = "pair",
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """SimCTG's contrastive loss: push the tokens of one sequence apart, for sequences of any lengths.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(x).T
        pair = (segments[:, None] == segments) & (segments[:, None] != -1) & ~torch.eye(N, dtype=torch.bool)
        hinges = torch.where(pair, F.relu(margin - s.diag()[:, None] + s), 0)
        hinges.sum() / pair.sum()                                                       # average="pair"

    Args:
        x: (N, D) float32, bfloat16, float16 or float64: the tokens of all sequences, one below the other.
        segments: (N,) int64: the sequence of each token, in any order; -1 for padding, which takes no part.
        margin: by how much a token must be more similar to itself than to others; a number >= 0.
        average: "pair": the mean over all pairs of the batch, as in the authors' code. "segment": the mean over
            sequences of each one's mean over its n (n - 1) pairs, as in the paper.
        weight: (N,) weight >= 0 of each token; the mean divides by their sum, weighed likewise. Differentiable.
            0 leaves it out.
        reduction: "mean", "sum" or "none"; of tokens, each of which is the mean over the n - 1 others of its sequence.
            The mean weighs tokens as `average` says.
        normalize: scale all rows to length 1 first, as the paper does, so that ``s_ii`` is 1; O(N D).
        memory_budget: bytes kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. A token that is
        alone in its sequence has loss 0 and gradient 0 and is left out of the mean; 0 where no token counts.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. One self-similarity sweep, whatever the lengths.

    Source:
        Su et al., A Contrastive Framework for Neural Text Generation, 2022.

    Examples:
        Two sequences of four and three tokens, the second padded:

        >>> tokens, mask = torch.randn(2, 4, 16), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        >>> segments = torch.arange(2)[:, None].expand(2, 4).masked_fill(mask == 0, -1)
        >>> simctg(tokens.flatten(0, 1), segments.flatten(), reduction="none").shape
        torch.Size([8])
    """
    name = "simctg"
    x, _ = _arguments.one_side(
        name,
        "x",
        x,
        temperature=None,
        scale=None,
        default_temperature=1.0,
        reduction=reduction,
        weight=weight,
    )
    margin = checks.number(name, "margin", margin, "[0, inf)")
    checks.check_choice(name, "average", average, ("pair", "segment"))
    segments = checks.check_index(name, "segments", segments, x.shape[0], "x", x)
    x = left_out(x, segments != -1)
    # Exactly 1 for unit rows, whose own gradient would only lengthen them.
    own = x.new_ones(x.shape[:1], dtype=checks.accumulator(x.dtype)) if normalize else partner_similarity(x, x)
    with autocast.disabled(x):
        (sums, counts), *_ = fold(
            Problem.of((name, "x", "x"), _rows(x, normalize), None, margin - own),
            reduce=("sum_relu", "count"),
            pairs=Pairs(same=(segments, segments), diagonal=0),
            memory_budget=memory_budget,
            backend=backend,
        )
    losses, counted = sums / counts.clamp_min(1), counts > 0
    if reduction == "mean":
        share = counts if average == "pair" else 1 / (counts + 1)
        weight = share if weight is None else share * weight.to(share.dtype)
    return _arguments.mean_over(losses, counted, weight, reduction)


def _partners(
    function: str,
    names: tuple[str, ...],
    x: Tensor,
    y: Tensor,
    margin: float,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    anchors: int = 0,
) -> tuple[Tensor, Tensor]:
    """Check what the losses of partners take; return both matrices, cast and normalised as asked for."""
    margin = checks.number(function, "margin", margin, "[0, inf)")
    x, y, _ = _arguments.two_sides(
        function,
        ((names[0], x), (names[1], y)),
        temperature=None,
        scale=None,
        default_temperature=1.0,
        reduction=reduction,
        weight=weight,
        partners=True,
        anchors=anchors,
    )
    return _rows(x, normalize), _rows(y, normalize)


def _rows(x: Tensor, normalize: bool) -> Tensor:
    """Unit rows in the accumulation dtype, or the rows as they are.

    Rounded unit rows would turn hinges on and off, and make another negative the hardest.
    """
    if not normalize:
        return x
    with autocast.disabled(x):
        return unit_rows(_accumulated(x))


def _accumulated(x: Tensor) -> Tensor:
    return x.to(checks.accumulator(x.dtype))


def _violation(x: Tensor, y: Tensor, margin: float) -> Tensor:
    """(N,) from which similarity on a negative violates the margin."""
    return partner_similarity(x, y).detach() - margin


def _hinge(similarity: Tensor, count: Tensor, own: Tensor, margin: float) -> Tensor:
    """Sum of the hinges of `count` violators from the sum of their similarities; relu is for rounding."""
    return (similarity - count * (own - margin)).relu()


def _against(x: Tensor, partner: Tensor, candidates: Tensor, index: Tensor, margin: float) -> Tensor:
    """(N,) the hinge of each row's candidate against its partner; 0 where there is none."""
    hinge = (margin + partner_similarity(x, take_rows(candidates, index) - partner)).relu()
    return torch.where(index >= 0, hinge, 0.0)
