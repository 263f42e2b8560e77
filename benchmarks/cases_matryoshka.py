"""The cases of Matryoshka losses: the sum over five prefixes of clip and of info_nce, each prefix normalised."""

from __future__ import annotations

import torch

from benchmarks import providers_matryoshka as providers
from benchmarks.inputs import paired_case_inputs
from benchmarks.providers import matmuls
from benchmarks.providers_matryoshka import EAGER, OURS_IN_A_LOOP, TORCH_LOOP
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Provider, Target, register
from benchmarks.truth import matryoshka_truth


def clip_inputs(case: Case) -> Inputs:
    """Rows of different lengths and a learned scale."""
    return paired_case_inputs(case, ("image", "text"), cosine=0.24, learned={"scale": 50.0}, unit=False)


def info_nce_inputs(case: Case) -> Inputs:
    """Rows of different lengths and a fixed scale."""
    return paired_case_inputs(case, ("query", "key"), cosine=0.45, constants={"scale": 20.0}, unit=False)


def matryoshka_case(loss: str, products: str, *others: Provider, targets: tuple[Target, ...] = ()) -> Case:
    """The sum over prefixes of one loss."""
    op = f"matryoshka_{loss}"
    return Case(
        op=op,
        shapes={"N": 4096, "D": 768},
        dtype=torch.float32,
        make_inputs=clip_inputs if loss == "clip" else info_nce_inputs,
        truth=matryoshka_truth,
        providers=(
            providers.ours(op),
            providers.ours_in_a_loop(loss),
            providers.torch_loop(EAGER[loss]),
            providers.torch_loop(EAGER[loss], compiled=True),
            *others,
            matmuls(products),
        ),
        baseline=TORCH_LOOP,
        flops=lambda s: 6 * s["N"] ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=targets,
    )


TARGETS = (
    Target("matryoshka", "faster", 2.5, OURS, TORCH_LOOP),
    Target("matryoshka", "faster", 1.8, OURS, OURS_IN_A_LOOP),
)

register(
    matryoshka_case("clip", "NT NN TN", targets=TARGETS),
    matryoshka_case("info_nce", "NT NN TN", providers.sentence_transformers_loop()),
)
