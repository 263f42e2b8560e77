"""The cases of the sigmoid family: siglip.

A row's loss is a sum over all columns, so the bias has to fall as their number grows: scale 50 and
bias -15 leave a loss of about 1 at 8192 columns of dimension 512.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import providers
from benchmarks.inputs import paired_case_inputs
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Target, memory_case, register
from benchmarks.truth import siglip_truth


def siglip_inputs(case: Case) -> Inputs:
    """Unit rows, and a learned scale and bias."""
    return paired_case_inputs(case, ("image", "text"), cosine=0.3, learned={"scale": 50.0, "bias": -15.0})


def narrow_siglip_inputs(case: Case) -> Inputs:
    """The same for few dimensions, where unrelated rows are more alike, and for copies.

    The loss is about 25, because the 31 copies of a row's own text are its negatives.
    """
    return paired_case_inputs(case, ("image", "text"), cosine=0.8, learned={"scale": 20.0, "bias": -16.0})


def siglip_case(n: int, d: int) -> Case:
    """SigLIP with the gradients of scale and bias."""
    peer = "open_clip SigLipLoss"
    return Case(
        op="siglip",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=siglip_inputs,
        truth=siglip_truth,
        providers=(
            providers.ours("siglip"),
            providers.open_clip_siglip(),
            providers.torch_eager("torch eager", providers.eager_siglip),
            providers.torch_eager("torch.compile", providers.eager_siglip, compiled=True),
            providers.matmuls("NT NN TN"),
        ),
        baseline=peer,
        flops=lambda s: 6 * s["N"] ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(Target("siglip", "faster", 2.0, OURS, peer),),
    )


SIGLIP = siglip_case(8192, 512)
NARROW = replace(memory_case("memory-sigmoid", SIGLIP, 65_536, 64), make_inputs=narrow_siglip_inputs)

register(SIGLIP, NARROW)
