"""The cases of late interaction: all scores of queries and documents in tokens, forward and backward.

Unit tokens in clusters, each query token a view of a token of its document; the second case has documents of many
lengths, padded to the longest.
"""

from __future__ import annotations

import torch

from benchmarks import providers_late_interaction as providers
from benchmarks.inputs import token_inputs
from benchmarks.providers_late_interaction import EINSUM
from benchmarks.registry import OURS, TOLERANCE, Case, Provider, Target, register
from benchmarks.truth import maxsim_truth


def maxsim_case(op: str, n: int, m: int, *others: Provider, targets: tuple[Target, ...] = ()) -> Case:
    """n queries of 32 tokens, m documents of up to 180, as ColBERT has them."""
    return Case(
        op=op,
        shapes={"N": n, "A": 32, "M": m, "B": 180, "D": 128},
        dtype=torch.float32,
        make_inputs=lambda case: token_inputs(case, ragged=op == "maxsim-ragged"),
        truth=maxsim_truth,
        providers=(providers.ours(), *others, providers.einsum(), providers.products()),
        baseline=EINSUM,
        flops=lambda s: 2 * s["N"] * s["A"] * s["M"] * s["B"] * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=targets,
    )


TARGETS = (Target("maxsim", "faster", 3.0, OURS, EINSUM), Target("maxsim", "memory", 1 / 20, OURS, EINSUM))

register(
    maxsim_case("maxsim", 64, 1024, providers.late_interaction_kernels(), targets=TARGETS),
    maxsim_case("maxsim-ragged", 64, 512, providers.ours_packed()),
)
