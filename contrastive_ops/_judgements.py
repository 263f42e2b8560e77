"""What was found and what was judged relevant, in the forms that evaluation scripts have, as tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core import checks
from .core.lists import NONE, first_of_pairs, pair_order
from .mining._collapse import collapse, documents_of
from .ops.similarity_topk import TopK

RELEVANT = (
    "(indptr, indices) or (indptr, indices, grades), a list of documents or a dict {document: grade} for each query, "
    "or a dict {query: {document: grade}}"
)
# Entries of lists that are sorted at once.
LIST_ELEMENTS = 1 << 19
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class Judged(NamedTuple):
    """Documents that were judged, each once for a query, by query.

    Attributes:
        query: (P,) int64 rows of what was found, ascending.
        document: (P,) int64.
        grade: (P,) float64, finite and not negative.
    """

    query: Tensor
    document: Tensor
    grade: Tensor


class Hits(NamedTuple):
    """Where the documents of a positive grade stand in the lists of what was found, by ascending rank.

    Attributes:
        rank: (N, H) float64, from 1; infinite behind the last one.
        grade: (N, H) float64, 0 behind the last one.
    """

    rank: Tensor
    grade: Tensor

    @classmethod
    def of(cls, found: Tensor, judged: Judged) -> Hits:
        """Look for what is relevant in (N, K) lists, which become sets, some of them at a time."""
        relevant = judged.grade > 0
        query, document, grade = (each[relevant] for each in judged)
        rank = torch.zeros_like(document)
        N, K = found.shape
        step = max(1, LIST_ELEMENTS // max(K, 1))
        for begin in range(0, N if K > 0 else 0, step):
            end = min(begin + step, N)
            first, last = torch.searchsorted(query, torch.tensor([begin, end], device=query.device)).tolist()
            part = slice(first, last)
            rank[part] = _ranks_of(found[begin:end], query[part] - begin, document[part])
        there = rank > 0
        query, rank, grade = query[there], rank[there], grade[there]
        order = (query * (K + 1) + rank).argsort()
        query, rank, grade = query[order], rank[order], grade[order]
        counts = torch.bincount(query, minlength=N)
        place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        width = int(counts.max()) if N > 0 else 0
        ranks, grades = grade.new_full((N, width), torch.inf), grade.new_zeros((N, width))
        ranks[query, place], grades[query, place] = rank.double(), grade
        return cls(ranks, grades)


class Ids:
    """Numbers for ids of any kind: an int is its own, and other ids are counted as they come."""

    def __init__(self, function: str) -> None:
        self.function = function
        self._known: dict[Hashable, int] = {}
        self._as_they_are = False

    def numbers(self, name: str, ids: Iterable[Any]) -> list[int]:
        """The numbers of ids from a Python container; ints and others are not mixed."""
        return [self._number(name, each) for each in ids]

    def keep(self, name: str) -> None:
        """Ids of a tensor are numbers already, so that no other kind can be compared with them."""
        if self._known:
            raise TypeError(
                f"{self.function}: {name} must have ids of one kind, got numbers and {next(iter(self._known))!r}"
            )
        self._as_they_are = True

    def _number(self, name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            if self._as_they_are or not isinstance(value, Hashable) or isinstance(value, float):
                raise TypeError(
                    f"{self.function}: {name} must have int64 ids as the others do, got {checks.shown(value)}"
                ) from None
            return self._known.setdefault(value, len(self._known))
        self.keep(name)
        if not -(1 << 63) <= number < 1 << 63:
            raise ValueError(f"{self.function}: {name} must have ids that int64 can hold, got {number}")
        return number


def parse(function: str, found: object, relevant: object, documents: object, ties: str) -> tuple[Tensor, Judged]:
    """Return (N, K) int64 documents as they were found, and what was judged.

    Args:
        function: the function to name in errors.
        found: see `retrieval_metrics`.
        relevant: see `retrieval_metrics`.
        documents: see `retrieval_metrics`.
        ties: see `retrieval_metrics`.
    """
    ids = Ids(function)
    if isinstance(found, TopK):
        found = found.indices
    rows: dict[Hashable, int] | None = None
    if isinstance(found, Mapping):
        rows = {query: row for row, query in enumerate(found)}
        found = [_ranked(function, each, ties) for each in found.values()]
    elif ties != "listed":
        raise ValueError(
            f'{function}: ties must be "listed" where found has no scores, got {ties!r}\n'
            "  give found as {query: {document: score}}"
        )
    if isinstance(documents, Mapping):
        found, documents = _named(function, found, documents), None
    if isinstance(found, Sequence) and not isinstance(found, (str, bytes)):
        lists = [ids.numbers("found", each) for each in _each(function, "found", found)]
        width = max((len(each) for each in lists), default=0)
        indices = torch.tensor([each + [NONE] * (width - len(each)) for each in lists], dtype=torch.int64)
        indices = indices.view(len(lists), width)
    else:
        indices = as_ids(function, "found", found)
        ids.keep("found")
    if indices.dim() != 2:
        raise ValueError(f"{function}: found must have two dimensions (queries, k), got {checks.shape(indices)}")
    if documents is not None:
        chunk_of = as_ids(function, "documents", documents).to(indices.device)
        indices = documents_of(function, "found", indices, chunk_of)
    return indices, _judged(function, relevant, indices, rows, ids)


def as_ids(function: str, name: str, ids: object) -> Tensor:
    """Ids as an int64 tensor, from a tensor, an array or numbers."""
    ids = _tensor(ids)
    if not isinstance(ids, Tensor) or (ids.dtype not in INTEGERS and ids.numel() > 0):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"{function}: {name} must be an int64 tensor or a TopK, or lists or an array of int, got {kind}"
        )
    wide = ids.to(torch.int64)
    if ids.dtype == torch.uint64 and bool((wide < 0).any()):
        raise ValueError(f"{function}: {name} must have ids that int64 can hold, got one of 2^63 or more")
    return wide


def _tensor(values: object) -> object:
    """Arrays and sequences of numbers as tensors; everything else as it is."""
    if isinstance(values, Tensor):
        return values
    if hasattr(values, "__array__") or isinstance(values, Sequence):
        try:
            return torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return values
    return values


def _ranked(function: str, scores: object, ties: str) -> list[Any]:
    """The documents of one query, the best first: from {document: score}, or in order already."""
    if isinstance(scores, Mapping):
        by_score = {document: float(score) for document, score in scores.items()}
        if any(math.isnan(score) for score in by_score.values()):
            raise ValueError(f"{function}: found must have scores that are numbers, got nan")
        names = list(by_score)
        if ties == "trec_eval":
            names.sort(key=str, reverse=True)
            rounded = torch.tensor([by_score[each] for each in names], dtype=torch.float64).float().tolist()
            by_score = dict(zip(names, rounded, strict=True))
        return sorted(names, key=lambda document: -by_score[document])
    return list(_each(function, "found", [scores])[0])


def _named(function: str, found: object, documents: Mapping[Any, Any]) -> list[list[Any]]:
    """The documents that a dict names for the chunks that were found."""
    if not (isinstance(found, Sequence) or _is_matrix(found)) or isinstance(found, (str, bytes)):
        raise TypeError(f"{function}: found must be lists or a matrix of chunks, got {_described(found)}")
    lists = [list(each) for each in _each(function, "found", found)]  # type: ignore[arg-type]
    unknown = next((chunk for each in lists for chunk in each if chunk != NONE and chunk not in documents), NONE)
    if unknown != NONE:
        raise ValueError(
            f"{function}: documents must name the document of each chunk that was found, got none for {unknown!r}"
        )
    return [[NONE if chunk == NONE else documents[chunk] for chunk in each] for each in lists]


def _each(function: str, name: str, lists: Sequence[Any]) -> list[Iterable[Any]]:
    made = []
    for row, each in enumerate(lists):
        if isinstance(each, (str, bytes)) or not isinstance(each, Iterable):
            raise TypeError(
                f"{function}: {name} must have a list for each query, got {checks.shown(each)} for query {row}"
            )
        made.append(each.tolist() if hasattr(each, "tolist") else each)
    return made


def _judged(function: str, relevant: object, indices: Tensor, rows: dict[Hashable, int] | None, ids: Ids) -> Judged:
    if isinstance(relevant, tuple):
        query, document, grade = _from_tuple(function, relevant, indices)
        ids.keep("relevant")
    else:
        query, document, grade = _from_container(function, relevant, indices, rows, ids)
    wrong = grade[~(grade >= 0) | (grade == torch.inf)]
    if len(wrong):
        which = "be finite" if not bool(wrong[0] < 0) else "not be negative"
        raise ValueError(
            f"{function}: grades must {which}, got {float(wrong[0])}\n  use 0 for what was judged not to be relevant"
        )
    query, document, grade = (each[document != NONE] for each in (query, document, grade))
    # The largest grade of a document comes first, and stays.
    order = grade.argsort(descending=True, stable=True)
    order = order[first_of_pairs(query[order], document[order])]
    order = order[pair_order(query[order], document[order])]
    return Judged(query[order], document[order], grade[order])


def _from_tuple(function: str, relevant: tuple[Any, ...], indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The query, the document and the grade of each entry of lists one after another."""
    if len(relevant) not in (2, 3):
        raise TypeError(f"{function}: relevant must be {RELEVANT}, got a tuple of {len(relevant)}")
    indptr, document = (
        as_ids(function, name, each).to(indices.device)
        for name, each in zip(("indptr", "indices"), relevant, strict=False)
    )
    indptr = checks.check_index(function, "indptr", indptr, len(indices) + 1, "found", indices)
    document = checks.check_index(function, "indices", document, None, "found", indices)
    lengths = indptr.diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(document) or bool((lengths < 0).any()):
        raise ValueError(f"{function}: indptr must ascend from 0 to {len(document)}, got {indptr.tolist()}")
    grade = torch.ones(len(document), dtype=torch.float64, device=indices.device)
    if len(relevant) == 3:
        grades = _tensor(relevant[2])
        if not isinstance(grades, Tensor) or grades.is_complex():
            raise TypeError(f"{function}: grades must be a tensor of numbers, got {type(relevant[2]).__name__}")
        if grades.shape != document.shape:
            raise ValueError(f"{function}: grades must have shape ({len(document)},), got {checks.shape(grades)}")
        grade = grades.detach().to(device=indices.device, dtype=torch.float64)
    return torch.repeat_interleave(lengths), document, grade


