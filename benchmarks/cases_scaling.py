"""The cases of the curves of time and memory against the batch: one loss from small batches to large ones."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases_softmax import clip_case
from benchmarks.providers import MATMUL
from benchmarks.registry import OURS, Case, register

OP = "clip-scaling"
PLAIN = "torch eager"
DEPTH = 512
# Dense matrices of those below would take 8 GiB and more.
ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LONGEST = (16_384, 32_768)


def curve_case(n: int) -> Case:
    """CLIP's loss of n pairs: ours, dense, and the products alone."""
    like = clip_case(n, DEPTH, faster=1.0)
    others = tuple(like.provider(name) for name in (OURS, PLAIN, MATMUL))
    return replace(like, op=OP, providers=others, baseline=PLAIN, targets=())


def long_case(n: int) -> Case:
    """Where dense matrices would not fit: memory of ours alone, of rows that repeat."""
    like = curve_case(n)
    return replace(like, providers=like.providers[:1], baseline=OURS, measure=("memory",), copies=n // ROWS[-3])


register(*map(curve_case, ROWS), *map(long_case, LONGEST))
