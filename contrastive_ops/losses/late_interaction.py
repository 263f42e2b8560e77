"""The contrastive loss of late interaction: InfoNCE over MaxSim scores.

Scores are formed without token-by-token matrices; the (N, M) scores themselves are small next to their tokens and are
kept, so that the loss over them is plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import checks
from ..core.masks import left_out
from ..core.numerics import softplus
from ..core.ordered import repeated
from ..core.records import changed
from ..ops.maxsim import REDUCTIONS, own_pairs, pair_scores, scores_of
from ..ops.token_sets import Packed, TokenSets, check_two_sides, concatenated, packed
from ..ops.xtr import retrieved_scores
from . import _arguments
from ._columns import wide


def late_interaction(
    queries: Tensor | TokenSets,
    documents: Tensor | TokenSets,
    negatives: Tensor | TokenSets | None = None,
    *,
    row_negatives: Tensor | TokenSets | None = None,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduce: str = "sum",
    symmetric: bool = False,
    retrieved: int | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over late interaction: every query must find its document among all documents by MaxSim.

    Equivalent to::

        queries, documents, negatives, row_negatives = (F.normalize(each, dim=-1) for each in ...)
        scores = [maxsim(queries, documents), maxsim(queries, negatives), maxsim_pairs(queries, row_negatives)]
        F.cross_entropy(torch.cat(scores, 1) / temperature, target)

    Args:
        queries: (N, L, D) tokens or `TokenSets`, as in `maxsim`.
        documents: (M, L', D) or `TokenSets`; query i belongs to document ``target[i]``.
        negatives: (K, L'', D) or `TokenSets`, more documents for every query, such as mined ones of the batch.
        row_negatives: (N, K', L'', D) or `TokenSets`, more documents for each query alone. Documents have no ids: one
            that is given twice counts twice.
        target: (N,) int64 in [0, M). None: query i belongs to document i, and M >= N.
        temperature: divides the scores; float, 0-d or (N,) tensor, differentiable. Default 1.0.
        scale: 1 / temperature instead; not both.
        reduce: over the tokens of a query, as in `maxsim`: "sum", or "mean", whose scores have the size of one cosine.
        symmetric: scores are the mean of MaxSim both ways, each reduced over the tokens of its own left side. A set
            without tokens then resembles nothing. Not with `row_negatives` or `retrieved`.
        retrieved: None, or how many document tokens of the batch each query token retrieves: scores are those of `xtr`,
            with ``missing="skip"``. Not with `row_negatives`, which are not of the batch.
        weight: (N,) weight of each query; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all tokens to length 1 first; O(T D). False where they have it already, or lengths shall count.
        backend: as in `maxsim`.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. A query without
        any negative has loss 0. A negative without tokens takes no part; a query whose document has none has loss inf.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maxsim`.

    Note:
        Memory: that of `maxsim`, 4 bytes for each query token and document, and of the scores, 4 N M.

    Source:
        Santhanam et al., ColBERTv2: Effective and Efficient Retrieval via Lightweight Late Interaction, 2022; the loss
        is `Contrastive` of PyLate. `retrieved`: see `xtr`. `symmetric`: Lee et al., Toward Interpretable Semantic
        Textual Similarity via Optimal Transport-based Contrastive Sentence Learning, 2022, with ``reduce="mean"``.

    Examples:
        >>> from contrastive_ops.losses import late_interaction
        >>> from contrastive_ops.ops import TokenSets, maxsim
        >>> queries, documents = torch.randn(4, 3, 8), TokenSets(torch.randn(4, 9, 8), torch.rand(4, 9) < 0.8)
        >>> loss = late_interaction(queries, documents, normalize=False)
        >>> truth = torch.nn.functional.cross_entropy(maxsim(queries, documents), torch.arange(4))
        >>> torch.allclose(loss, truth, atol=1e-5)
        True
    """
    name = "late_interaction"
    _arguments.check_reduction(name, reduction)
    checks.check_choice(name, "reduce", reduce, REDUCTIONS)
    checks.flag(name, "symmetric", symmetric)
    if symmetric and (row_negatives is not None or retrieved is not None):
        raise ValueError(f"{name}: row_negatives and retrieved must be None with symmetric, got one of them")
    q, d, more, own = _sides(name, queries, documents, negatives, row_negatives)
    if weight is not None:
        _arguments.check_weight(name, weight, q.shape[0], "queries", q.tokens)
        q, own = _of_weighted(weight, q), None if own is None else _of_weighted(weight, own)
        target = _arguments.of_weighted(weight, target)
        temperature, scale = (_arguments.of_weighted(weight, each, 1) for each in (temperature, scale))
    target = _checked_target(name, q, d, target)
    factor = _arguments.resolve_scale(name, temperature, scale, 1.0)
    if normalize:
        q, d = _unit(q), _unit(d)
        more, own = (None if each is None else _unit(each) for each in (more, own))
    if retrieved is None:
        options: dict[str, Any] = {"reduce": reduce, "backend": backend}
        columns = [each for each in (d, more) if each is not None]
        parts = [scores_of(name, q, each, **options) for each in columns]
        if symmetric:
            back = [scores_of(name, each, q, **options).T for each in columns]
            parts = [(one + other) / 2 for one, other in zip(parts, back, strict=True)]
        if own is not None:
            pairs = own_pairs(name, q, own, "row_negatives")
            of_own = pair_scores(name, q, own, pairs, reduce=reduce, backend=backend).view(own.shape)
            parts.append(of_own if of_own.dim() == 2 else of_own[:, None])
        scores = torch.cat(parts, 1)
    else:
        retrieved = checks.integer(name, "retrieved", retrieved, 1)
        if own is not None:
            raise ValueError(f"{name}: row_negatives must be None where retrieved is given: no batch has their tokens")
        everything = d if more is None else concatenated(d, more)
        scores = retrieved_scores(name, q, everything, retrieved, "skip", reduce, backend)
    losses = _row_losses(scores, target, checks.scale_tensor(name, factor, "queries", scores))
    return _arguments.reduce_rows(losses, weight, reduction)


