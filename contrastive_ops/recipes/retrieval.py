"""Recipes of dense retrieval: losses, what is mined for them, and what is searched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import merge_lse, softplus
from ..core.records import changed
from ..losses import alignment, clip, info_nce, listwise_distillation, pairwise_rank_distillation
from ..losses._columns import wide
from ..losses._sweep import Sweep
from ..mining import NegativeRules, ratio_margin
from ..ops import Pairs, TopK, similarity_topk


def dpr(query: Tensor, passages: Tensor, *, group: int = 1, pairs: Pairs | None = None) -> Tensor:
    """DPR: a query must find its passage among those of all queries; raw inner products, temperature 1.

    Equivalent to::

        F.cross_entropy(query @ passages.T, group * torch.arange(N))

    Args:
        query: (N, D).
        passages: (N * group, D); the first of each group is the positive, the others hard negatives.
        pairs: which of them are negatives.
        group: passages of each query.

    Source:
        Karpukhin et al., Dense Passage Retrieval, 2020, as used by S041, S097, S109 and S113.
    """
    target = group * torch.arange(query.shape[0], device=query.device)
    return info_nce(query, passages, target=target, temperature=1.0, pairs=pairs, normalize=False)


def ance(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """ANCE: a query's passage against passages that an index found for it, without those of other queries.

    Equivalent to::

        s = torch.einsum("nd,nkd->nk", query, negatives) - (query * positive).sum(1, keepdim=True)
        s.exp().sum(1).log1p().mean()                       # one negative: log(1 + exp(s- - s+))

    Args:
        query: (N, D).
        positive: as `query`.
        negatives: (N, D) or (N, K, D), drawn from the best 200 that are not labelled:
            ``mine_hard_negatives(..., rules=NegativeRules(rank_window=(0, 200)), sampling=Sampling("uniform"))``.

    Source:
        Xiong et al., Approximate Nearest Neighbor Negative Contrastive Learning, 2021 (S088); released code.
    """
    return info_nce(query, positive, row_negatives=negatives, in_batch=False, temperature=1.0, normalize=False)


def contriever(query: Tensor, key: Tensor, queue: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Contriever: one's own key against a queue alone; raw inner products.

    Equivalent to::

        s = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.05
        F.cross_entropy(s, torch.zeros(N, dtype=torch.int64), label_smoothing=label_smoothing)

    Args:
        query: (N, D) two crops of the same texts; the key by the momentum encoder (0.9995).
        key: as `query`.
        queue: (K, D) keys of earlier batches, 131,072 in the paper; no gradient.
        label_smoothing: share of all columns.

    Source:
        Izacard et al., Unsupervised Dense Information Retrieval with Contrastive Learning, 2022 (S105); released code.
        Fine-tuning is ``info_nce(query, positives, negatives, temperature=0.05, normalize=False)``.
    """
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "normalize": False}
    return info_nce(query, key, queue.detach(), in_batch=False, temperature=0.05, **options)


def simlm(
    query: Tensor,
    passages: Tensor,
    teacher_scores: Tensor | None = None,
    *,
    contrast: float = 0.2,
    temperature: float = 0.02,
) -> Tensor:
    """SimLM: one denominator of all passages, other queries, and other queries and passages next to one's passage.

    Equivalent to::

        q, k = F.normalize(query), F.normalize(passages.flatten(0, 1))
        p, others = k[::K], lambda s: s.fill_diagonal_(-torch.inf)
        s = torch.cat([q @ k.T, others(p @ q.T), others(q @ q.T), others(p @ p.T)], 1) / temperature
        loss = F.cross_entropy(s, K * torch.arange(N))
        own = torch.einsum("nd,nkd->nk", q, k.view(N, K, D)) / temperature
        contrast * loss + F.kl_div(own.log_softmax(1), teacher_scores.softmax(1), reduction="batchmean")

    Args:
        query: (N, D).
        passages: (N, K, D); the first of each query is its positive, the others are hard negatives.
        teacher_scores: (N, K) of a cross-encoder; None for the first stage, which is the loss alone.
        contrast: weight of the loss next to the teacher's: 0.2.
        temperature: divides the cosines.

    Source:
        Wang et al., SimLM, 2023 (S047); released code (``full_contrastive_loss``). Two sweeps: queries and positives
        among themselves, and queries against hard negatives.
    """
    rows, scale = query.shape[0], 1 / temperature
    both = wide(torch.cat([query, passages[:, 0]]), True)
    partner = torch.arange(2 * rows, device=query.device).roll(rows)
    sweep = Sweep(("simlm", "query", "passages"), scale, Pairs(diagonal=0))
    among = sweep.fold(both, None, "logsumexp", target=partner)
    parts = list(among.rows[0].split(rows))
    if passages.shape[1] > 1:
        hard = wide(passages[:, 1:].flatten(0, 1), True)
        parts += changed(sweep, pairs=None).fold(both[:rows], hard, "logsumexp").rows
    loss = softplus(merge_lse(*parts) - among.target[:rows]).mean()
    if teacher_scores is None:
        return loss
    own = torch.einsum("nd,nkd->nk", both[:rows], wide(passages, True)) * scale
    return contrast * loss + listwise_distillation(own, teacher_scores)


