"""Which candidates are drawn: random numbers that belong to a pair of ids, not to a position or a moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import checks
from ..core.ordered import in_float64

STRATEGIES = ("top", "uniform", "softmax", "simans")

# Constants of splitmix64 (Steele, Lea, Flood 2014), as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, eq=False)
class Sampling:
    """How negatives are drawn from the candidates of a query: without replacement, with probabilities by score.

    A candidate with score s is drawn with a probability that is proportional to exp(w), where p is the score of the
    positive::

        w = 0                        # "uniform"
        w = s / temperature          # "softmax"
        w = -a * (s - p - b)**2      # "simans"

    and "top" takes the best. One pass draws all: the n largest of w + g, where g is a Gumbel number that is a function
    of (seed, id of the query, id of the document) and of nothing else. Batches, blocks, shards and the order of queries
    and documents therefore make no difference.

    Args:
        strategy: "top", "uniform", "softmax" or "simans".
        seed: any int. Another seed, other negatives: use the number of the epoch to draw anew.
        temperature: of "softmax", in units of the score; small values come close to "top".
        a: of "simans", how narrow the preferred scores are, in units of 1 / score^2.
        b: of "simans", which difference to the positive's score is preferred, in units of the score; negative values
            prefer documents that score below the positive.
        ids: (query_ids (N,), corpus_ids (M,)) int64, the ids that random numbers belong to; None: the numbers of rows.
            Documents that share an id share their number: give each its own, or they are drawn together. Where queries
            are mined in parts, or rows are moved, give ids that stay the same.

    Source:
        Zhou et al., SimANS: Simple Ambiguous Negatives Sampling for Dense Text Retrieval, 2022. Kool et al., Stochastic
        Beams and Where to Find Them, 2019, for drawing without replacement by Gumbel numbers.

    Examples:
        >>> Sampling("softmax", seed=1, temperature=0.02).strategy
        'softmax'
    """

    strategy: str = "top"
    seed: int = 0
    temperature: float = 0.05
    a: float = 1.0
    b: float = 0.0
    ids: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        checks.check_choice("Sampling", "strategy", self.strategy, STRATEGIES)
        object.__setattr__(self, "seed", checks.integer("Sampling", "seed", self.seed))
        for name, interval in (("temperature", "(0, inf)"), ("a", "[0, inf)"), ("b", "(-inf, inf)")):
            object.__setattr__(self, name, checks.number("Sampling", name, getattr(self, name), interval))
        if self.ids is not None and (not isinstance(self.ids, tuple) or len(self.ids) != 2):
            raise TypeError("Sampling: ids must be (query_ids, corpus_ids) or None")


def check_ids(function: str, sampling: Sampling, query: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """Check the ids against the sizes they are for."""
    if sampling.ids is None:
        return None
    of_queries, of_corpus = sampling.ids
    return (
        checks.check_index(function, "sampling.ids query_ids", of_queries, query.shape[0], "query", query),
        checks.check_index(function, "sampling.ids corpus_ids", of_corpus, columns, "query", query),
    )


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right as unsigned numbers are."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64, with int64 in place of uint64: products wrap."""
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def uniform(seed: int, query_ids: Tensor, document_ids: Tensor) -> Tensor:
    """(N, C) float64 numbers in (0, 1), one for each (seed, query id, document id).

    Args:
        seed: any int, taken modulo 2^64.
        query_ids: (N,) int64.
        document_ids: (N, C) int64.
    """
    seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    key = mix(torch.full_like(query_ids, seed) + _STEP)
    # A query begins a stream of its own, and a document's number is its place in that stream.
    key = mix(key ^ mix(query_ids * _STEP))
    bits = mix(key[:, None] + (document_ids + 1) * _STEP)
    # 52 bits and a half: neither 0 nor 1 even after rounding.
    return (in_float64(_shift(bits, 12)) + 0.5) * 2.0**-52


def keys(
    sampling: Sampling, scores: Tensor, positive: Tensor, query_ids: Tensor, document_ids: Tensor
) -> Tensor | None:
    """(N, C) float64: candidates are taken by descending key. None: in the order in which they are.

    Args:
        sampling: what to draw by.
        scores: (N, C).
        positive: (N,) the score of the positive, for "simans".
        query_ids: (N,) int64.
        document_ids: (N, C) int64.
    """
    if sampling.strategy == "top":
        return None
    u = uniform(sampling.seed, query_ids, document_ids)
    if sampling.strategy == "uniform":
        return u  # in the order of the Gumbel numbers, without their logarithms
    scores = in_float64(scores)
    if sampling.strategy == "softmax":
        weight = scores / sampling.temperature
    else:
        weight = -sampling.a * (scores - in_float64(positive)[:, None] - sampling.b).square()
    # A weight of -inf, or the NaN of inf - inf, makes a candidate the last one, not none.
    most = torch.finfo(torch.float64).max
    return (weight - (-u.log()).log()).nan_to_num(nan=-most, posinf=most, neginf=-most)


def order_of(keys: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """(N, C) int64: candidates by descending key, then ascending id; those that are not valid last."""
    order = ids.to(keys.device).argsort(dim=1, stable=True)
    keys = keys.masked_fill(~valid.to(keys.device), -torch.inf)
    return order.gather(1, keys.gather(1, order).argsort(dim=1, descending=True, stable=True)).to(ids.device)
