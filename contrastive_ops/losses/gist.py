"""Softmax losses whose denominator joins several blocks of similarities: GTE and Qwen3, GISTEmbed."""

from __future__ import annotations

from torch import Tensor

from ..core import checks
from ..core.numerics import merge_lse, softplus
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows
from . import _arguments
from ._blocks import DIRECTIONS, Blocks
from ._columns import partner_similarity
from ._gte import gte_blocks, gte_losses, ids_of_samples, shared_negatives


def gte(
    query: Tensor,
    document: Tensor,
    negatives: Tensor | None = None,
    *,
    partition: str = "joint",
    directions: tuple[str, ...] = DIRECTIONS,
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """GTE's improved contrastive loss: queries and documents of both kinds are negatives in one softmax.

    Equivalent to::

        q, d, h = F.normalize(query), F.normalize(document), F.normalize(negatives.flatten(0, 1))
        eye, own = torch.eye(N, dtype=torch.bool), torch.eye(N, dtype=torch.bool).repeat_interleave(K, 1)
        blocks = {
            "query_to_doc": torch.cat([q @ d.T, q @ h.T], 1),
            "query_to_query": (q @ q.T).masked_fill(eye, -torch.inf),
            "doc_to_query": d @ q.T,
            "doc_to_doc": torch.cat([d @ d.T, d @ h.T], 1).masked_fill(torch.cat([eye, own], 1), -torch.inf),
        }
        logits = [blocks[name] / temperature for name in directions]
        positive = (q * d).sum(1) / temperature
        joint = torch.cat(logits, 1).logsumexp(1) - positive
        per_direction = sum(block.logsumexp(1) - positive for block in logits) / len(logits)

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        document: (N, D); row i is the positive of query i.
        negatives: (N, K, D), K documents of each query, or (H, D) of nobody. They are columns for every query, and
            for every document but those of the same query; no direction starts from them. Rows have no ids: one that is
            given twice counts twice.
        partition: "joint": all directions share one denominator. "per_direction": each has its own and their losses are
            averaged; for "query_to_doc" and "doc_to_query", as the other two hold no positive.
        directions: which blocks take part; "query_to_doc" must, because it holds the positive.
        false_negative_margin: drop pairs of row i whose similarity exceeds that of (q_i, d_i) by more than this, in
            every block; Qwen3 takes 0.1. None drops nothing.
        hardness: bonus of each negative's logit, ``hardness`` times its similarity, which is not differentiated: what
            is close counts more. Not with a temperature for each row.
        temperature: divides the similarities; float, 0-d or (N,) tensor, differentiable. Default 0.01.
        scale: 1 / temperature instead; not both.
        pairs: ``Pairs(differ=(ids, ids))`` with (N,) ids of samples, the one rule that holds in all blocks: those of
            one id are no negatives of each other. ``negatives`` have no ids. Positives always take part.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D).
        memory_budget: bytes of inner products kept for backward by each sweep; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative, and at least
        log 2 for a joint partition with "doc_to_query", where the formula counts the positive twice.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + N K) D) beside ``memory_budget``. Work: 16 N^2 D in one sweep with all directions, or all but
        "doc_to_query"; otherwise a sweep per matrix: 8 N^2 D between queries and documents, 4 N^2 D for each
        self-similarity. Hard negatives add 8 N^2 K D, twice that with "doc_to_doc". A similarity within rounding of the
        bound that ``false_negative_margin`` draws may fall on either side.

    Source:
        Li et al., Towards General Text Embeddings with Multi-stage Contrastive Learning, 2023; the mask: Zhang et al.,
        Qwen3 Embedding, 2025, with directions ("query_to_doc", "query_to_query", "doc_to_doc").

    Examples:
        >>> query, document = torch.randn(6, 16), torch.randn(6, 16)
        >>> gte(query, document, torch.randn(6, 2, 16), temperature=0.05).shape
        torch.Size([])
        >>> qwen3 = ("query_to_doc", "query_to_query", "doc_to_doc")
        >>> gte(query, document, directions=qwen3, false_negative_margin=0.1, reduction="none").shape
        torch.Size([6])
    """
    blocks, owners = gte_blocks(
        query,
        document,
        negatives,
        partition=partition,
        directions=directions,
        false_negative_margin=false_negative_margin,
        hardness=hardness,
        temperature=temperature,
        scale=scale,
        pairs=pairs,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )
    return _arguments.reduce_rows(gte_losses(blocks, owners, partition, directions), weight, reduction)


def gist(
    query: Tensor,
    key: Tensor,
    guide_query: Tensor,
    guide_key: Tensor,
    negatives: Tensor | None = None,
    guide_negatives: Tensor | None = None,
    *,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """GISTEmbed: a guide model says which in-batch negatives are too similar to be negatives.

    Equivalent to::

        q, k, n, gq, gk, gn = (F.normalize(t) for t in (query, key, negatives, guide_query, guide_key, guide_negatives))
        positive, own = (gq * gk).sum(1, keepdim=True), torch.eye(N, dtype=torch.bool)
        bound = positive - margin                           # "relative": positive - positive.abs() * margin
        logits = torch.cat([
            (q @ k.T).masked_fill((gq @ gk.T > bound) & ~own, -torch.inf),
            (q @ q.T).masked_fill((gq @ gq.T > bound) | own, -torch.inf),          # contrast_anchors
            (k @ k.T).masked_fill((gk @ gk.T > bound) | own, -torch.inf),          # contrast_positives
            (q @ n.T).masked_fill(gq @ gn.T > bound, -torch.inf),
        ], 1) / temperature
        F.cross_entropy(logits, torch.arange(N))

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (N, D); row i is the positive of query i.
        guide_query: (N, D') the guide's embeddings of the queries, in any floating dtype; not differentiated.
        guide_key: (N, D') the guide's embeddings of the keys.
        negatives: (H, D), more columns for every query. Rows have no ids: one that is given twice counts twice.
        guide_negatives: (H, D') the guide's embeddings of the negatives.
        margin_strategy: "absolute": drop pairs of row i whose guide similarity exceeds that of its positive less
            ``margin``; "relative": less the share ``margin`` of its size.
        margin: how much less; negative to drop fewer.
        contrast_anchors: queries are negatives of each other.
        contrast_positives: keys are negatives of each other.
        temperature: divides the similarities; float, 0-d or (N,) tensor, differentiable. Default 0.01.
        scale: 1 / temperature instead; not both.
        pairs: ``Pairs(differ=(ids, ids))`` with (N,) ids of samples, the one rule that holds in all blocks: those of
            one id are no negatives of each other. ``negatives`` have no ids. Positives always take part.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows, also the guide's, to length 1 first.
        memory_budget: bytes of inner products kept for backward by each sweep; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. A row whose
        negatives are all dropped has loss 0 and gradient 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + H)(D + D')) beside ``memory_budget``. Work: 16 N^2 D and 8 N^2 D' with both contrasts, 8 N H D and
        4 N H D' for the negatives. A row is never its own negative; sentence-transformers keeps
        it where the bound is 1 or more. A guide similarity within rounding of the bound (duplicates, with margin 0)
        may fall on either side: a small margin of either sign decides.

    Source:
        Solatorio, GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning, 2024.

    Examples:
        >>> query, key, guide_query, guide_key = torch.randn(4, 6, 16).unbind()
        >>> gist(query, key, guide_query, guide_key, margin_strategy="relative", margin=0.05).shape
        torch.Size([])
    """
    name = "gist"
    checks.check_choice(name, "margin_strategy", margin_strategy, ("absolute", "relative"))
    margin = checks.number(name, "margin", margin, "(-inf, inf)")
    query, key, scale = _arguments.two_sides(
        name,
        (("query", query), ("key", key)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.01,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
    )
    sides, given = {"q": query, "d": key}, {"q": ("query", guide_query), "d": ("key", guide_key)}
    if (negatives is None) != (guide_negatives is None):
        raise ValueError(f"{name}: negatives and guide_negatives must both be given, or neither")
    if negatives is not None and guide_negatives is not None:
        sides["h"], given["h"] = shared_negatives(name, query, negatives, normalize), ("negatives", guide_negatives)
    guides = {side: _guide(name, *given[side], sides[side], given["q"][1], normalize) for side in sides}
    positive = partner_similarity(guides["q"], guides["d"])
    blocks = Blocks(
        (name, "query", "key"),
        sides,
        checks.scale_tensor(name, scale, "query", query),
        bound=positive - (margin if margin_strategy == "absolute" else positive.abs() * margin),
        guides=guides,
        ids=ids_of_samples(name, pairs, query),
        unit=_arguments.in_sweep(normalize, query),
        memory_budget=memory_budget,
        backend=backend,
    )
    chosen = (True, contrast_anchors, False, contrast_positives)
    directions = tuple(each for each, wanted in zip(DIRECTIONS, chosen, strict=True) if wanted)
    of_query, of_key, positive = blocks.others(directions)
    return _arguments.reduce_rows(softplus(merge_lse(*of_query, *of_key) - positive), weight, reduction)


def _guide(function: str, name: str, guide: Tensor, like: Tensor, first: Tensor, normalize: bool) -> Tensor:
    """The guide's matrix of one side, detached, in the accumulation dtype of that side."""
    checks.check_matrices(function, "guide_query", first, f"guide_{name}", guide)
    checks.check_device(function, name, like, f"guide_{name}", guide)
    if guide.shape[0] != like.shape[0]:
        raise ValueError(
            f"{function}: guide_{name} must have as many rows as {name}, "
            f"got guide_{name} {checks.shape(guide)} and {name} {checks.shape(like)}"
        )
    guide = guide.detach().to(checks.accumulator(like.dtype))
    return unit_rows(guide) if normalize else guide