def pair(query: Tensor, positive: Tensor, negative: Tensor, *, passage_weight: float = 0.1) -> Tensor:
    """PAIR: queries must find their passages, and passages their queries, among the same hard negatives.

    Equivalent to::

        of_queries = F.cross_entropy(query @ torch.cat([positive, negative]).T, torch.arange(N))
        of_passages = F.cross_entropy(positive @ torch.cat([query, negative]).T, torch.arange(N))
        (1 - passage_weight) * of_queries + passage_weight * of_passages

    Args:
        query: (N, D).
        positive: as `query`.
        negative: (K, D).
        passage_weight: 0.1; the second stage has 0.

    Source:
        Ren et al., PAIR, 2021 (S097); released code, whose denominators have all negatives.
    """
    options: dict[str, Any] = {"temperature": 1.0, "normalize": False}
    of_queries = info_nce(query, positive, negative, **options)
    return (1 - passage_weight) * of_queries + passage_weight * info_nce(positive, query, negative, **options)


def confit(
    resume: Tensor,
    job: Tensor,
    job_negatives: Tensor,
    resume_negatives: Tensor,
    *,
    weight: float = 0.5,
    temperature: float = 0.05,
) -> Tensor:
    """ConFit v2: resumes must find jobs and jobs resumes, each direction with hard negatives of its own.

    Equivalent to::

        of_resumes = info_nce(resume, job, job_negatives, temperature=temperature)
        weight * of_resumes + (1 - weight) * info_nce(job, resume, resume_negatives, temperature=temperature)

    Args:
        resume: (N, D).
        job: as `resume`.
        job_negatives: (K, D) and (K', D); mined with `runner_up_rules`.
        resume_negatives: as `job_negatives`.
        weight: of the first direction. Of 0.5 it is ``clip(resume, job, job_negatives, resume_negatives)``.
        temperature: divides the cosines.

    Source:
        Yu et al., ConFit v2, 2025 (S090); released code.
    """
    if weight == 0.5:
        return clip(resume, job, job_negatives, resume_negatives, temperature=temperature)
    of_resumes = info_nce(resume, job, job_negatives, temperature=temperature)
    return weight * of_resumes + (1 - weight) * info_nce(job, resume, resume_negatives, temperature=temperature)


def runner_up_rules(low: float = 0.03, high: float = 0.04) -> NegativeRules:
    """ConFit v2's runner-ups: what ranks between two shares of a corpus; for `mining.mine_hard_negatives`.

    Args:
        low: shares; the best 3 to 4 % in the paper.
        high: as `low`.

    Source:
        Yu et al., ConFit v2, 2025 (S090). Ranks here are of what is not labelled; the released code counts positives.
    """
    return NegativeRules(rank_window=(low, high), rank_basis="raw")


def clp(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    queries_of_negatives: Tensor,
    *,
    penalty: float = 0.1,
    temperature: float = 0.02,
) -> Tensor:
    """CLP: contrast within one's own group, and a pull of negatives to queries that they would answer.

    Equivalent to::

        s = torch.cat([F.cosine_similarity(query, positive)[:, None],
                       F.cosine_similarity(query[:, None], negatives, dim=2)], 1) / temperature
        distance = 1 - F.cosine_similarity(queries_of_negatives, negatives, dim=2)
        (1 - penalty) * F.cross_entropy(s, zeros) + penalty * distance.mean()

    Args:
        query: (N, D).
        positive: as `query`.
        negatives: (N, K, D); K = 4 in the paper.
        queries_of_negatives: as `negatives`.
        penalty: share of the pull.
        temperature: divides the cosines.

    Source:
        Yu, Efficient fine-tuning methodology of text embedding models, 2024 (S069); released code, as the formula of
        its page is ambiguous.
    """
    loss = info_nce(query, positive, row_negatives=negatives, in_batch=False, temperature=temperature)
    pull = alignment(queries_of_negatives.flatten(0, 1), negatives.flatten(0, 1)) / 2
    return (1 - penalty) * loss + penalty * pull


def mnr_plus(x: Tensor, y: Tensor) -> Tensor:
    """MNR+: the target of a row is what resembles it most in both modalities, which may be another row.

    Equivalent to::

        t = ((x @ x.T + y @ y.T) / 2).softmax(1)
        s = x @ y.T
        (F.cross_entropy(s, t.argmax(1)) + F.cross_entropy(s.T, t.argmax(0))) / 2

    Args:
        x: (N, D), compared as they are.
        y: as `x`.

    Source:
        Hallee et al., Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings, 2024 (S033);
        released code, temperature 1.
    """
    both = torch.cat([x, y], 1).detach()
    of_rows = similarity_topk(both, both, 1, scale=0.5).indices[:, 0]
    bias = -Sweep(("mnr_plus", "x", "y"), 0.5).fold(both, None, "logsumexp").rows[0]
    of_cols = similarity_topk(both, both, 1, scale=0.5, col_bias=bias).indices[:, 0]
    options: dict[str, Any] = {"temperature": 1.0, "normalize": False}
    return (info_nce(x, y, target=of_rows, **options) + info_nce(y, x, target=of_cols, **options)) / 2


