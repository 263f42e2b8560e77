"""The blocks of similarities that losses with a joint partition fold.

Row i compares its positive pair (q_i, d_i) with four blocks of pairs:

    query_to_doc    q_i with the other documents        doc_to_query    d_i with the other queries
    query_to_query  q_i with the other queries          doc_to_doc      d_i with the other documents

Both blocks of one kind are halves of self-similarity matrices. Together with the rectangle between them they are the
self-similarity matrix of all queries and documents, which is why one sweep of 4 N^2 D folds them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.folds import Fold, Folded
from ..core.problem import Problem
from ..core.records import changed
from ..core.rules import Guide, Pairs
from ..ops.similarity_reduce import fold
from ._hardness import Hardness

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@dataclass(frozen=True, eq=False)
class Blocks:
    """Queries (q), documents (d) and hard negatives (h), and what all blocks of their similarities share.

    Attributes:
        names: the loss, its queries and its documents, for errors.
        sides: the matrices of q, d and perhaps h.
        scale: 0-d, or (N,) with one of each row.
        bound: (N,) similarity, or guide similarity, above which a pair of row i is dropped.
        guides: the guide's matrices of the same sides.
        ids: (row ids, column ids) of samples: pairs of equal ids are dropped in every block; -1 equals nothing.
        unit: rows of the sides count as if they had length 1.
        memory_budget: as in `similarity_reduce`.
        backend: as in `similarity_reduce`.
        hardness: of the negatives, or None.
        sweep: what folds a block: `fold`, or a sweep of the rows of many processes.
    """

    names: tuple[str, str, str]
    sides: dict[str, Tensor]
    scale: Tensor
    bound: Tensor | None
    guides: dict[str, Tensor] | None
    ids: tuple[Tensor, Tensor] | None
    unit: bool
    memory_budget: int | None
    backend: str
    hardness: Hardness | None = None
    sweep: Callable[..., Folded] = fold

    def others(
        self, directions: tuple[str, ...], owners: tuple[Tensor, Tensor] | None = None, hard_of_documents: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return the lse of each block without the positive: those of the queries, those of the documents, its logit.

        Args:
            directions: which blocks.
            owners: the query of each document and of each hard negative, which do not meet each other.
            hard_of_documents: documents meet hard negatives too.
        """
        between_queries, between_documents = "query_to_query" in directions, "doc_to_doc" in directions
        backwards = "doc_to_query" in directions
        one_matrix = between_queries and between_documents and "h" not in self.sides
        if one_matrix and (backwards or self.ids is None):  # rows have one id each
            return self._all_pairs(backwards)
        of_query, of_document, positive = self._rectangle(backwards)
        if between_queries:
            of_query += self._sweep("q", "q", diagonal=0).rows
        if between_documents:
            of_document += self._sweep("d", "d", diagonal=0).rows
        if hard_of_documents:
            of_document += self._sweep("d", "h", differ=owners).rows
        return of_query, of_document, positive

    def _all_pairs(self, backwards: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """All four blocks at once: queries and documents are the rows of one self-similarity matrix."""
        count = self.sides["q"].shape[0]
        target = torch.arange(2 * count, device=self.scale.device)
        document = target >= count
        no_query = None if backwards else (document.long() - 1, -document.long())  # 0 for these rows, these columns
        folded = self._sweep("qd", "qd", target=target.roll(count), diagonal=0, differ=no_query)
        rows = folded.rows[0]
        return [rows[:count]], [rows[count:]], folded.target[:count]

    def _rectangle(self, backwards: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Queries with documents and hard negatives, and documents with queries where `backwards`.

        One sweep: a query's positive and the negatives close to it nearly cancel in its gradient, which must therefore
        be summed before it is rounded to 16 bits.
        """
        count = self.sides["q"].shape[0]
        target = torch.arange(count, device=self.scale.device)
        folded = self._sweep("q", "dh" if "h" in self.sides else "d", target=target, both=backwards)
        return [folded.rows[0]], [cols[:count] for cols in folded.cols[-1:]], folded.target

    def _sweep(self, rows: str, cols: str, target: Tensor | None = None, both: bool = False, **rules: Any) -> Folded:
        """Fold the rows of some sides against others, and the columns where `both`."""
        x, y = self._stack(self.sides, rows), None if rows == cols else self._stack(self.sides, cols)
        by_row = self._of_rows(self.bound, rows)
        fold_of_all = Fold("logsumexp") if self.hardness is None else self.hardness.fold()
        folds: tuple[Fold, ...] = (fold_of_all,)
        if both and self.bound is not None and y is not None:  # the last fold is for the columns, which have own bounds
            by_column = _padded(self.bound, y, torch.inf)[None]
            folds += (changed(fold_of_all, pairs=self._pairs(rows, cols, by_column, **rules)),)
        folded = self.sweep(
            Problem.of(self.names, x, y, target=target),
            reduce=folds,
            dim=(0, 1) if both else 1,
            scale=self._of_rows(self.scale, rows),
            col_scale=_padded(self.scale, y, 1.0) if y is not None and both and self.scale.dim() else None,
            pairs=self._pairs(rows, cols, by_row, **rules),
            unit=self.unit,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )
        if self.hardness is None:
            return folded
        of_rows, of_cols = (tuple(self.hardness.of_rows(each) for each in found) for found in folded[:2])
        return folded._replace(rows=of_rows, cols=of_cols)

    @staticmethod
    def _of_rows(values: Any, rows: str) -> Any:
        return values.repeat(len(rows)) if isinstance(values, Tensor) and values.dim() else values

    def _pairs(self, rows: str, cols: str, bound: Tensor | None, **rules: Any) -> Pairs:
        if self.ids is not None and cols != "h":
            of_rows, of_cols = self.ids
            more = self.sides["h"].shape[0] if cols == "dh" else 0
            of_cols = torch.nn.functional.pad(of_cols, (0, more), value=-1).repeat(2 if cols == "qd" else 1)
            rules["differ"] = of_rows.repeat(len(rows)), of_cols
        if self.guides is None or bound is None:
            return Pairs(below=bound, **rules)
        gy = None if rows == cols else self._stack(self.guides, cols)
        return Pairs(guide=Guide(self._stack(self.guides, rows), gy, below=bound), **rules)

    @staticmethod
    def _stack(sides: dict[str, Tensor], which: str) -> Tensor:
        return sides[which] if len(which) == 1 else torch.cat([sides[each] for each in which])


def _padded(values: Tensor, like: Tensor, value: float) -> Tensor:
    """The values of documents, continued for the hard negatives that follow them."""
    return torch.nn.functional.pad(values, (0, like.shape[0] - values.shape[0]), value=value)
