"""The cases of Sinkhorn-Knopp's plan of a large matrix, and of the measures of a large evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks import providers_metrics as providers
from benchmarks.inputs import views_of_things
from benchmarks.providers_metrics import EAGER, EPSILON, ITERATIONS, PYTREC_EVAL
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Outcome, Target, register

JUDGED, DOCUMENTS = 20, 100_003


def sinkhorn_inputs(case: Case) -> Inputs:
    """Cosines of rows with prototypes that lie near some of them."""
    n, m = case.shapes["N"], case.shapes["M"]
    rows, near = views_of_things(max(n, m), 64, cosine=0.8)
    return Inputs({"scores": (rows[:n] @ near[:m].T).to(case.device, case.dtype)})


def sinkhorn_truth(inputs: Inputs) -> Outcome:
    """The plan, by the definition, and the sum of its squares."""
    plan = (inputs.tensors["scores"].double() / EPSILON).exp()
    for _ in range(ITERATIONS):
        plan = plan / plan.sum(0) * (plan.shape[0] / plan.shape[1])
        plan = plan / plan.sum(1, keepdim=True)
    return Outcome(plan.square().sum(), {"plan": plan})


def sinkhorn_case(n: int, m: int) -> Case:
    """One exponential, and a product and a sum of each half of an iteration."""
    return Case(
        op="sinkhorn",
        shapes={"N": n, "M": m},
        dtype=torch.float32,
        make_inputs=sinkhorn_inputs,
        truth=sinkhorn_truth,
        providers=(providers.our_sinkhorn(), providers.eager_sinkhorn(), providers.read_scores()),
        baseline=EAGER,
        flops=lambda s: 4 * ITERATIONS * s["N"] * s["M"],
        tolerance=TOLERANCE[torch.float32],
        targets=(Target("sinkhorn", "faster", 1.0, OURS, EAGER),),
    )


def evaluation_inputs(case: Case) -> Inputs:
    """The documents that were found for each query, and grades of some of them and of others."""
    n, k = case.shapes["N"], case.shapes["K"]
    generator = torch.Generator().manual_seed(0)
    step, first = (torch.randint(1, DOCUMENTS, (n, 1), generator=generator) for _ in range(2))
    found = (first + step * torch.arange(k)) % DOCUMENTS  # each once, since that is a prime
    half = JUDGED // 2
    seen = found.gather(1, torch.rand(n, k, generator=generator).topk(half, dim=1).indices)
    # Others are judged once, too.
    unseen = DOCUMENTS + torch.arange(JUDGED - half).expand(n, -1)
    grades = torch.randint(4, (n, JUDGED), generator=generator)
    grades[:, 0] = 1
    return Inputs({}, frozen={"found": found, "judged": torch.cat([seen, unseen], 1), "grades": grades})


def evaluation_truth(inputs: Inputs) -> Outcome:
    """Four measures by their definitions, from the places of what was judged."""
    found, judged, grades = (inputs.frozen[name] for name in ("found", "judged", "grades"))
    parts = [_gains(*part) for part in zip(found.split(256), judged.split(256), grades.split(256), strict=True)]
    gains = torch.cat(parts)
    ranks = torch.arange(1, gains.shape[1] + 1, dtype=torch.float64)
    relevant, best = gains > 0, grades.double().sort(1, descending=True).values
    number = (grades > 0).sum(1)
    discounts = 1 / (ranks + 1).log2()
    precision = relevant.cumsum(1) / ranks
    measures = {
        "ndcg@10": (gains * discounts)[:, :10].sum(1) / (best[:, :10] * discounts[:10]).sum(1),
        "precision@10": relevant[:, :10].sum(1) / 10,
        "recall@100": relevant[:, :100].sum(1) / number,
        "map@1000": (precision * relevant).sum(1) / number,
    }
    return Outcome(measures["ndcg@10"].mean(), measures)


def _gains(found: Tensor, judged: Tensor, grades: Tensor) -> Tensor:
    """(n, K) the grade of each document that was found."""
    return ((found[:, :, None] == judged[:, None]) * grades[:, None].double()).sum(2)


def evaluation_case(n: int, k: int) -> Case:
    """A sort of each list."""
    return Case(
        op="retrieval_metrics",
        shapes={"N": n, "K": k},
        dtype=torch.float32,
        make_inputs=evaluation_inputs,
        truth=evaluation_truth,
        providers=(providers.our_measures(), providers.pytrec_eval(), providers.read_found()),
        baseline=PYTREC_EVAL,
        flops=lambda s: s["N"] * s["K"] * math.log2(s["K"]),
        tolerance=TOLERANCE[torch.float32],
        measure=("time",),
        targets=(Target("retrieval_metrics", "faster", 10.0, OURS, PYTREC_EVAL),),
    )


register(sinkhorn_case(4096, 3000))
register(evaluation_case(10_000, 1000))
