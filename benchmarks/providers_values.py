"""Who sums values by the softmax of similarities: this package, plain torch, torch's attention of one head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import MATMUL, differentiate
from benchmarks.registry import OURS, Inputs, Provider, Step

NO_CACHE = f"{OURS} memory_budget=0"
EAGER = "torch eager"
SDPA = "torch scaled_dot_product_attention"


def _step(inputs: Inputs, sums_of: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Step:
    """``sums_of(x, y, values, scale)``, differentiated by all three with the inputs' gradient from above."""
    upstream, scale = inputs.frozen["upstream"], inputs.constants["scale"]

    def loss_of(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        return (sums_of(x, y, values, scale) * upstream).sum()

    return differentiate(loss_of, inputs.tensors)


def ours(name: str = OURS, memory_budget: int | None = None) -> Provider:
    """``contrastive_ops.ops.similarity_values``."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.ops import similarity_values

        return _step(
            inputs,
            lambda x, y, values, scale: similarity_values(x, y, values, scale=scale, memory_budget=memory_budget),
        )

    return Provider(name, build, kind="ours", package="contrastive_ops")


def eager() -> Provider:
    """The formula in torch."""

    def sums_of(x: Tensor, y: Tensor, values: Tensor, scale: float) -> Tensor:
        return (scale * x @ y.T).softmax(1) @ values

    return Provider(EAGER, lambda inputs: _step(inputs, sums_of), kind="torch")


def attention() -> Provider:
    """Attention of one head over one sequence, where rows are queries and entries are keys."""

    def sums_of(x: Tensor, y: Tensor, values: Tensor, scale: float) -> Tensor:
        sides = (t[None, None] for t in (x, y, values))
        return F.scaled_dot_product_attention(*sides, scale=scale)[0, 0]

    return Provider(SDPA, lambda inputs: _step(inputs, sums_of), kind="torch")


def products() -> Provider:
    """The products alone through ``torch.mm``: logits twice, sums, the gradient of the weights, three gradients."""

    def build(inputs: Inputs) -> Step:
        x, y, values = (inputs.tensors[name] for name in ("x", "y", "values"))
        upstream = inputs.frozen["upstream"]
        logits, sums, dx, dy = x.new_empty(len(x), len(y)), *map(torch.empty_like, (x, x, y))

        def step() -> None:
            for left, right in ((x, y), (x, y), (upstream, values)):
                torch.mm(left, right.T, out=logits)
            for right, to in ((values, sums), (y, dx)):
                torch.mm(logits, right, out=to)
            for left in (x, upstream):
                torch.mm(logits.T, left, out=dy)

        return step

    return Provider(MATMUL, build, kind="matmul")
