"""Recipes of tokens: rows over a vocabulary, tokens that meet where their words are equal, late interaction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..losses import info_nce, late_interaction, listwise_distillation, sparsity
from ..ops import TokenSets, maxsim, maxsim_pairs, stream_rows


def splade_head(
    hidden: Tensor, vocabulary: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *, pooling: str = "max"
) -> Tensor:
    """SPLADE's rows: how much each word of the vocabulary a text is about, without its (B, L, V) logits.

    Equivalent to::

        logits = hidden @ vocabulary.T + bias                                       # (B, L, V)
        words = torch.log1p(logits.relu()) * mask[:, :, None]
        words.amax(1)                                                               # pooling="sum": words.sum(1)

    Args:
        hidden: (B, L, D) hidden states.
        vocabulary: (V, D) the head's matrix, and bias (V,).
        mask: (B, L) bool, the tokens there are; None for all.
        pooling: "max", as in SPLADE v2, or "sum", as in the first paper.
        bias: (V,) the head's bias, or None.

    Returns:
        (B, V), never negative; 0 for a text without tokens.

    Source:
        Formal et al., SPLADE, 2021 (S056), and SPLADE v2, 2021, whose code was released.
    """
    checks.check_choice("splade_head", "pooling", pooling, ("max", "sum"))
    texts, each, _ = hidden.shape
    if pooling == "max":  # of the logits: what follows is monotone
        logits = maxsim(vocabulary[:, None], TokenSets(hidden, mask)).T
        return torch.log1p((logits if bias is None else logits + bias).relu())
    there = None if mask is None else mask.flatten()

    def words(logits: Tensor, rows: slice) -> Tensor:
        found = torch.log1p((logits if bias is None else logits + bias[rows, None]).relu())
        return (found if there is None else found * there).unflatten(1, (texts, each)).sum(2)

    return stream_rows(words, vocabulary, hidden.flatten(0, 1)).T


def splade(
    query: Tensor,
    document: Tensor,
    negative: Tensor | None = None,
    *,
    query_sparsity: float = 3e-4,
    document_sparsity: float = 1e-4,
) -> Tensor:
    """SPLADE: in-batch softmax over raw inner products of rows over the vocabulary, and a price for their words.

    Equivalent to::

        flops = lambda rows: rows.abs().mean(0).square().sum()
        s = torch.cat([query @ document.T, (query * negative).sum(1, keepdim=True)], 1)
        loss = F.cross_entropy(s, torch.arange(N))
        loss + query_sparsity * flops(query) + document_sparsity * (flops(document) + flops(negative)) / 2

    Args:
        query: (N, V) rows of `splade_head`; a negative is its own query's alone.
        document: as `query`.
        negative: as `query`.
        query_sparsity: of the configuration with max pooling; they grow with the square of the step
            until step 50,000.
        document_sparsity: as `query_sparsity`.

    Source:
        Formal et al., SPLADE, 2021 (S056); released code of v2. Without a negative the document's price is whole.
    """
    loss = info_nce(query, document, row_negatives=negative, temperature=1.0, normalize=False)
    of_documents = sparsity(document) if negative is None else (sparsity(document) + sparsity(negative)) / 2
    return loss + query_sparsity * sparsity(query) + document_sparsity * of_documents


def unicoil(
    query_ids: Tensor,
    query_weights: Tensor,
    document_ids: Tensor,
    document_weights: Tensor,
    *,
    vocabulary: int,
    group: int = 8,
) -> Tensor:
    """UniCOIL: InfoNCE over weights of the words that query and document share.

    Equivalent to::

        match = query_ids[:, None, :, None] == document_ids[None, :, None, :]
        s = (match * query_weights[:, None, :, None] * document_weights[None, :, None, :]).amax(3).sum(2)
        F.cross_entropy(s, group * torch.arange(N))

    Args:
        query_ids: (N, L) words and their weights.
        query_weights: as `query_ids`.
        document_ids: (N * group, L'); weights >= 0; the first of each group is the positive.
        document_weights: as `document_ids`.
        vocabulary: number of words. Memory: (N + N group) rows of this length.
        group: 8, with 7 negatives of BM25.

    Source:
        Lin and Ma, A Few Brief Notes on DeepImpact, COIL, and a Conceptual Framework, 2021 (S110); released code.
    """
    queries = query_weights.new_zeros(query_ids.shape[0], vocabulary).scatter_add(1, query_ids, query_weights)
    rows = document_weights.new_zeros(document_ids.shape[0], vocabulary)
    documents = rows.scatter_reduce(1, document_ids, document_weights, "amax")
    target = group * torch.arange(queries.shape[0], device=queries.device)
    return info_nce(queries, documents, target=target, temperature=1.0, normalize=False)


def coil_scores(query: Tensor, query_ids: Tensor, documents: Tensor, document_ids: Tensor) -> Tensor:
    """COIL: each query token with the best token of the same word in a document; 0 where there is none.

    Equivalent to::

        match = query_ids[:, None, :, None] == document_ids[None, :, None, :]
        (torch.einsum("nad,mbd->nmab", query, documents) * match).amax(3).sum(2)

    Args:
        query: (N, L, D) tokens.
        query_ids: (N, L) int64, their words; -1 for padding, which matches nothing.
        documents: (M, L', D) tokens.
        document_ids: (M, L') int64.

    Returns:
        (N, M) scores; the loss is `torch.nn.functional.cross_entropy` over them.

    Source:
        Gao et al., COIL, 2021, as in S110; released code. Memory of one chunk of N L rows of M L' scores.
    """
    texts, each = document_ids.shape
    words, columns = query_ids.flatten(), document_ids.flatten()

    def best(scores: Tensor, rows: slice) -> Tensor:
        match = (words[rows, None] == columns) & (columns != -1)
        return torch.where(match, scores, 0.0).unflatten(1, (texts, each)).amax(2)

    found: Tensor = stream_rows(best, query.flatten(0, 1), documents.flatten(0, 1))
    return found.unflatten(0, query_ids.shape).sum(1)


def rcmd(x: Tensor | TokenSets, y: Tensor | TokenSets, *, temperature: float = 0.05) -> Tensor:
    """CLRCMD: InfoNCE over relaxed transport between tokens, the mean of both sides' mean of maxima.

    Equivalent to::

        x, y = F.normalize(x, dim=2), F.normalize(y, dim=2)
        s = (maxsim(x, y, reduce="mean") + maxsim(y, x, reduce="mean").T) / 2
        F.cross_entropy(s / temperature, torch.arange(N))

    Args:
        x: (N, L, D) tokens or `TokenSets`.
        y: (M, L', D); the first N are the positives, the others hard negatives.
        temperature: divides the cosines.

    Source:
        Lee et al., Toward Interpretable Semantic Textual Similarity via Optimal Transport-based Contrastive Sentence
        Learning, 2022 (S071); released code.
    """
    return late_interaction(x, y, reduce="mean", symmetric=True, temperature=temperature)


def agrame(
    query: Tensor | TokenSets,
    passages: Tensor | TokenSets,
    teacher_scores: Tensor,
    sentence_query: Tensor | TokenSets,
    sentences: TokenSets,
    sentence_teacher_scores: Tensor,
) -> Tensor:
    """AGRaME: divergences of MaxSim lists of passages, and of the sentences of each passage.

    Equivalent to::

        p, t = maxsim_pairs(query, passages), teacher_scores.softmax(1)                             # (N, K)
        r, u = maxsim_pairs(sentence_query, sentences), sentence_teacher_scores.softmax(2)          # (N, K, R)
        kl = (u * (u.log() - r.log_softmax(2))).sum(2)
        ((t * (t.log() - p.log_softmax(1))).sum(1) + (t * kl).sum(1)).mean()

    Args:
        query: (N, L, D) tokens of both encodings of the queries.
        sentence_query: as `query`.
        passages: (N, K, L', D).
        teacher_scores: (N, K) of a cross-encoder.
        sentences: `TokenSets` of N K R sets of tokens, those of each passage one after another.
        sentence_teacher_scores: (N, K, R).

    Source:
        Reddy et al., AGRaME, 2024 (S035); formula of the paper, no temperature.
    """
    rows, lists, each = sentence_teacher_scores.shape
    everything = torch.arange(rows * lists * each, device=teacher_scores.device)
    scores = maxsim_pairs(sentence_query, sentences, (everything // (lists * each), everything)).view(-1, each)
    of_lists = listwise_distillation(scores, sentence_teacher_scores.flatten(0, 1), reduction="none")
    weighted = (teacher_scores.softmax(1) * of_lists.view(rows, lists)).sum(1).mean()
    return listwise_distillation(maxsim_pairs(query, passages), teacher_scores) + weighted
