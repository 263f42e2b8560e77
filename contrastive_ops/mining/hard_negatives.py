"""Hard negatives of queries: documents of a corpus that score high and are no positives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.lists import first_of_pairs
from ..core.records import changed
from ..core.results import pytree
from ..core.rules import Pairs
from ..ops.similarity_topk import METRICS, TopK
from ._collapse import collapse
from ._documents import checked_documents, whole_documents
from ._formats import Columns, Mined, Texts, columns
from ._miner import FUNCTION, Miner
from ._positives import Positives, aggregate, parse, score
from ._rules import NegativeRules, dropped_positives, selection
from ._sampling import Sampling, check_ids
from .corpus import Corpus, as_corpus, rows_in_block
from .streaming import Progress

if TYPE_CHECKING:
    from ..distributed._groups import Team


@pytree
@dataclass(frozen=True, eq=False)
class HardNegatives:
    """The negatives of every query.

    Attributes:
        indices: (N, n) int64 rows of the corpus, by descending score and then ascending row; -1 where there are fewer.
        scores: (N, n) their similarities, -inf where there are fewer; float32 (float64 for float64 inputs).
        counts: (N,) int64, how many there are.
        positives: (indptr (N + 1,), indices (P,)) int64: the positives of query i are
            ``indices[indptr[i]:indptr[i + 1]]``, in the order in which they were given, each once.
        positive_scores: (P,) the similarity of each positive to its query.
        statistics: (N,) int64 each, over the whole corpus: "eligible", the documents that are no positive and pass all
            rules; "positives"; "positive_rank", the documents that are no positive and score above it, by more than
            rounding (where there are several, above what `NegativeRules.positive_score` makes of them), -1 without a
            positive; and the documents that are no positive and that a rule drops, whatever the others say: "below"
            (margins, `max_score` and `Pairs.below` together), "above" (`min_score` and `Pairs.above`), "differ",
            "same", "guide".
    """

    indices: Tensor
    scores: Tensor
    counts: Tensor
    positives: tuple[Tensor, Tensor]
    positive_scores: Tensor
    statistics: dict[str, Tensor]

    def format(
        self,
        output_format: str = "triplet",
        queries: Texts | None = None,
        documents: Texts | None = None,
        *,
        output_scores: bool = False,
    ) -> Columns:
        """Columns for ``datasets.Dataset.from_dict``, in the formats of sentence-transformers.

        Lists are sets: a document that is listed twice for a query, as positive or as negative, is written once.

        - "triplet": anchor, positive, negative; a row for each positive and negative of a query.
        - "n-tuple": anchor, positive, negative_1, ..., negative_n; a row for each positive. Queries with fewer than n
          negatives are left out.
        - "labeled-pair": anchor, passage, label; a row for each positive (label 1) and each negative (0) of a query.
        - "labeled-list": anchor, passages, labels; a row for each positive, followed by all negatives. Queries without
          negatives are left out.

        Args:
            output_format: which.
            queries: N texts; anchors are numbers of queries without them.
            documents: texts of the corpus; the other columns are numbers of its rows without them.
            output_scores: add a column "scores" with the similarities of the row's passages; "labeled-pair" and
                "labeled-list" then have "score" and "scores" in place of the labels.

        Returns:
            dict of lists of equal length, in the order of queries.

        Raises:
            ValueError: an unknown format, texts that are too few.

        Examples:
            >>> mined = mine_hard_negatives(torch.eye(3), torch.eye(3), torch.arange(3), 2)
            >>> mined.format("n-tuple")
            {'anchor': [0, 1, 2], 'positive': [0, 1, 2], 'negative_1': [1, 0, 0], 'negative_2': [2, 2, 1]}
        """
        row, positive = torch.repeat_interleave(self.positives[0].diff()), self.positives[1]
        first = first_of_pairs(row, positive)
        negatives = collapse(TopK(self.scores, self.indices, self.counts))
        mined = Mined(
            negatives.indices,
            negatives.values,
            negatives.counts,
            row[first],
            positive[first],
            self.positive_scores[first],
        )
        return columns(mined, output_format, queries, documents, output_scores)


def mine_hard_negatives(
    query: Tensor,
    corpus: object,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    num_negatives: int = 3,
    *,
    rules: NegativeRules | None = None,
    sampling: Sampling | None = None,
    metric: str = "cosine",
    pairs: Pairs | None = None,
    documents: Tensor | None = None,
    block_rows: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
    backend: str = "auto",
    group: Any = None,
) -> HardNegatives:
    """Find documents that score high for a query and are no positives of it.

    Equivalent to, for each query, with its positives and the rules of `NegativeRules`::

        s = F.normalize(query, dim=0) @ F.normalize(corpus).T                        # (M,), for "cosine"
        p = s[positives].min()
        keep = (s <= p - absolute_margin) & (s <= p - p.abs() * relative_margin) & (s >= min_score) & (s <= max_score)
        keep[positives] = False
        ranked = s.masked_fill(~keep, -torch.inf).sort(descending=True, stable=True).indices[:keep.sum()]
        window = ranked[first:end]                                                   # rank_window
        draw(window, num_negatives)                                                  # Sampling

    The rules decide inside the selection: nothing is fetched in excess and filtered later, and a query has
    num_negatives negatives wherever there are so many in its window.

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        corpus: (M, D) of the same dtype, in memory or not: a tensor, a numpy array or memmap, a safetensors slice, or
            any object with a shape of two numbers and [a:b] slicing. Or a list of (first row, such rows), as files have
            them. Read once, and once more for each round in which near-duplicates used up the candidates of a query.
        positives: (N,) int64, or (N, P) with -1 for none, or (indptr (N + 1,), indices) with a list for each query.
            None: no query has any, and margins have nothing to refer to.
            They are no candidates, and margins refer to their scores. One that is listed twice counts once.
        num_negatives: n, negatives of a query. Where the rules, the window or the corpus leave fewer, the list of that
            query ends in -1, and `HardNegatives.counts` says how many there are.
        rules: margins, limits, ranks, near-duplicates; see `NegativeRules`.
        sampling: how negatives are drawn; see `Sampling`. Default: the best.
        metric: "cosine", "dot" or "sqeuclidean", as in `similarity_topk`.
        pairs: more rules, with columns numbered over the whole corpus; all but `log_weight` and `fill`.
        documents: (M,) int64, the document of each row where rows are chunks of documents; any int64 but -1. Negatives
            are then of different documents, each at the best of its chunks that pass the rules, and ranks are those of
            documents. No chunk of a positive's document is a candidate; margins refer to the chunks that are listed.
            Statistics count chunks.
        block_rows: rows of the corpus that are read at once; by default about 64 MiB.
        checkpoint: a file that the first pass writes every few seconds and when it ends, from which a call with the
            same arguments goes on, on any number of ranks; see `search`. Each rank writes its own: the same path, with
            ".1", ".2", ... behind it from the second rank on.
        progress: True shows a bar for each pass where tqdm is installed; or a function of (rows done, rows of the
            corpus) that is called after each block that this process has read.
        backend: "auto", "reference", "cpu", "triton" or "cuda". "hopper" of `similarity_topk` does not count, as the
            statistics here need it.
        group: search a corpus that is spread over the ranks of a ProcessGroup or a DeviceMesh of one dimension. Then
            `corpus` is what this rank has of it: one shard after another in the order of the ranks, or a list of (first
            row, rows) that says where each part belongs. All else is the same on all ranks, with rows numbered over
            the whole corpus: queries, positives, rules. None: no other process is asked.

    Returns:
        `HardNegatives`, on every rank those that one process finds in the whole corpus, to the bit. A document whose
        score is NaN is no negative. Where a positive's score is NaN, margins keep nothing.

    Raises:
        ValueError: shapes or values that do not fit; a positive that does not exist; a query without a positive where a
            margin or "simans" needs one.
        TypeError: dtypes that do not fit, a corpus of another kind.
        NotImplementedError: an explicit backend that cannot run these inputs.
        RuntimeError: another rank has ended, or does not take part before the group's timeout, in which each must have
            searched its part. What one rank raises, or has else than the others, is raised on every rank.

    Note:
        Between ranks travel the rows of positives and near-duplicates, and 24 N K bytes of lists for each rank.
        Memory: O(N K) for lists of K, the end of the rank window, and two blocks of the corpus with copies. Work:
        2 N M D, whatever the rules drop; statistics are counted in the same pass. `near_duplicate` adds O(N n K D), and
        reads the candidates' rows of the corpus again.
        Several teachers: rows beside each other add their scores, ``torch.cat([a * query, b * other_query], 1)`` with
        ``torch.cat([corpus, other_corpus], 1)`` and metric="dot"; ``pairs=Pairs(guide=Guide(other_query, other_corpus,
        below=...))`` is a bound by another's score.

    Source:
        Moreira et al., NV-Retriever: Improving Text Embedding Models with Effective Hard-Negative Mining, 2024, for the
        margins.

    Examples:
        >>> query, corpus = torch.randn(4, 16), torch.randn(200, 16)
        >>> rules = NegativeRules(relative_margin=0.05)
        >>> mined = mine_hard_negatives(query, corpus, torch.tensor([7, 50, 3, 9]), 5, rules=rules)
        >>> mined.indices.shape, list(mined.format("triplet"))
        (torch.Size([4, 5]), ['anchor', 'positive', 'negative'])
    """
    query = checks.from_array(FUNCTION, "query", query)
    checks.check_matrix(FUNCTION, "query", query)
    checks.check_choice(FUNCTION, "metric", metric, METRICS)
    num_negatives = checks.integer(FUNCTION, "num_negatives", num_negatives, 1)
    if block_rows is not None:
        block_rows = checks.integer(FUNCTION, "block_rows", block_rows, 1)
    rules = NegativeRules() if rules is None else rules
    sampling = Sampling() if sampling is None else sampling
    team = None
    if group is not None:
        from ..distributed._groups import find_team

        team = find_team(FUNCTION, group)
    with torch.no_grad(), autocast.disabled(query):
        query = query.detach()
        if positives is None:
            positives = torch.full((query.shape[0],), -1, device=query.device)
        view = _view(corpus, query, team)
        if team is not None:
            view.compare(query, positives, num_negatives, rules, sampling, metric, pairs, documents)
        documents = checked_documents(FUNCTION, documents, query, view.rows)
        listed = parse(FUNCTION, positives, query, view.rows)
        _check_positives(listed, rules, sampling)
        sampling = changed(sampling, ids=check_ids(FUNCTION, sampling, query, view.rows))
        scored = score(FUNCTION, query, view.take, listed, metric, backend)
        positive = aggregate(scored.values, listed, rules.positive_score)
        no_candidates = whole_documents(listed, documents)
        selected = selection(FUNCTION, rules, pairs, no_candidates, positive, view.rows)
        step = rows_in_block(query.shape[1], query.dtype) if block_rows is None else block_rows
        miner = Miner(
            query,
            view,
            listed,
            positive,
            rules,
            sampling,
            selected,
            num_negatives,
            metric,
            documents,
            step,
            checkpoint,
            progress,
            backend,
        )
        # What is a positive itself must not count as above it because two roundings of one score differ.
        slack = torch.zeros_like(positive).scatter_reduce(0, listed.row, scored.slack, "amax")
        threshold = (positive + slack).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        indices, values, counted = miner.run(threshold)
        every = scored if documents is None else score(FUNCTION, query, view.take, no_candidates, metric, backend)
        higher = every.values > threshold[no_candidates.row]
        like = query, query.new_empty((view.rows, 0))
        own = dropped_positives(FUNCTION, selected.kept, no_candidates, every, like, backend)
        statistics = {name: (each - own[name]).clamp_min(0) if name in own else each for name, each in counted.items()}
        rank = statistics.pop("higher") - torch.bincount(no_candidates.row[higher], minlength=len(positive))
        statistics["positives"] = listed.counts
        statistics["positive_rank"] = rank.masked_fill(positive.isnan(), -1)
    return HardNegatives(
        indices, values, (indices >= 0).sum(1), (listed.indptr, listed.column), scored.values, statistics
    )


def _view(corpus: object, query: Tensor, team: Team | None) -> Corpus:
    """The whole corpus, wherever its rows are."""
    if team is None and not isinstance(corpus, list):
        return as_corpus(FUNCTION, corpus, query)
    from ._ranks import PartedCorpus

    return PartedCorpus(FUNCTION, corpus, query, team)


def _check_positives(positives: Positives, rules: NegativeRules, sampling: Sampling) -> None:
    needed = "margins" if rules.needs_positive else "weights of simans" if sampling.strategy == "simans" else None
    missing = (positives.counts == 0).nonzero()
    if needed is not None and len(missing):
        raise ValueError(
            f"{FUNCTION}: positives must name at least one for each query where there are {needed}, got none for "
            f"query {int(missing[0])}"
        )
