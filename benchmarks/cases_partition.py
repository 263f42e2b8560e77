"""The cases of losses whose denominator joins several blocks of similarities: gte and gist.

Scale 20 and temperature 0.05 are those of sentence embeddings. A joint partition with all four
directions counts the positive twice, so that a loss of log 2 is converged.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import providers
from benchmarks.inputs import GUIDE_DIM, guide_embeddings, paired_case_inputs
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Target, register
from benchmarks.truth import gist_truth, gte_truth


def gte_inputs(case: Case) -> Inputs:
    """Rows of different lengths, which the loss normalises."""
    return paired_case_inputs(case, ("query", "document"), cosine=0.5, constants={"scale": 20.0}, unit=False)


def gist_inputs(case: Case) -> Inputs:
    """The same, with the embeddings of a guide that drops about one pair in a hundred."""
    constants = {"temperature": 0.05, "margin": 0.1}
    inputs = paired_case_inputs(case, ("query", "key"), cosine=0.5, constants=constants, unit=False)
    return replace(inputs, frozen=guide_embeddings(case, ("guide_query", "guide_key"), cosine=0.5))


def gte_case(n: int, d: int) -> Case:
    """GTE in all four directions: 4 M^2 D with M = 2 n, the self-similarity of queries and documents."""
    peer = "sentence-transformers GTE"
    return Case(
        op="gte",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=gte_inputs,
        truth=gte_truth,
        providers=(
            providers.ours("gte"),
            providers.sentence_transformers_gte(),
            providers.torch_eager("torch eager", providers.eager_gte),
            providers.torch_eager("torch.compile", providers.eager_gte, compiled=True),
            providers.matmuls("NT NN", self_similarity=True),
        ),
        baseline=peer,
        flops=lambda s: 4 * (2 * s["N"]) ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(Target("gte", "faster", 3.0, OURS, peer),),
    )


def gist_case(n: int, d: int) -> Case:
    """GISTEmbed with both contrasts: the products of gte, and half of the guide's similarities, twice."""
    peer, dense = "sentence-transformers CachedGIST", "torch eager"
    return Case(
        op="gist",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=gist_inputs,
        truth=gist_truth,
        providers=(
            providers.ours("gist"),
            providers.sentence_transformers_gist(),
            providers.torch_eager(dense, providers.eager_gist),
            providers.torch_eager("torch.compile", providers.eager_gist, compiled=True),
            providers.matmuls("NT GG NN", self_similarity=True),
        ),
        baseline=peer,
        flops=lambda s: (2 * s["N"]) ** 2 * (4 * s["D"] + 2 * GUIDE_DIM),
        tolerance=TOLERANCE[torch.float32],
        targets=(
            Target("gist", "faster", 300.0, OURS, peer),
            Target("gist", "faster", 1.5, OURS, dense),
        ),
    )


register(gte_case(2048, 512), gist_case(1024, 256))
