"""The cases of searches: the k best columns of every row, of few rows, and under rules.

A corpus of 50,000 unit rows in clusters, and queries that each resemble one of its rows. An error is
one of scores, which are cosines: two columns within it may stand for each other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks import providers, providers_topk
from benchmarks.inputs import search_inputs, search_with_rules
from benchmarks.providers_topk import BF16, FAISS, INT8, OVER_FETCH, READ, SELECTOR
from benchmarks.registry import OURS, Case, Provider, Target, register
from benchmarks.truth import topk_truth

CORPUS = 50_000
MARGIN = 0.05
# Four times what rounding does to a float32 sum of 768 products of unit rows, added one by one.
TOLERANCE = 2e-6


def search_case(op: str, n: int, d: int, k: int, *others: Provider, targets: tuple[Target, ...] = ()) -> Case:
    """A search without rules; the only work that nobody can avoid are its scores, 2 N M D."""
    return Case(
        op=op,
        shapes={"N": n, "M": CORPUS, "D": d, "k": k},
        dtype=torch.float32,
        make_inputs=search_inputs,
        truth=topk_truth,
        providers=(
            providers_topk.ours(),
            *others,
            providers_topk.faiss_flat(),
            providers_topk.mm_topk(),
            providers.matmuls("NT"),
        ),
        baseline=FAISS,
        flops=lambda s: 2 * s["N"] * s["M"] * s["D"],
        tolerance=TOLERANCE,
        targets=targets,
    )


def topk_case(d: int, k: int, *, faster: float | None = None) -> Case:
    """1,024 queries; with a first pass in lower precision where the design has a number for it."""
    targets: tuple[Target, ...] = () if faster is None else (Target("topk", "faster", faster, OURS, FAISS),)
    others: tuple[Provider, ...] = ()
    if k == 10:  # where they are best
        others = (
            providers_topk.usearch_exact(),
            providers_topk.hnswlib_brute_force(),
            providers_topk.scikit_brute_force(),
        )
    if (d, k) == (768, 100):
        others = providers_topk.ours(BF16, coarse=torch.bfloat16), providers_topk.ours(INT8, coarse=torch.int8)
        targets += (Target("topk", "faster", 1.8, BF16, FAISS),)
    return search_case("topk", 1024, d, k, *others, targets=targets)


def few_case(n: int, k: int, *targets: Target) -> Case:
    """One query against reading the corpus; a few against faiss, also with BLAS, which it takes for many only."""
    other = providers_topk.read_corpus() if n == 1 else providers_topk.faiss_flat(always_blas=True)
    case = search_case("topk-few", n, 768, k, other, targets=targets)
    return replace(case, measure=("time",))


def filtered_case(n: int, d: int, k: int) -> Case:
    """Hard negatives: no excluded column, none above the positive less 5%; for one query in 32 that drops 10 k."""
    like = search_case("topk-filtered", n, d, k)
    kept = (like.provider(name) for name in (OURS, providers_topk.TORCH, providers.MATMUL))
    return replace(
        like,
        make_inputs=partial(search_with_rules, margin=MARGIN),
        providers=(*kept, providers_topk.faiss_over_fetch(), providers_topk.faiss_selector()),
        baseline=OVER_FETCH,
        targets=(
            Target("topk-filtered", "faster", 1.3, OURS, OVER_FETCH),
            Target("topk-filtered", "starved", 0, OURS),
            Target("topk-filtered", "faster", 8.0, OURS, SELECTOR),
        ),
    )


register(
    topk_case(768, 10),
    topk_case(768, 100, faster=1.05),
    topk_case(768, 1000, faster=1.25),
    topk_case(128, 10),
    topk_case(128, 100, faster=1.25),
    topk_case(128, 1000, faster=2.2),
)
register(
    few_case(1, 100, Target("topk-few", "time", 1 / 0.9, OURS, READ)),
    few_case(16, 100, Target("topk-few", "faster", 2.5, OURS, FAISS)),
    few_case(64, 100, Target("topk-few", "faster", 5.0, OURS, FAISS)),
    *(few_case(n, 10) for n in (1, 16, 64)),
)
register(filtered_case(1024, 768, 100))
