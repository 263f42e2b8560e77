"""Which rows of a corpus were seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch

Range = tuple[int, int]
# The end of a range is a number of int64, as the indices in it are.
LAST = torch.iinfo(torch.int64).max


def missing(covered: tuple[Range, ...] | list[Range], begin: int, end: int) -> Iterator[Range]:
    """The parts of [begin, end) that no range covers."""
    for first, last in covered:
        if begin < min(first, end):
            yield begin, min(first, end)
        begin = max(begin, last)
    if begin < end:
        yield begin, end


def covers(ranges: list[Range], others: list[Range]) -> bool:
    """Whether all of the others are in the ranges."""
    return not any(list(missing(ranges, begin, end)) for begin, end in others)
