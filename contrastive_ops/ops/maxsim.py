"""Late interaction: every query token and the document token that is most similar to it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..core import checks, extension, triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend, choose, enrol, unsupported_by_cpu
from ..core.declarations import Declaration, Named, Shapes, declare
from ..core.operators import call
from ..reference import maxsim as reference
from .token_sets import Packed, TokenSets, check_two_sides, packed

# One hop to every implementation; each offers forward and backward with the same arguments.
BACKENDS = enrol(
    "maxsim",
    {
        "reference": Backend(
            source="contrastive_ops/reference/maxsim.py",
            functions=lambda: reference,
            unsupported=lambda x: [],
        ),
        "cpu": Backend(
            source="csrc/cpu/maxsim.cpp",
            functions=functools.cache(lambda: extension.functions("maxsim")),
            unsupported=unsupported_by_cpu,
        ),
        "triton": Backend(
            source="kernels/maxsim.py",
            functions=functools.cache(lambda: triton_kernels.functions("maxsim")),
            unsupported=triton_kernels.unsupported,
            by_name=NEVER_ON_A_DEVICE,
        ),
    },
)


def _shapes(given: Named) -> Shapes:
    sets, others = given["query_offsets"].shape[0] - 1, given["document_offsets"].shape[0] - 1
    pairs = None if given["pair_queries"] is None else given["pair_queries"].shape[0]
    groups, tokens = (others, given["queries"].shape[0]) if pairs is None else (pairs, given["longest_query"])
    return (sets, others) if pairs is None else (pairs,), (groups if given["keep"] else 0, tokens, given["k"])


# Which document tokens are the best is not differentiated; backward is the derivative of their inner products.
declare(
    Declaration(
        "maxsim",
        takes="Tensor queries, Tensor documents, Tensor query_offsets, Tensor document_offsets, Tensor? query_mask,"
        " Tensor? document_mask, Tensor? pair_queries, Tensor? pair_documents, SymInt longest_query, SymInt k,"
        " bool keep",
        differentiable=2,
        returns="Tensor scores, Tensor winners",
        reads="queries documents query_offsets document_offsets pair_queries pair_documents winners d_scores",
        shapes=_shapes,
        dtypes={"winners": torch.int32},
        reference=reference,
    ),
    BACKENDS,
)

REDUCTIONS = ("sum", "mean")


def maxsim(
    queries: Tensor | TokenSets,
    documents: Tensor | TokenSets,
    *,
    k: int = 1,
    reduce: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """Score every query with every document by late interaction (ColBERT's MaxSim), without token-by-token matrices.

    Equivalent to::

        similarity = torch.einsum("nad,mbd->nmab", queries.tokens, documents.tokens)      # in float32
        similarity = similarity.masked_fill(~documents.mask[None, :, None], -torch.inf)
        best = similarity.amax(3)                              # or similarity.topk(k, dim=3).values.sum(3)
        scores = best.masked_fill(~queries.mask[:, None], 0.0).sum(2)                     # (N, M)

    Args:
        queries: (N, L, D) tokens, or `TokenSets`: padded with a mask, or packed with offsets. float32, bfloat16,
            float16 or float64. Tokens are compared by their inner products: scale them to length 1 for cosines.
        documents: (M, L', D) or `TokenSets` of the same dtype, in either layout.
        k: sum over the k best document tokens of each query token; over all of them in a document of fewer.
        reduce: over the tokens of a query: "sum", or "mean" over those that take part. A symmetric score is the mean of
            ``maxsim(x, y, reduce="mean")`` and ``maxsim(y, x, reduce="mean").T``.
        backend: "auto", "reference", "cpu" or "triton", which "auto" does not take. An explicit backend runs or raises.

    Returns:
        (N, M) in float32 (float64 for float64 inputs). A document without tokens (no length, or all masked) has score
        -inf and gradient 0 with every query; a query without tokens has score 0 with every document.

    Raises:
        ValueError: shapes, devices, offsets, k or reduce that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Differentiable in both, twice; which token is the best one is not differentiated. Of equal products the token
        that comes first wins, and NaN wins against numbers. Masked tokens win nowhere; PyLate multiplies their
        similarities by 0, which wins where all others are negative.

        Backward reads which tokens won, 4 N L M k bytes, and computes no inner product again: 4 N L M k D operations
        after the 2 N L M L' D of the forward pass. Nothing else of that size is stored, and without gradients not even
        that. Masked tokens and padding cost nothing. The same bits in every run, for any number of threads, in any
        batch and in either layout.

    Source:
        Khattab and Zaharia, ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over
        BERT, 2020. The mean: Lee et al., Toward Interpretable Semantic Textual Similarity via Optimal Transport-based
        Contrastive Sentence Learning, 2022.

    Examples:
        >>> from contrastive_ops.ops import TokenSets, maxsim
        >>> queries, documents = torch.randn(2, 4, 8), torch.randn(3, 9, 8)
        >>> mask = torch.arange(9) < torch.tensor([[9], [5], [0]])
        >>> scores = maxsim(queries, TokenSets(documents, mask))
        >>> best = (queries[0] @ documents[1, :5].T).amax(1)
        >>> torch.allclose(scores[0, 1], best.sum(), atol=1e-5), scores[:, 2].tolist()
        (True, [-inf, -inf])
    """
    name = "maxsim"
    q, d = packed(name, "queries", queries), packed(name, "documents", documents)
    _check(name, q, d, k, reduce)
    return scores_of(name, q, d, k=k, reduce=reduce, backend=backend)


def maxsim_pairs(
    queries: Tensor | TokenSets,
    documents: Tensor | TokenSets,
    pairs: tuple[Tensor, Tensor] | None = None,
    *,
    k: int = 1,
    reduce: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """`maxsim` of given pairs of a query and a document: one document each, a list of each query, or any pairs.

    Equivalent to::

        maxsim(queries, documents)[pairs]                      # without the other scores

    Args:
        queries: as in `maxsim`.
        documents: as in `maxsim`; or (N, K, L', D), padded lists of K documents of each query.
        pairs: numbers of queries and of documents, (P,) int64 each. In any order, and any of them more than once;
            pairs of one query in succession share some work. None: query i and document i, or query i and its list.
        k: as in `maxsim`.
        reduce: as in `maxsim`.
        backend: as in `maxsim`.

    Returns:
        (P,) for `pairs`; else (N,), or (N, K) for lists. What is said of `maxsim` is true here.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maxsim`. Packed queries cannot be traced by `torch.compile`.

    Note:
        Backward reads 4 P L k bytes, where L is the length of the longest query.

    Examples:
        >>> from contrastive_ops.ops import maxsim, maxsim_pairs
        >>> queries, candidates = torch.randn(2, 4, 8), torch.randn(2, 5, 9, 8)
        >>> maxsim_pairs(queries, candidates).shape
        torch.Size([2, 5])
        >>> documents, pairs = torch.randn(3, 9, 8), (torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]))
        >>> torch.equal(maxsim_pairs(queries, documents, pairs), maxsim(queries, documents)[pairs])
        True
    """
    name = "maxsim_pairs"
    q, d = packed(name, "queries", queries), packed(name, "documents", documents, lists=True)
    _check(name, q, d, k, reduce)
    numbers = own_pairs(name, q, d) if pairs is None else _checked_pairs(name, q, d, pairs)
    scores = pair_scores(name, q, d, numbers, k=k, reduce=reduce, backend=backend)
    return scores if pairs is not None else scores.view(d.shape)


# ---- For losses, whose sets are packed already -----------------------------------------------------------------------


def scores_of(function: str, q: Packed, d: Packed, *, k: int = 1, reduce: str = "sum", backend: str = "auto") -> Tensor:
    """`maxsim`: (N, M)."""
    scores = _scores(function, q, d, None, k, backend)
    return scores if reduce == "sum" else scores / q.counts().clamp_min(1)[:, None]


def pair_scores(
    function: str,
    q: Packed,
    d: Packed,
    pairs: tuple[Tensor, Tensor],
    *,
    k: int = 1,
    reduce: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """`maxsim_pairs`: (P,)."""
    scores = _scores(function, q, d, pairs, k, backend)
    return scores if reduce == "sum" else scores / q.counts().clamp_min(1)[pairs[0]]


def own_pairs(function: str, q: Packed, d: Packed, name: str = "documents") -> tuple[Tensor, Tensor]:
    """The pairs of each query and its own document, or its own list of documents."""
    if d.shape[0] != q.shape[0]:
        raise ValueError(
            f"{function}: {name} must be as many as queries, one or one list each, got {d.shape[0]} and {q.shape[0]}"
        )
    query = torch.arange(q.shape[0], device=q.tokens.device)
    lists = query if len(d.shape) == 1 else query[:, None].expand(d.shape).reshape(-1)
    return lists, torch.arange(d.offsets.shape[0] - 1, device=d.tokens.device)


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _checked_pairs(function: str, q: Packed, d: Packed, pairs: object) -> tuple[Tensor, Tensor]:
    if len(d.shape) != 1:
        raise ValueError(f"{function}: documents must have shape (B, L, D) where pairs are given, got lists")
    if not isinstance(pairs, tuple) or len(pairs) != 2:
        raise TypeError(f"{function}: pairs must be a tuple of 2 tensors, got {type(pairs).__name__}")
    size, found = None, []
    for side, index, sets in (("queries", pairs[0], q), ("documents", pairs[1], d)):
        index = checks.check_index(function, f"pairs of the {side}", index, size, side, sets.tokens)
        checks.check_index_values(function, f"pairs of the {side}", index, sets.shape[0])
        size = index.shape[0]
        found.append(index)
    return found[0], found[1]


def _check(function: str, q: Packed, d: Packed, k: int, reduce: str) -> None:
    check_two_sides(function, q, d)
    k = checks.integer(function, "k", k, 1)
    checks.check_choice(function, "reduce", reduce, REDUCTIONS)


def _scores(function: str, q: Packed, d: Packed, pairs: tuple[Tensor, Tensor] | None, k: int, backend: str) -> Tensor:
    """Sums over query tokens; winners are kept where there will be a backward pass."""
    of_queries, of_documents = pairs or (None, None)
    scores, _ = call.maxsim_forward(
        q.tokens,
        d.tokens,
        q.offsets,
        d.offsets,
        q.mask,
        d.mask,
        of_queries,
        of_documents,
        0 if pairs is None else q.longest(function),
        k,
        torch.is_grad_enabled() and (q.tokens.requires_grad or d.tokens.requires_grad),
        choose(function, BACKENDS, q.tokens, backend),
    )
    return scores
