"""Who computes what stands on a large softmax: this package and plain torch.

A step is one forward and backward of a mean over all tokens: of the log-probabilities, of these and the entropies, or
of the divergence from a reference model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import differentiate
from benchmarks.registry import OURS, Inputs, Provider, Step

CROSS_ENTROPY = f"{OURS} linear_cross_entropy"
NO_CACHE = f"{OURS} no cache"
EAGER = "torch eager"


def of_tokens(policy: str) -> str:
    """The name of torch's own chunked loss under one policy of precision."""
    return f"torch linear_cross_entropy {policy}"


def _step(name: str, kind: str, loss_of: Callable[[Inputs, Tensor, Tensor], Tensor]) -> Provider:
    def build(inputs: Inputs) -> Step:
        return differentiate(lambda hidden, weight: loss_of(inputs, hidden, weight), inputs.tensors)

    return Provider(name, build, kind=kind, package="contrastive_ops" if kind == "ours" else "torch")


def ours(name: str = OURS, **options: int) -> Provider:
    """The mean of ``contrastive_ops.losses.linear_log_prob``, whose rows any other loss could take."""

    def loss_of(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        from contrastive_ops.losses import linear_log_prob

        return -linear_log_prob(hidden, weight, inputs.frozen["labels"], **options).mean()

    return _step(name, "ours", loss_of)


def ours_of_the_mean() -> Provider:
    """``contrastive_ops.losses.linear_cross_entropy``, which knows in its forward pass that the mean is wanted."""

    def loss_of(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        from contrastive_ops.losses import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, inputs.frozen["labels"])

    return _step(CROSS_ENTROPY, "ours", loss_of)


def linear_cross_entropy(policy: str) -> Provider:
    """torch's ``F.linear_cross_entropy`` in chunks; it has the mean and the sum alone."""

    def build(inputs: Inputs) -> Step:
        options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if options_class is None:
            raise ImportError("torch.nn.LinearCrossEntropyOptions needs torch 2.13 or newer")
        labels, options = inputs.frozen["labels"], options_class(acc_policy=policy)
        return differentiate(
            lambda hidden, weight: F.linear_cross_entropy(hidden, weight, labels, options=options), inputs.tensors
        )

    return Provider(of_tokens(policy), build, kind="torch")


def eager() -> Provider:
    """All logits, in float32."""

    def loss_of(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), inputs.frozen["labels"])

    return _step(EAGER, "torch", loss_of)


def ours_with_entropy() -> Provider:
    """Log-probabilities and entropies of one call."""

    def loss_of(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        from contrastive_ops.losses import linear_log_prob

        found = linear_log_prob(hidden, weight, inputs.frozen["labels"], entropy=True)
        return -(found.log_prob + inputs.constants["share"] * found.entropy).mean()

    return _step(OURS, "ours", loss_of)


def eager_with_entropy() -> Provider:
    """The same from all logits."""

    def loss_of(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        log_prob = F.linear(hidden, weight).float().log_softmax(1)
        selected = log_prob.gather(1, inputs.frozen["labels"][:, None])[:, 0]
        entropy = -(log_prob.exp() * log_prob).sum(1)
        return -(selected + inputs.constants["share"] * entropy).mean()

    return _step(EAGER, "torch", loss_of)


def ours_of_divergence() -> Provider:
    """``contrastive_ops.losses.linear_kl`` from a reference that is not trained."""

    def loss_of(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        from contrastive_ops.losses import linear_kl

        return linear_kl(hidden, weight, inputs.frozen["reference_hidden"], inputs.frozen["reference_weight"]).mean()

    return _step(OURS, "ours", loss_of)


def eager_of_divergence() -> Provider:
    """The same from all logits of both models."""

    def loss_of(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = F.linear(hidden, weight).float().log_softmax(1)
        reference = F.linear(inputs.frozen["reference_hidden"], inputs.frozen["reference_weight"])
        return (log_p.exp() * (log_p - reference.float().log_softmax(1))).sum(1).mean()

    return _step(EAGER, "torch", loss_of)
