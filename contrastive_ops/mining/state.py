"""The k best columns of every row, from blocks of columns in any order."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.problem import Problem
from ..core.records import changed
from ..core.rule_slices import columns_named, columns_of, rows_of
from ..core.rules import STATISTICS, Pairs, Slot, resolve
from ..ops.similarity_topk import TopK, metric_rows, select
from ._documents import best, checked_documents, merged
from ._fingerprint import bytes_of, fingerprint
from ._loading import check_parts, loaded
from ._ranges import LAST, Range, missing


class _Found(NamedTuple):
    """What a state knows. Replaced as a whole, so that an interrupt leaves the old one or the new one."""

    values: Tensor
    indices: Tensor
    covered: tuple[Range, ...]
    statistics: dict[str, Tensor]


class TopKState:
    """The k best columns of every row so far: a sum over blocks of the corpus that may come in any order.

    Equivalent to::

        state = TopKState(query, k)
        for begin in any_order(range(0, M, 1000)):
            state.update(corpus[begin:begin + 1000], begin)
        state.finalize() == similarity_topk(query, corpus, k)             # values and indices, ties included

    Args:
        query: (N, D) float32, bfloat16, float16 or float64. Not copied: leave it as it is while the state is in use.
        k: length of the lists.
        metric: as in `similarity_topk`.
        pairs: which pairs take part, with columns numbered over the whole corpus; all rules but `fill`.
        documents: (M,) int64 but -1, the document of each row where rows are chunks; lists are then of the k best ones.
        rows: M, the number of rows of the whole corpus. `finalize` then refuses to answer before all were seen.
        count_above: (N,) asks for `statistics`; "higher" counts the columns with a similarity above this.
        count_pairs: rules that statistics are counted under where they are not `pairs`.
        backend: "auto", "reference", "cpu", "triton", "cuda" or "hopper", as in `similarity_topk`; "hopper" is for
            lists that are much shorter than a block, and without `count_above`.

    Raises:
        ValueError: shapes, devices or values that do not fit, k below 1.
        TypeError: dtypes that do not fit.

    Note:
        Memory: O(N k), and what the search of one block needs. The values are those of the blocks' dtype, with sums in
        float32 (float64 for float64), without gradients; an autocast region has no effect. Where inner products round,
        equal results for all orders need a backend whose inner products do not depend on the block; "cpu" is one.

    Examples:
        >>> query, corpus = torch.randn(4, 8), torch.randn(100, 8)
        >>> halves = TopKState(query, 5), TopKState(query, 5)
        >>> halves[0].update(corpus[:50], 0)
        >>> halves[1].update(corpus[50:], 50)
        >>> halves[1].merge(halves[0]).finalize().indices.shape
        torch.Size([4, 5])
    """

    # Named in errors.
    _function = "TopKState"

    def __init__(
        self,
        query: Tensor,
        k: int,
        *,
        metric: str = "dot",
        pairs: Pairs | None = None,
        documents: Tensor | None = None,
        rows: int | None = None,
        count_above: Tensor | None = None,
        count_pairs: Pairs | None = None,
        backend: str = "auto",
    ) -> None:
        function = self._function
        query = checks.from_array(function, "query", query)
        checks.check_matrix(function, "query", query)
        k = checks.integer(function, "k", k, 1)
        if rows is not None:
            rows = checks.integer(function, "rows", rows, 0)
        self.k, self.metric, self.rows = k, metric, rows
        self._given = query.detach()
        with torch.no_grad(), autocast.disabled(query):
            self._query = metric_rows(function, self._given, self._given[:0], metric)[0]
        self._documents = checked_documents(function, documents, self._given, rows)
        rows = rows if self._documents is None else len(self._documents)
        self._pairs, self._limit = _resolved(function, pairs, self._given, rows)
        if count_pairs is None or count_pairs is pairs:
            self._count_pairs = None
        else:
            self._count_pairs, limit = _resolved(function, count_pairs, self._given, rows)
            self._limit = limit if self._limit is None else self._limit
        if count_above is not None:
            checks.check_vector(function, "count_above", count_above, query.shape[0], "query", query)
            count_above = count_above.detach().to(checks.accumulator(query.dtype))
        self._count_above, self._backend = count_above, backend
        self._problem: dict[str, Any] | None = None
        lists = (query.shape[0], k)
        self._found = _Found(
            query.new_full(lists, -torch.inf, dtype=checks.accumulator(query.dtype)).detach(),
            torch.full(lists, -1, dtype=torch.int64, device=query.device),
            (),
            {}
            if count_above is None
            else {name: torch.zeros(lists[0], dtype=torch.int64, device=query.device) for name in STATISTICS},
        )

    @property
    def covered(self) -> list[Range]:
        """The ranges [begin, end) of corpus rows that were seen, ascending, without touching ones."""
        return list(self._found.covered)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """(N,) int64 each, over the rows that were seen: what `select` counts where `count_above` is given, else {}."""
        return dict(self._found.statistics)

    @torch.no_grad()
    def update(self, block: Tensor, base_index: int) -> None:
        """See a block of the corpus.

        Args:
            block: (m, D) of the query's dtype and device.
            base_index: the row of the corpus that the block begins with.

        Raises:
            ValueError: rows that were seen before, or that the corpus does not have; shapes that do not fit.
            TypeError: a dtype that the state was not started with.
        """
        block = checks.from_array(self._function, "block", block)
        base_index = self._check_block(block, base_index)
        end = base_index + block.shape[0]
        found = self._found
        covered = self._with(((base_index, end),))
        if end == base_index:
            return
        with autocast.disabled(block):
            rows = metric_rows(self._function, block[:0], block, self.metric)[1]
            top, counted = self._of_block(rows, base_index)
        top = TopK(top.values, torch.where(top.indices < 0, -1, top.indices + base_index), top.counts)
        if found.covered:
            top = merged(TopK(found.values, found.indices, top.counts), top, self._documents, self._backend)
        statistics = {name: each + counted[name] for name, each in found.statistics.items()}
        self._found = _Found(top.values, top.indices, covered, statistics)

    def _of_block(self, columns: Tensor, begin: int) -> tuple[TopK, dict[str, Tensor]]:
        """The best columns of a block, and what was counted."""
        end, floor, statistics = begin + columns.shape[0], self._floor(begin), []
        pairs = columns_of(self._pairs, begin, end)

        def search(some: Tensor | None, k: int) -> TopK:
            query = self._query if some is None else self._query[some]
            top, counted = select(
                Problem.of((self._function, "query", "block"), query, columns),
                k,
                pairs=pairs if some is None else rows_of(pairs, some, columns.shape[0]),
                floor=floor if some is None or floor is None else floor[some],
                count_above=self._count_above if some is None else None,
                count_pairs=columns_of(self._count_pairs, begin, end) if some is None else None,
                metric=self.metric,
                backend=self._backend,
            )
            statistics.append(counted)
            return TopK(top.values, top.indices, (top.indices >= 0).sum(1))

        return best(search, self._documents, begin, end, self.k), statistics[0]

    @torch.no_grad()
    def merge(self, other: TopKState) -> TopKState:
        """Add what another state saw, of the same query and other rows of the corpus; return this state.

        States may be merged in any order and grouping: the result is the same bit for bit.

        Raises:
            ValueError: states of different problems, or rows that both saw.
        """
        if not isinstance(other, TopKState):
            raise TypeError(f"{self._function}.merge: other must be a TopKState, got {type(other).__name__}")
        self._check_same(other)
        rows = other.rows if self.rows is None else self.rows
        mine, theirs = self._found, other._found
        covered = self._with(theirs.covered, rows)
        counts = mine.indices.new_zeros(len(mine.indices))
        lists = [TopK(each.values, each.indices, counts) for each in (mine, theirs)]
        top = merged(lists[0], lists[1], self._documents, self._backend)
        statistics = {name: each + theirs.statistics[name] for name, each in mine.statistics.items()}
        self.rows, self._problem = rows, None
        self._found = _Found(top.values, top.indices, covered, statistics)
        return self

    @torch.no_grad()
    def all_merge(self, group: Any = None) -> TopKState:
        """Add what the states of all processes saw, each of other rows; return this state, now the same on all of them.

        Args:
            group: a ProcessGroup, a DeviceMesh of one dimension, or None for all processes. Without any others, nothing
                happens.

        Returns:
            This state. Each rank merges the lists of some queries, so that time and memory are those of one more list.

        Raises:
            ValueError: on every rank: states of different problems, or rows that two of them saw.
            RuntimeError: a rank has ended, or does not take part before the group's timeout.
        """
        from ..distributed._groups import find_team

        function = f"{self._function}.all_merge"
        team = find_team(function, group)
        if team is None:
            return self
        from ._ranks import merge_over_ranks, told_by_all

        every = told_by_all(team, (self._described(), self._found.covered))
        for rank, (described, _) in enumerate(every):
            differ = [name for name, value in every[0][0].items() if described[name] != value]
            if differ:
                raise ValueError(
                    f"{function}: the states of all ranks must be of one problem, got rank 0 and rank {rank} that "
                    f"differ in {', '.join(differ)}"
                )
        own = self._found
        others = [ranges for rank, (_, ranges) in enumerate(every) if rank != team.rank]
        covered = self._with(tuple(each for ranges in others for each in ranges))
        top = TopK(own.values, own.indices, own.indices.new_zeros(len(own.indices)))
        top, statistics = merge_over_ranks(team, top, own.statistics, self._documents, self._backend)
        self._found = _Found(top.values, top.indices, covered, statistics)
        return self

    def finalize(self) -> TopK:
        """The lists so far; the state can go on. The tensors are those of the state: copy them to change them.

        Returns:
            `TopK` as of `similarity_topk`, with rows of the corpus as indices.

        Raises:
            ValueError: rows of the corpus that were declared and not seen.
        """
        if self.rows is not None:
            for begin, end in missing(self._found.covered, 0, self.rows):
                raise ValueError(
                    f"{self._function}: all {self.rows} rows of the corpus must be seen before the lists are final, "
                    f"rows {begin} to {end} are missing"
                )
        values, indices = self._found[:2]
        return TopK(values, indices, (indices >= 0).sum(1))

    def state_dict(self) -> dict[str, Any]:
        """What a state of the same arguments needs to go on: tensors, numbers and names for torch.save."""
        found = self._found
        return {
            "problem": dict(self._described()),
            "values": found.values,
            "indices": found.indices,
            "covered": torch.tensor(found.covered, dtype=torch.int64).reshape(-1, 2),
            "statistics": dict(found.statistics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: the state is that of another problem: another query, k, metric, dtype, corpus or other rules;
                or it is none that `state_dict` returns: lists of another shape or dtype, ranges that overlap, columns
                that were not seen. The state then stays as it is.
        """
        check_parts(self._function, state)
        own, saved = self._described(), state["problem"]
        differ = [name for name in own if not isinstance(saved, dict) or saved.get(name) != own[name]]
        if differ:
            there = saved if isinstance(saved, dict) else {}
            listed = "; ".join(f"{name}: {there.get(name)} there, {own[name]} here" for name in differ)
            raise ValueError(f"{self._function}: state must be of the same problem, got one that differs in {listed}")
        self._found = _Found(*loaded(self._function, state, self._found, self._limit))

    def begun_anew(self) -> TopKState:
        """A state of the same problem that has seen nothing."""
        other, found = copy.copy(self), self._found
        statistics = {name: torch.zeros_like(each) for name, each in found.statistics.items()}
        lists = torch.full_like(found.values, -torch.inf), torch.full_like(found.indices, -1)
        other._found = _Found(*lists, (), statistics)
        return other

    def _described(self) -> dict[str, Any]:
        """What two states must agree in, for a file: the query and the rules by their bytes."""
        if self._problem is None:
            self._problem = {
                "queries": self._given.shape[0],
                "depth": self._given.shape[1],
                "dtype": str(self._given.dtype),
                "k": self.k,
                "metric": self.metric,
                "corpus rows": self.rows,
                "query": fingerprint(self._given),
                "rules": fingerprint(self._pairs, self._count_pairs, self._count_above),
            }
            self._problem |= {} if self._documents is None else {"documents": fingerprint(self._documents)}
        return self._problem

    def _check_block(self, block: Tensor, base_index: int) -> int:
        function, query = self._function, self._given
        checks.check_matrix(function, "block", block)
        if block.dtype != query.dtype:
            raise TypeError(
                f"{function}: block must have the dtype that the state was started with, {query.dtype}, got "
                f"{block.dtype}\n  convert the block, or start a state for each dtype"
            )
        checks.check_matrices(function, "query", query, "block", block)
        return checks.integer(function, "base_index", base_index, 0)

    def _check_same(self, other: TopKState) -> None:
        function = f"{self._function}.merge"
        for name, mine, theirs in (
            ("k", self.k, other.k),
            ("metric", self.metric, other.metric),
            ("query dtype", self._given.dtype, other._given.dtype),
            ("query shape", tuple(self._given.shape), tuple(other._given.shape)),
            ("device", self._given.device, other._given.device),
            ("statistics", sorted(self._found.statistics), sorted(other._found.statistics)),
            ("documents", *(each._described().get("documents") for each in (self, other))),
        ):
            if mine != theirs:
                raise ValueError(f"{function}: both states must have the same {name}, got {mine} and {theirs}")
        if self.rows is not None and other.rows is not None and self.rows != other.rows:
            raise ValueError(f"{function}: both states must have the same rows, got {self.rows} and {other.rows}")
        same = self._given.data_ptr() == other._given.data_ptr() and self._given.stride() == other._given.stride()
        # As bytes, because NaN is not equal to itself.
        if not same and not torch.equal(bytes_of(self._given), bytes_of(other._given)):
            raise ValueError(f"{function}: both states must be of the same query, got two that differ")

    def _with(self, ranges: tuple[Range, ...], rows: int | None = None) -> tuple[Range, ...]:
        """The covered ranges with more of them; nothing is seen twice."""
        limit = self._limit if rows is None else rows
        joined: list[Range] = []
        for begin, end in sorted(each for each in (*self._found.covered, *ranges)):
            if end > LAST:
                raise ValueError(f"{self._function}: base_index must leave room for int64 indices, got {begin}")
            if limit is not None and end > limit:
                raise ValueError(
                    f"{self._function}: block must be of the {limit} rows that the corpus was declared to have, got "
                    f"rows {begin} to {end}"
                )
            if joined and begin < joined[-1][1] and begin < end:
                raise ValueError(
                    f"{self._function}: each row of the corpus must be seen once, rows {begin} to "
                    f"{min(end, joined[-1][1])} came twice"
                )
            if joined and begin == joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
            elif begin < end:
                joined.append((begin, end))
        return tuple(joined)

    def _floor(self, base_index: int) -> Tensor | None:
        """(N,) scores that a column of the next block must exceed to be of interest."""
        found = self._found
        if not found.covered:
            return None
        last = found.values[:, -1].contiguous()
        # An equal score comes first where its column does, so only a later block can do without it.
        later = base_index >= found.covered[-1][1]
        return last if later else last.nextafter(torch.full_like(last, -torch.inf))