def positive_aware_rules(kind: str = "percent", value: float | None = None) -> NegativeRules:
    """NV-Retriever's rules against false negatives, for `mining.mine_hard_negatives`.

    Equivalent to::

        keep = score <= (1 - value) * positive_score        # "percent", 0.05: TopK-PercPos
        keep = score <= positive_score - value              # "margin", 0.05: TopK-MarginPos
        keep = score <= value                               # "absolute", 0.7: TopK-Abs

    Source:
        Moreira et al., NV-Retriever, 2024 (S066); its bounds are strict, and "percent" lifts the bound of a negative
        positive score, where here it is lowered by the share of its size.
    """
    checks.check_choice("positive_aware_rules", "kind", kind, ("percent", "margin", "absolute"))
    if kind == "absolute":
        return NegativeRules(max_score=0.7 if value is None else value)
    share = 0.05 if value is None else value
    return NegativeRules(relative_margin=share) if kind == "percent" else NegativeRules(absolute_margin=share)


def hyde_query(query: Tensor, documents: Tensor) -> Tensor:
    """HyDE: the query to search with, the mean of it and of documents that a model wrote for it.

    Equivalent to::

        (query + documents.sum(1)) / (1 + K)

    Args:
        query: (N, D).
        documents: (N, K, D) embeddings of hypothetical documents; K = 8 in the reference setup.

    Source:
        Gao et al., Precise Zero-Shot Dense Retrieval without Relevance Labels, 2023 (S079); released code.
    """
    return torch.cat([query[:, None], documents], 1).mean(1)


def bitext_margin(x: Tensor, y: Tensor, k: int = 4) -> TopK:
    """Ratio margin of translations: cosines over the mean of both sides' nearest neighbours, best first.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(y).T
        ratio = s / ((s.topk(k, 1).values.mean(1)[:, None] + s.topk(k, 0).values.mean(0)) / 2)
        ratio.gather(1, s.topk(k, 1).indices).sort(1, descending=True)

    Args:
        x: (N, D) and (M, D) sentences of two languages; no gradients.
        y: as `x`.
        k: neighbours; at most min(N, M).

    Source:
        Artetxe and Schwenk, Margin-based Parallel Corpus Mining, 2019, the evaluation of S059.
    """
    checks.check_matrices("bitext_margin", "x", x, "y", y)
    k = checks.integer("bitext_margin", "k", k, 1, min(x.shape[0], y.shape[0]))
    return ratio_margin(x, y, k, neighbors=k)


def gaussian_features(mean: Tensor, variance: Tensor, *, document: bool = False) -> Tensor:
    """MRL: features whose inner product is minus the divergence of two Gaussians, up to a number of each query.

    Equivalent to::

        v = F.softplus(variance)
        torch.cat([ones, v + mean**2, mean], -1)                                                    # query
        torch.cat([-(v.log() + mean**2 / v).sum(-1, keepdim=True), -1 / v, 2 * mean / v], -1) / 2   # document

    Args:
        mean: (..., K); the variance before its softplus.
        variance: as `mean`.
        document: which side.

    Source:
        Zamani and Bendersky, Multivariate Representation Learning for Information Retrieval, 2023 (S074). Features of
        small variances are large: keep them in float32.
    """
    v = softplus(variance)
    if not document:
        return torch.cat([torch.ones_like(mean[..., :1]), v + mean.square(), mean], -1)
    first = -(v.log() + mean.square() / v).sum(-1, keepdim=True)
    return torch.cat([first, -1 / v, 2 * mean / v], -1) / 2


def mrl(query: Tensor, documents: Tensor, teacher_scores: Tensor) -> Tensor:
    """MRL: logistic loss of the pairs of a list that a teacher orders, weighted by the ranks it gives them.

    Equivalent to::

        s, rank = torch.einsum("nf,nkf->nk", query, documents), ranks of teacher_scores from 1
        weight = (teacher_i > teacher_j) * abs(1 / rank_i - 1 / rank_j)
        (weight * F.softplus(s_j - s_i)).sum((1, 2)).mean()

    Args:
        query: (N, F) and documents: (N, K, F): `gaussian_features` of both sides.
        teacher_scores: (N, K).
        documents: (N, K, F) features of the documents.

    Source:
        Zamani and Bendersky, 2023 (S074); the pairs of CL-DRD.
    """
    scores = torch.einsum("nf,nkf->nk", query, documents)
    return pairwise_rank_distillation(scores, teacher_scores, pair_weight="reciprocal_rank", pair_reduction="sum")
