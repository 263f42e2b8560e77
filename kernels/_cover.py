"""Which combinations of many choices are tried: all, or few in which every two values meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Combine = Callable[[Mapping[str, Sequence[Any]]], Iterator[dict[str, Any]]]


def every_combination(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The full product: far more than anybody compiles in one sitting."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def pairwise_cover(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Combinations in which every two values of two names meet, few of them: greedy, always the same."""
    names = list(choices)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    while missing:
        start = min(missing, key=repr)
        row = {start[0]: start[1], start[2]: start[3]}
        for name in names:
            if name not in row:
                row[name] = max(range(len(choices[name])), key=lambda i, name=name: (_gain(missing, row, name, i), -i))
        missing -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}
        yield {name: choices[name][index] for name, index in row.items()}


def _gain(missing: set[tuple[str, int, str, int]], row: Mapping[str, int], name: str, index: int) -> int:
    """How many missing pairs a value adds to a row."""
    return sum((a, i, name, index) in missing or (name, index, a, i) in missing for a, i in row.items())


def half_of_cover(number: int) -> Combine:
    """Every second combination of a pairwise cover from a number on, and those with a value that none of these has."""

    def combine(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
        rows = list(pairwise_cover(choices))
        missing = {(name, index) for name, values in choices.items() for index in range(len(values))}
        for row in rows[number::2] + rows[1 - number :: 2]:
            own = {(name, list(choices[name]).index(value)) for name, value in row.items()}
            if rows.index(row) % 2 == number or own & missing:
                missing -= own
                yield row

    return combine


def spread(number: int) -> Combine:
    """One combination: of every name its value of this number, so that some numbers together have each value."""

    def combine(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
        yield {name: values[number % len(values)] for name, values in choices.items()}

    return combine
