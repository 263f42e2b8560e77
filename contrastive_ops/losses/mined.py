"""InfoNCE against the hardest rows of a corpus, which are mined in the same call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.lists import NONE, first_of_each
from ..core.numerics import lse_of_rows, softplus
from ..core.problem import Problem
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows
from ..ops._listed_logits import listed_logits
from ..ops.similarity_topk import select
from . import _arguments
from ._columns import check_expected, check_filters, check_pairs, less_expected, partner_similarity, scaled, wide
from ._row_softmax import row_softmax
from ._sweep import Sweep


def mined_info_nce(
    query: Tensor,
    positive: Tensor,
    corpus: Tensor,
    k: int | None = None,
    *,
    indices: Tensor | None = None,
    log_expected: Tensor | None = None,
    labels: Tensor | None = None,
    in_batch: bool = True,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE of each positive against the k hardest rows of a corpus and, if wanted, the positives of the batch.

    Equivalent to::

        query, positive, corpus = F.normalize(query), F.normalize(positive), F.normalize(corpus)
        scores = query @ corpus.T
        indices = scores.masked_fill(~keep, -torch.inf).topk(k).indices             # keep: the rules of Pairs
        mined = scores.gather(1, indices)
        others = (query @ positive.T).masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf)
        others = others.masked_fill((labels[:, None] == labels) & (labels != -1), -torch.inf)
        own = (query * positive).sum(1, keepdim=True) / temperature + col_bias[:, None]
        logits = [own, mined / temperature - log_expected[indices], others / temperature + col_bias]
        logits = torch.cat(logits, 1)
        F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        positive: (N, D); row i is the positive of query i.
        corpus: (M, D) of the same dtype, after the region's cast under autocast: documents, class prototypes, the
            entries of a memory bank. Differentiable; a frozen one costs no gradient.
        k: how many rows to mine for each query, the most similar ones; all that take part where there are fewer. The
            choice is not differentiated.
        indices: (N, P) int64 in place of k: rows of the corpus that were mined before, -1 for none. A list is a set: a
            row that is listed twice counts once.
        log_expected: with indices that were drawn, not mined: the logarithm of how often a row of the corpus is
            expected in a list, (M,) or (N, P) as they are listed; it is subtracted from the logit (sampled softmax).
            `UnigramSampler.log_expected` has it. Differentiable; not looked at where an index is -1.
        labels: (N,) int64: rows of the batch with one label are no negatives of each other; -1 equals nothing.
        in_batch: the positives of other queries are negatives too.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        pairs: with k, which rows of the corpus may be mined for a query; all rules but `fill`. A query's own document
            is a row like any other: leave it out by ``exclude`` or by ``differ=(ids, ids of the corpus)``, and what is
            too similar to be a negative by ``below``.
        col_bias: (N,), added to the logits of each positive, for its own query and for others; differentiable. Where
            positives are drawn, as batches are, logQ is minus the logarithm of how often each is.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, also those of the corpus: O((N + M) D), and as much memory again.
            False where they have it already, which is cheaper for a corpus that does not change.
        memory_budget: bytes kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. A row without
        any negative has loss 0 and gradient 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce` and `similarity_topk`.

    Note:
        Work 2 N M D to mine, 6 N^2 D for the batch (8 with ``reduction="none"``) and O(N k D) for the rest. Memory
        O(N (D + k)), and a gradient of (M, D) where the corpus needs one. A corpus row whose similarity is NaN is never
        mined. 16-bit inputs are mined as they are; the batch is swept in float32, because the gradients of the positive
        and of the mined rows cancel in part.

    Source:
        Xiong et al., Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval, 2021;
        Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, 2020, for hard and in-batch
        negatives in one softmax. Bengio and Senécal, Quick Training of Probabilistic Neural Nets by Importance
        Sampling, 2003, and Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations,
        2019, for what is subtracted.

    Examples:
        >>> query, positive, corpus = torch.randn(4, 16), torch.randn(4, 16), torch.randn(100, 16)
        >>> own = torch.tensor([3, 14, 15, 92])                                     # the row of each query's document
        >>> mined_info_nce(query, positive, corpus, 10, pairs=Pairs(exclude=(torch.arange(5), own))).shape
        torch.Size([])
        >>> lists = torch.tensor([[1, 2], [3, -1], [4, 5], [-1, -1]])               # mined before
        >>> options = {"in_batch": False, "reduction": "none"}
        >>> (mined_info_nce(query, positive, corpus, indices=lists, **options) > 0).tolist()
        [True, True, True, False]
    """
    name = "mined_info_nce"
    query, positive, factor = _arguments.two_sides(
        name,
        (("query", query), ("positive", positive)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
        anchors=1 if in_batch else 2,
    )
    (corpus,) = autocast.cast(corpus)
    checks.check_matrices(name, "query", query, "corpus", corpus)
    # Rows that one loss lists many times are normalised in the accumulation dtype, not in each list.
    if _arguments.in_sweep(normalize, query):
        with autocast.disabled(query):
            query, positive, corpus = (wide(each, True) for each in (query, positive, corpus))
    elif normalize:
        corpus = unit_rows(corpus)
    indices = None if indices is None else checks.as_index(name, "indices", indices)
    indices = _arguments.of_weighted(weight, indices, NONE)
    _check_choice_of_rows(name, k, indices, pairs, labels, in_batch, query, corpus)
    log_expected = _arguments.of_weighted(weight, log_expected)
    _check_expected(name, log_expected, indices, query, corpus)
    check_filters(name, None, col_bias, positive.shape[0], "query", query)
    scale = checks.scale_tensor(name, factor, "query", query)
    with autocast.disabled(query):
        if indices is None:
            with torch.no_grad():
                problem = Problem.of((name, "query", "corpus"), query, corpus)
                length = checks.integer(name, "k", k, 1)
                indices = select(problem, length, scale=scale, pairs=pairs, backend=backend).top.indices
        else:
            indices = torch.where(first_of_each(indices), indices, NONE)
        # The gradients of the positive, the batch and the mined rows meet in float32, before they are rounded.
        dtype = checks.accumulator(query.dtype)
        query, positive = query.to(dtype), positive.to(dtype)
        log_weight = None if pairs is None else pairs.log_weight
        problem = Problem((name, "query", "corpus"), query, corpus)
        logits = listed_logits(problem, indices, scale, log_weight, backend)
        if log_expected is not None:
            logits = less_expected(logits, log_expected, indices)
        mined = lse_of_rows(logits)
        col_bias = None if col_bias is None else col_bias.to(dtype)
        if not in_batch:
            own = scaled(scale, partner_similarity(query, positive))
            if col_bias is not None:
                own = own + _arguments.of_weighted(weight, col_bias)
            return _arguments.reduce_rows(softplus(mined - own), weight, reduction)
        rules = None if labels is None else Pairs(differ=(labels, labels))
        names = (name, "query", "positive")
        sweep = Sweep(names, scale, rules, col_bias, memory_budget=memory_budget, backend=backend)
        return row_softmax(sweep, query, positive, target=None, extra=mined, weight=weight, reduction=reduction)


def _check_choice_of_rows(
    function: str,
    k: object,
    indices: Tensor | None,
    pairs: object,
    labels: Tensor | None,
    in_batch: bool,
    query: Tensor,
    corpus: Tensor,
) -> None:
    """Check what says which rows are negatives; `select` checks k and the rules."""
    check_pairs(function, pairs)
    if (k is None) == (indices is None):
        both = "not both be given" if indices is not None else "not both be None"
        raise ValueError(f"{function}: k and indices must {both}: k mines, indices were mined before")
    if labels is not None:
        if not in_batch:
            raise ValueError(
                f"{function}: labels must be None where in_batch is False, got labels of the batch\n"
                "  use pairs=Pairs(differ=(labels, labels of the corpus)) for the corpus"
            )
        checks.check_index(function, "labels", labels, query.shape[0], "query", query)
    if indices is None:
        return
    if pairs is not None:
        raise ValueError(
            f"{function}: pairs must be None where indices are given, got Pairs\n"
            "  rules decide what is mined; write -1 in place of a row that is no negative"
        )
    if indices.dim() != 2 or indices.shape[0] != query.shape[0]:
        raise ValueError(f"{function}: indices must have shape ({query.shape[0]}, P), got {checks.shape(indices)}")
    checks.check_device(function, "query", query, "indices", indices)
    checks.check_index_values(function, "indices", indices, corpus.shape[0], or_none=True)


def _check_expected(
    function: str, log_expected: Tensor | None, indices: Tensor | None, query: Tensor, corpus: Tensor
) -> None:
    """Check the numbers of what was drawn, which is given as indices."""
    if log_expected is None:
        return
    if indices is None:
        raise ValueError(f"{function}: log_expected must be None where k is given: mined rows are not drawn")
    check_expected(function, log_expected, indices, corpus.shape[0], "query", query)