def _resolved(function: str, pairs: Pairs | None, query: Tensor, rows: int | None) -> tuple[Pairs | None, int | None]:
    """Check the rules against the whole corpus; return them with sorted lists, and the number of its rows if known."""
    if pairs is None:
        return None, rows
    if not isinstance(pairs, Pairs):
        raise TypeError(f"{function}: pairs must be Pairs or None, got {type(pairs).__name__}")
    limit = columns_named(pairs) if rows is None else rows
    columns = limit
    if columns is None:
        listed = pairs.exclude[1] if pairs.exclude is not None else None
        columns = max(1, 1 + int(listed.max())) if isinstance(listed, Tensor) and listed.numel() > 0 else 1
    # The guide waits for its blocks: here all its columns would be converted.
    plain = changed(pairs, guide=None)
    data = resolve(function, plain, query, query.new_empty((columns, 0)))
    if pairs.guide is not None and rows is not None:
        guide = pairs.guide.gx if pairs.guide.gy is None else pairs.guide.gy
        if len(guide) != rows:
            raise ValueError(f"{function}: guide.gy must have {rows} rows, got {checks.shape(guide)}")
    if pairs.exclude is not None:
        pairs = changed(pairs, exclude=(data[Slot.EXCLUDE_INDPTR], data[Slot.EXCLUDE_INDICES]))
    return pairs, limit
