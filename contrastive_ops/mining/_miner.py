"""A call of `mine_hard_negatives`: passes over the corpus, and what is drawn from the candidates that they find."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.rule_slices import rows_of
from ..ops.similarity_topk import TopK
from ._near_duplicates import Distinct
from ._positives import Positives
from ._rules import NegativeRules, Selection
from ._sampling import Sampling, keys, order_of
from .corpus import Corpus, read_ahead
from .state import TopKState
from .streaming import Checkpoint, Progress, reporter, sample

FUNCTION = "mine_hard_negatives"
# Entries of the lists of candidates that are worked on at once.
LIST_ELEMENTS = 1 << 22


class _State(TopKState):
    _function = FUNCTION


@dataclass(frozen=True, eq=False)
class Miner:
    """The arguments of a call, checked."""

    query: Tensor
    corpus: Corpus
    positives: Positives
    positive: Tensor
    rules: NegativeRules
    sampling: Sampling
    selected: Selection
    wanted: int
    metric: str
    documents: Tensor | None
    block_rows: int
    checkpoint: str | os.PathLike[str] | None
    progress: Progress
    backend: str

    def run(self, count_above: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the negatives, their scores, and numbers over all columns."""
        first, end = self.rules.window(self.corpus.rows if self.documents is None else len(self.documents.unique()))
        best, alone = self.sampling.strategy == "top", self.rules.near_duplicate is None
        grows = end is None and not alone and self.rules.rank_basis == "surviving"
        width = self.wanted if best else 10 * self.wanted
        if grows and best:
            width = 4 * self.wanted  # ranks do not matter: some to replace those that are skipped
        elif end is not None:
            # Where ranks are of survivors and all of these are taken, the rest of the window is of no interest.
            needed = best and alone and self.rules.rank_basis == "surviving"
            width = min(end - first, self.wanted) if needed else end - first
        rows = torch.arange(len(self.query), device=self.query.device)
        top, statistics = self._scan(None, first + width, count_above)
        indices, scores = self._choose(rows, top, first)
        full = first + width < self.corpus.rows
        rows = rows[(indices[:, -1] < 0) & (top.indices[:, -1] >= 0)] if grows and full else rows[:0]
        while len(rows):
            width *= 2
            left = []
            for part in rows.split(max(1, LIST_ELEMENTS // (first + width))):
                top, _ = self._scan(part, first + width, None)
                indices[part], scores[part] = self._choose(part, top, first)
                left.append(part[(indices[part, -1] < 0) & (top.indices[:, -1] >= 0)])
            rows = torch.cat(left) if first + width < self.corpus.rows else rows[:0]
        return indices, scores, statistics

    def _scan(self, rows: Tensor | None, k: int, count_above: Tensor | None) -> tuple[TopK, dict[str, Tensor]]:
        """The k best ranked columns of some or all queries, from a pass over the corpus."""
        ranked, kept = self.selected.ranked, self.selected.kept
        state = _State(
            self.query if rows is None else self.query[rows],
            max(1, min(k, self.corpus.rows)),
            metric=self.metric,
            pairs=ranked if rows is None else rows_of(ranked, rows, self.corpus.rows),
            documents=self.documents,
            rows=self.corpus.rows,
            count_above=count_above,
            count_pairs=None if count_above is None else kept,
            backend=self.backend,
        )
        file = None
        if rows is None and self.checkpoint is not None:
            known = sample(self.corpus)
            with self.corpus.reading():
                file = Checkpoint(FUNCTION, self.checkpoint, state, known, *self.corpus.place)
        seen = self.corpus.seen_by_all(state.covered)
        done = sum(end - begin for begin, end in seen)
        with self.corpus.reading(), contextlib.ExitStack() as stack:
            if file is not None:
                stack.callback(file.write)
            report = stack.enter_context(reporter(self.progress, done, self.corpus.rows, FUNCTION))
            blocks = stack.enter_context(contextlib.closing(read_ahead(self.corpus.unseen(seen, self.block_rows))))
            for begin, block in blocks:
                state.update(block, begin)
                done += len(block)
                if file is not None:
                    file.write_now_and_then()
                report(done, self.corpus.rows)
        self.corpus.complete(state)
        return state.finalize(), state.statistics

    def _choose(self, rows: Tensor, top: TopK, first: int) -> tuple[Tensor, Tensor]:
        """The negatives of some queries among their candidates, and their scores."""
        indices = torch.full((len(rows), self.wanted), -1, dtype=torch.int64, device=rows.device)
        scores = top.values.new_full(indices.shape, -torch.inf)
        step = max(1, LIST_ELEMENTS // max(top.values.shape[1], 1))
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            candidates, values = top.indices[part, first:], top.values[part, first:]
            taken = self._taken(rows[part], candidates, values)
            # Candidates come by score, and so do those of them that are taken.
            row, slot = taken.nonzero(as_tuple=True)
            place = (taken.cumsum(1) - 1)[row, slot]
            indices[begin + row, place] = candidates[row, slot]
            scores[begin + row, place] = values[row, slot]
        return indices, scores

    def _taken(self, rows: Tensor, candidates: Tensor, values: Tensor) -> Tensor:
        """True for the candidates that are taken."""
        valid = candidates >= 0
        if self.selected.upper is not None:
            valid &= values <= self.selected.upper[rows, None]
        if self.selected.lower is not None:
            valid &= values >= self.selected.lower
        ids = self.sampling.ids
        documents = candidates.clamp_min(0)
        documents = documents if ids is None or not len(ids[1]) else ids[1][documents]
        key = keys(self.sampling, values, self.positive[rows], rows if ids is None else ids[0][rows], documents)
        order = None if key is None else order_of(key, documents, valid)
        if order is not None:
            valid = valid.gather(1, order)
        if self.rules.near_duplicate is None:
            taken = valid & (valid.cumsum(1) <= self.wanted)
        else:
            ordered = candidates if order is None else candidates.gather(1, order)
            distinct = Distinct(FUNCTION, self.corpus, self.metric, self.rules.near_duplicate, self.backend)
            taken = distinct.take(ordered.masked_fill(~valid, -1), self.positives, rows, self.wanted)
        return taken if order is None else torch.zeros_like(taken).scatter(1, order, taken)
