"""The cases of distillation: softmaxes of a student's similarities against those of a teacher of the same dimension.

Student and teacher embed the same pairs, which lie in clusters; the student's rows are noisier than the teacher's, so
that the divergence is that of a training that has come some way.
"""

from __future__ import annotations

import torch

from benchmarks import providers_distillation as providers
from benchmarks.inputs import taught_inputs
from benchmarks.providers import MATMUL
from benchmarks.providers_distillation import EAGER, NO_CACHE, OPEN_CLIP
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Target, register
from benchmarks.truth import distillation_truth


def distillation_inputs(case: Case) -> Inputs:
    """Images and texts of student and teacher, with one temperature."""
    return taught_inputs(case, ("image", "text"), cosine=0.6, teacher_cosine=0.8, constants={"scale": 20.0})


def distillation_case(n: int, d: int) -> Case:
    """Both directions: the products of student and teacher in forward and again in backward, and two gradients."""
    return Case(
        op="similarity_distillation",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=distillation_inputs,
        truth=distillation_truth,
        providers=(
            providers.ours(),
            providers.ours(NO_CACHE, memory_budget=0),
            providers.eager(),
            providers.open_clip(),
            providers.products(),
        ),
        baseline=EAGER,
        flops=lambda s: 12 * s["N"] ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(
            Target("distillation", "time", 1.2, NO_CACHE, MATMUL),
            Target("distillation-dense", "faster", 1.3, OURS, EAGER),
            Target("distillation-dense", "faster", 1.3, OURS, OPEN_CLIP),
            Target("distillation-dense", "memory", 1 / 20, NO_CACHE, EAGER),
        ),
    )


register(distillation_case(4096, 512))