def _from_container(
    function: str, relevant: object, indices: Tensor, rows: dict[Hashable, int] | None, ids: Ids
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of Python's containers and of a matrix with -1 for none."""
    lists: Iterable[tuple[int, Any]]
    if isinstance(relevant, Mapping):
        lists = _by_query(function, relevant, len(indices), rows)
    elif (isinstance(relevant, Sequence) and not isinstance(relevant, (str, bytes))) or _is_matrix(relevant):
        each_query = _each(function, "relevant", relevant)  # type: ignore[arg-type]
        if len(each_query) != len(indices):
            raise ValueError(
                f"{function}: relevant must have a list for each of the {len(indices)} queries, got {len(each_query)}"
            )
        lists = enumerate(each_query)
    else:
        raise TypeError(f"{function}: relevant must be {RELEVANT}, got {_described(relevant)}")
    query: list[int] = []
    document: list[int] = []
    grade: list[float] = []
    for row, each in lists:
        numbers = ids.numbers("relevant", each)
        query += [row] * len(numbers)
        document += numbers
        grade += [float(value) for value in each.values()] if isinstance(each, Mapping) else [1.0] * len(numbers)
    kinds = ((query, torch.int64), (document, torch.int64), (grade, torch.float64))
    return tuple(torch.tensor(each, dtype=kind, device=indices.device) for each, kind in kinds)  # type: ignore[return-value]


def _by_query(
    function: str, relevant: Mapping[Any, Any], queries: int, rows: dict[Hashable, int] | None
) -> Iterable[tuple[int, Any]]:
    for query, each in relevant.items():
        if isinstance(each, (str, bytes)) or not isinstance(each, Iterable):
            raise TypeError(
                f"{function}: relevant must have documents for each query, got {checks.shown(each)} for "
                f"{checks.shown(query)}"
            )
        if rows is not None:
            if query in rows:  # a query that nothing was searched for has no row
                yield rows[query], each
            continue
        try:
            row = operator.index(query)
        except TypeError:
            row = -1
        if not 0 <= row < queries:
            raise ValueError(
                f"{function}: relevant must have rows of found as keys, from 0 to {queries - 1}, got "
                f"{checks.shown(query)}\n"
                "  or give both as dicts of the same queries: found as {query: {document: score}}"
            )
        yield row, each


def _is_matrix(relevant: object) -> bool:
    return getattr(relevant, "ndim", 0) == 2 and hasattr(relevant, "tolist")


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"


def _ranks_of(found: Tensor, row: Tensor, document: Tensor) -> Tensor:
    """(P,) the rank of each document in the list of its row, from 1; 0 where it was not found."""
    ascending, places, bits, lowest = _sorted(found)
    # Lists that repeat an entry, or have none before one, are made sets; others are that already.
    same = ascending[:, 1:] == ascending[:, :-1]
    if lowest <= NONE:
        same &= ascending[:, 1:] != NONE
    wrong = same.any(1)
    if lowest <= NONE:
        wrong |= ((found[:, :-1] == NONE) & (found[:, 1:] != NONE)).any(1)
    wrong = wrong.nonzero()[:, 0]
    if len(wrong):
        ascending[wrong], places[wrong] = collapse(found[wrong]).sort(dim=1)
    width = found.shape[1]
    below = torch.full_like(row, -1)  # the last entry that is smaller, by halving what is left
    for bit in reversed(range(width.bit_length())):
        place = below + (1 << bit)
        smaller = ascending[row, place.clamp_max(width - 1)] < document
        below = torch.where((place < width) & smaller, place, below)
    at = (below + 1).clamp_max(width - 1)
    return torch.where(ascending[row, at] == document, (places[row, at] & ((1 << bits) - 1)) + 1, 0)


def _sorted(lists: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """(N, K) int64 lists in ascending order, in the last bits of what numbers, how many bits, and the lowest entry.

    An entry and its place are one number where both fit into 63 bits, which NumPy sorts several times faster on the CPU
    than torch sorts entries with their places.
    """
    bits = max(1, lists.shape[1].bit_length())
    low, high = (int(end) for end in lists.aminmax()) if lists.numel() > 0 else (0, 0)
    most = 1 << (63 - bits)
    if lists.device.type != "cpu" or not -most <= low <= high < most:
        return *lists.sort(dim=1), bits, low
    keys = (lists << bits) + torch.arange(lists.shape[1])
    try:
        keys.numpy().sort(axis=1)
    except RuntimeError:  # a torch without NumPy
        keys = keys.sort(dim=1).values
    return keys >> bits, keys, bits, low
