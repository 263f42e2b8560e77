"""The cases of a large softmax on top of a linear layer: a vocabulary of 32,000 words, as language models have them.

torch's own chunked loss has the mean and the sum alone and can form its gradients in the forward pass. The
log-probability of each token, which preference and policy losses need, must wait for theirs.
"""

from __future__ import annotations

import torch

from benchmarks import providers_linear_log_prob as linear
from benchmarks.inputs import vocabulary_inputs
from benchmarks.providers import matmuls
from benchmarks.providers_linear_log_prob import CROSS_ENTROPY, EAGER, NO_CACHE
from benchmarks.registry import OURS, TOLERANCE, Case, Target, register
from benchmarks.truth import linear_kl_truth, linear_log_prob_truth


def log_prob_case(t: int, v: int, dtype: torch.dtype) -> Case:
    """The mean over all tokens."""
    auto = linear.of_tokens("auto")
    others = [] if dtype == torch.float32 else [linear.linear_cross_entropy("compact")]
    return Case(
        op="linear_log_prob",
        shapes={"T": t, "V": v, "D": 512},
        dtype=dtype,
        make_inputs=vocabulary_inputs,
        truth=linear_log_prob_truth,
        providers=(
            linear.ours(),
            linear.ours(NO_CACHE, memory_budget=0),
            linear.ours_of_the_mean(),
            linear.linear_cross_entropy("auto"),
            *others,
            linear.eager(),
            matmuls("NT NN TN"),
        ),
        baseline=auto,
        flops=lambda s: 6 * s["T"] * s["V"] * s["D"],
        tolerance=TOLERANCE[dtype],
        targets=(
            Target("linear_log_prob", "faster", 1.0, OURS, auto),
            Target("linear_log_prob", "faster", 1.1, CROSS_ENTROPY, auto),
        ),
    )


def entropy_case() -> Case:
    """Log-probabilities and entropies, as a policy loss with an entropy bonus takes them."""
    return Case(
        op="linear_entropy",
        shapes={"T": 2048, "V": 16_000, "D": 512},
        dtype=torch.float32,
        make_inputs=lambda case: vocabulary_inputs(case, constants={"share": 0.1}),
        truth=linear_log_prob_truth,
        providers=(linear.ours_with_entropy(), linear.eager_with_entropy(), matmuls("NT NN TN")),
        baseline=EAGER,
        flops=lambda s: 6 * s["T"] * s["V"] * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(
            Target("linear_entropy", "faster", 0.9, OURS, EAGER),
            Target("linear_entropy", "memory", 1 / 2, OURS, EAGER),
        ),
    )


def divergence_case() -> Case:
    """The divergence from a reference model over all words, gradients of the policy alone."""
    return Case(
        op="linear_kl",
        shapes={"T": 2048, "V": 16_000, "D": 512},
        dtype=torch.float32,
        make_inputs=lambda case: vocabulary_inputs(case, reference=True),
        truth=linear_kl_truth,
        providers=(linear.ours_of_divergence(), linear.eager_of_divergence(), matmuls("NT NT NN TN")),
        baseline=EAGER,
        flops=lambda s: 8 * s["T"] * s["V"] * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(
            Target("linear_entropy", "faster", 0.7, OURS, EAGER),
            Target("linear_entropy", "memory", 1 / 2, OURS, EAGER),
        ),
    )


register(
    log_prob_case(4096, 32_000, torch.float32),
    # An eighth: without instructions for bfloat16, torch takes minutes for one step of the other.
    log_prob_case(1024, 16_000, torch.bfloat16),
    entropy_case(),
    divergence_case(),
)
