"""Negatives that differ: candidates are skipped that resemble a positive or a negative that was taken before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.problem import Problem
from ..ops.similarity_topk import logits_at, metric_rows
from ._positives import CHUNK_ELEMENTS, Positives
from .corpus import Corpus


@dataclass(frozen=True)
class Distinct:
    """Takes candidates one after another where they are not too similar to what came before.

    Args:
        function: the function to name in errors.
        corpus: where the rows of candidates are.
        metric: as in `similarity_topk`.
        bound: the highest similarity that is allowed.
        backend: as in `similarity_topk`.
    """

    function: str
    corpus: Corpus
    metric: str
    bound: float
    backend: str

    def take(self, candidates: Tensor, positives: Positives, rows: Tensor, count: int) -> Tensor:
        """(R, C) bool: the candidates that are taken, at most `count` in each row.

        Args:
            candidates: (R, C) int64 columns in the order in which they are taken, -1 for none.
            positives: those of all queries.
            rows: (R,) the query of each row.
            count: how many are wanted.
        """
        taken = torch.zeros_like(candidates, dtype=torch.bool)
        # Most rows find enough among their first candidates, and rows of the corpus are read for these only.
        width = max(32, 4 * count)
        for begin in range(0, candidates.shape[1], width):
            part = slice(begin, begin + width)
            open_rows = (taken.sum(1) < count) & (candidates[:, part] >= 0).any(1)
            for chunk in self._chunks(open_rows.nonzero().squeeze(1), rows, positives, width + count):
                references = self._references(candidates[chunk], taken[chunk], positives, rows[chunk])
                wanted = count - taken[chunk].sum(1)
                taken[chunk, part] = self._greedy(candidates[chunk, part], references, wanted)
        return taken

    def _chunks(self, which: Tensor, rows: Tensor, positives: Positives, width: int) -> Iterator[Tensor]:
        """Rows at a time, by the number of corpus rows that they need."""
        if not len(which):
            return
        cost = (positives.counts[rows[which]] + width).cumsum(0) * max(self.corpus.depth, 1)
        chunk = cost // CHUNK_ELEMENTS
        yield from which.split(chunk.unique_consecutive(return_counts=True)[1].tolist())

    def _references(
        self, candidates: Tensor, taken: Tensor, positives: Positives, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(row, column) of each positive of these queries and each negative that they have."""
        counts = positives.counts[rows]
        row = torch.repeat_interleave(counts)
        first = positives.indptr[rows] - (counts.cumsum(0) - counts)
        column = positives.column[torch.arange(len(row), device=row.device) + first[row]]
        negative_row, slot = taken.nonzero(as_tuple=True)
        return torch.cat([row, negative_row]), torch.cat([column, candidates[negative_row, slot]])

    def _greedy(self, candidates: Tensor, references: tuple[Tensor, Tensor], wanted: Tensor) -> Tensor:
        row, column = references
        listed = candidates >= 0
        columns, local = candidates[listed].unique(return_inverse=True)
        documents = self.corpus.take(columns)
        x, y = metric_rows(self.function, documents, documents, self.metric)
        place = torch.full_like(candidates, -1)
        place[listed] = local
        alive = listed.clone()
        # One query may have more positives than there is room for their rows.
        step = max(1, CHUNK_ELEMENTS // max(candidates.shape[1], self.corpus.depth, 1))
        for begin in range(0, len(row), step):
            part = slice(begin, begin + step)
            columns, reference = column[part].unique(return_inverse=True)
            rows = metric_rows(self.function, self.corpus.take(columns), documents[:0], self.metric)[0]
            close = self._close(rows[reference], y, place[row[part]])
            alive &= ~(torch.zeros_like(place).index_add_(0, row[part], close.long()) > 0)
        taken = torch.zeros_like(alive)
        while True:
            left = alive.any(1) & (taken.sum(1) < wanted)
            if not bool(left.any()):
                return taken
            at = left.nonzero().squeeze(1)
            # The first one that is alive.
            slot = alive[at].to(torch.int8).argmax(1)
            taken[at, slot] = True
            alive[at, slot] = False
            alive[at] &= ~self._close(x[place[at, slot]], y, place[at].masked_fill(~alive[at], -1))

    def _close(self, x: Tensor, y: Tensor, listed: Tensor) -> Tensor:
        problem = Problem((self.function, "corpus", "corpus"), x, y)
        similarity = logits_at(problem, listed, metric=self.metric, backend=self.backend)
        return similarity > self.bound