def _sides(
    function: str,
    queries: Tensor | TokenSets,
    documents: Tensor | TokenSets,
    negatives: Tensor | TokenSets | None,
    row_negatives: Tensor | TokenSets | None,
) -> tuple[Packed, Packed, Packed | None, Packed | None]:
    """Check the sets of tokens and their types; what is not given stays None."""
    q, d = packed(function, "queries", queries), packed(function, "documents", documents)
    check_two_sides(function, q, d)
    more = None if negatives is None else packed(function, "negatives", negatives)
    if more is not None:
        check_two_sides(function, q, more, "negatives")
    own = None if row_negatives is None else packed(function, "row_negatives", row_negatives, lists=True)
    if own is not None:
        check_two_sides(function, q, own, "row_negatives")
    return q, d, more, own


def _checked_target(function: str, q: Packed, d: Packed, target: Tensor | None) -> Tensor:
    count, columns = q.shape[0], d.shape[0]
    if target is None:
        if columns < count:
            raise ValueError(
                f"{function}: documents must be at least as many as queries where target is not given, "
                f"got {columns} and {count}"
            )
        return torch.arange(count, device=q.tokens.device)
    target = checks.check_index(function, "target", target, count, "queries", q.tokens)
    checks.check_index_values(function, "target", target, columns)
    return target


def _of_weighted(weight: Tensor, sets: Packed) -> Packed:
    """The sets with zeros for the tokens of rows of weight 0, each of which has one set or a list of them."""
    each = sets.shape[1] if len(sets.shape) == 2 else 1
    used = torch.cat([(weight != 0).repeat_interleave(each), weight.new_zeros(1, dtype=torch.bool)])
    return changed(sets, tokens=left_out(sets.tokens, used[sets.owners()]))


def _unit(sets: Packed) -> Packed:
    """Unit rows in the accumulation dtype: in 16 bits they would be rounded once more."""
    return changed(sets, tokens=wide(sets.tokens, True))


def _row_losses(scores: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """(N,) softplus(lse over the other columns - target logit)."""
    # One factor for each row, so that its gradient is summed up in one order.
    factor = scale if scale.dim() else repeated(scale, scores.shape[0])
    # Where a document has no tokens: -inf times a scale that is learned would have a gradient of 0 * inf.
    empty = scores == -torch.inf
    logits = (factor[:, None] * scores.masked_fill(empty, 0.0)).masked_fill(empty, -torch.inf)
    positive = logits.gather(1, target[:, None]).squeeze(1)
    others = _lse(logits.scatter(1, target[:, None], -torch.inf))
    # Neither its document nor any negative has a token: not the difference of two infinities.
    nowhere = (positive == -torch.inf) & (others == -torch.inf)
    return torch.where(
        nowhere, torch.inf, softplus(torch.where(nowhere, 0.0, others) - positive.masked_fill(nowhere, 0.0))
    )


def _lse(logits: Tensor) -> Tensor:
    """(N,) logsumexp of each row, with gradient 0 where all are -inf.

    By log_softmax, which goes row by row: elsewhere, which exponentials are computed in a vector and which at the end
    of a thread's share, and so their last bits, depends on the number of threads.
    """
    alone = pad(logits, (0, 1), value=-torch.inf)  # a column more, so that there is one where there is no document
    nothing = (alone == -torch.inf).all(1)
    alone = torch.where(nothing[:, None], 0.0, alone)
    best = alone.detach().argmax(1, keepdim=True)
    lse = alone.gather(1, best) - alone.log_softmax(1).gather(1, best)
    return torch.where(nothing, -torch.inf, lse.squeeze(1))
