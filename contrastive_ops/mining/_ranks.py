"""A corpus whose rows are in several places, and searches of it by several processes.

All ranks have the same queries and take the same decisions; only rows of the corpus are in one place alone. Each rank
scans what it has, and lists are merged; single rows that a decision needs are read by whoever has them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import checks
from ..core.rules import Pairs
from ..distributed._agreement import Agreement
from ..distributed._collectives import failures_named, gather_rows, send_to_owners
from ..distributed._groups import Shards, Team
from ..ops.similarity_topk import TopK
from ._documents import merged
from ._fingerprint import fingerprint
from ._ranges import Range
from .corpus import Corpus, as_corpus
from .state import TopKState


class PartedCorpus(Corpus):
    """Rows of a corpus in parts, of which each process of a team has some; without a team this one has all.

    Attributes:
        rows: of all parts.
        parts: (first row, part) of those that this process has.
    """

    def __init__(self, function: str, corpus: object, query: Tensor, team: Team | None) -> None:
        self._function, self.team = function, team
        self.depth, self.dtype, self.device = query.shape[1], query.dtype, query.device
        with self.reading():
            given = corpus if isinstance(corpus, (list, tuple)) else [(None, corpus)]
            if not all(isinstance(each, (list, tuple)) and len(each) == 2 for each in given):
                raise TypeError(f"{function}: corpus must be rows, or a list of (first row, rows), got another list")
            parts = [(begin, as_corpus(function, source, query)) for begin, source in given]
            parts = sorted((each for each in parts if each[1].rows), key=lambda each: each[0] or 0)
            ranges = [(begin, part.rows) for begin, part in parts]
        self.ranges = _placed(function, [ranges] if team is None else told_by_all(team, ranges))
        mine = [begin for begin, _, owner in self.ranges if owner == (0 if team is None else team.rank)]
        self.parts = [(begin, part) for begin, (_, part) in zip(mine, parts, strict=True)]
        self.rows = max((end for _, end, _ in self.ranges), default=0)

    @property
    def place(self) -> tuple[int, int]:  # type: ignore[override]
        """The rank of this process, and how many there are."""
        return (0, 1) if self.team is None else (self.team.rank, self.team.size)

    def reading(self) -> contextlib.AbstractContextManager[object]:
        """See `Corpus.reading`: what one rank cannot read is an error on all."""
        return contextlib.nullcontext() if self.team is None else Agreement(self._function, self.team, True)

    def compare(self, *arguments: object) -> None:
        """See `Corpus.compare`."""
        if self.team is not None:
            with Agreement(self._function, self.team, True) as agreed:
                agreed.text = ", ".join(_named(each) for each in arguments)

    def seen_by_all(self, seen: list[Range]) -> list[Range]:
        """See `Corpus.seen_by_all`."""
        every = [seen] if self.team is None else told_by_all(self.team, seen)
        return sorted(each for ranges in every for each in ranges)

    def complete(self, state: TopKState) -> None:
        """See `Corpus.complete`."""
        if self.team is not None:
            state.all_merge(self.team.group)

    def blocks(self, block_rows: int) -> Generator[tuple[int, Tensor]]:
        """See `Corpus.blocks`; of the rows that are here."""
        return self.unseen([], block_rows)

    def unseen(self, seen: list[Range], step: int, base: int = 0) -> Generator[tuple[int, Tensor]]:
        """See `Corpus.unseen`; of the rows that are here."""
        for begin, part in self.parts:
            yield from part.unseen(seen, step, begin)

    def take(self, index: Tensor) -> Tensor:
        """See `Corpus.take`; all ranks ask for the same rows."""
        index = checks.as_index(self._function, "index of corpus rows", index)
        checks.check_index_values(self._function, "index of corpus rows", index, self.rows)
        wanted, place = index.reshape(-1).cpu().unique(return_inverse=True)
        begins = torch.tensor([begin for begin, _, _ in self.ranges], dtype=torch.int64)
        owners = torch.tensor([owner for _, _, owner in self.ranges], dtype=torch.int64)
        owner = owners[torch.searchsorted(begins, wanted, right=True) - 1]
        rank = 0 if self.team is None else self.team.rank
        here = wanted[owner == rank]
        with self.reading():
            found = torch.empty((len(here), self.depth), dtype=self.dtype)
            for begin, part in self.parts:
                inside = (here >= begin) & (here < begin + part.rows)
                found[inside] = part.take(here[inside] - begin).cpu()
        found = found.to(self.device)
        if self.team is not None and len(wanted):
            sizes = tuple(torch.bincount(owner, minlength=self.team.size).tolist())
            by_owner = owner.argsort(stable=True)
            found = gather_rows(found, Shards(self.team, sizes))[by_owner.argsort().to(self.device)]
        return found[place.to(self.device)].view(*index.shape, self.depth)


def _named(argument: object) -> str:
    """An argument by its value, or by its shape and a hash of its bytes."""
    holds_tensors = isinstance(argument, (Tensor, Pairs, tuple, list)) or dataclasses.is_dataclass(argument)
    shape = checks.shape(argument) if isinstance(argument, Tensor) else type(argument).__name__
    return f"{shape} {fingerprint(_leaves(argument))}" if holds_tensors else f"{argument}"


def _leaves(argument: object) -> object:
    """The fields of dataclasses, items of lists."""
    if isinstance(argument, (tuple, list)):
        return tuple(_leaves(each) for each in argument)
    if dataclasses.is_dataclass(argument) and not isinstance(argument, (type, Pairs)):
        return tuple(_leaves(getattr(argument, field.name)) for field in dataclasses.fields(argument))
    return torch.as_tensor(argument) if hasattr(argument, "__array_interface__") else argument


def told_by_all(team: Team, told: Any) -> list[Any]:
    """What each rank tells."""
    every: list[Any] = [None] * team.size
    with failures_named(team):
        dist.all_gather_object(every, told, group=team.group)
    return every


def _placed(function: str, every: list[list[tuple[int | None, int]]]) -> list[tuple[int, int, int]]:
    """(begin, end, rank) of all parts, none of them empty, ascending; parts without a first row follow one another."""
    known = [begin is not None for ranges in every for begin, _ in ranges]
    if any(known) and not all(known):
        raise ValueError(f"{function}: corpus must say the first row of each part on all ranks, or on none")
    ranges, end = [], 0
    for rank, parts in enumerate(every):
        for begin, rows in parts:
            begin = end if begin is None else checks.integer(function, "first row of a part of the corpus", begin, 0)
            ranges.append((begin, begin + rows, rank))
            end = begin + rows
    ranges.sort()
    last = 0
    for begin, end, rank in ranges:
        if begin != last:
            raise ValueError(
                f"{function}: corpus must have each row in one part, got rows {min(begin, last)} to {max(begin, last)} "
                f"{'in none' if begin > last else 'in two'}, before the part of rank {rank} that begins with {begin}"
            )
        last = end
    return ranges


def merge_over_ranks(
    team: Team, top: TopK, statistics: dict[str, Tensor], documents: Tensor | None, backend: str
) -> tuple[TopK, dict[str, Tensor]]:
    """The best of the lists of all ranks, by document where there are, and the sums of their statistics, on all.

    Each rank merges the lists of some queries, in the order of the ranks: work and memory of one more list.
    """
    rows, names = top.values.shape[0], list(statistics)
    if rows == 0:
        return top, statistics
    begins = [rows * rank // team.size for rank in range(team.size + 1)]
    shards = Shards(team, tuple(end - begin for begin, end in zip(begins, begins[1:], strict=False)))
    every = zip(send_to_owners(top.values, shards), send_to_owners(top.indices, shards), strict=True)
    lists = [TopK(values, indices, (indices >= 0).sum(1)) for values, indices in every]
    best = lists[0]
    for other in lists[1:]:
        best = merged(best, other, documents, backend)
    values, indices = (gather_rows(each.contiguous(), shards) for each in best[:2])
    if names:
        counts = gather_rows(send_to_owners(torch.stack(list(statistics.values()), 1), shards).sum(0), shards)
        statistics = dict(zip(names, counts.unbind(1), strict=True))
    return TopK(values, indices, (indices >= 0).sum(1)), statistics
