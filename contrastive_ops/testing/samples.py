"""Sample inputs, error measures and tolerances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.records import changed
from ..core.rules import Pairs
from .dense import dense_reduce

# Added to twice the error of plain torch in the same dtype. float32 sums of M terms lose a few units in the last
# place; 16-bit gradients are rounded once on output.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Bound on the relative error (2-norm) of a 16-bit gradient, whatever torch's own error is.
GRADIENT_ERROR_16_BIT = 5e-3


def weight_error(dtype: torch.dtype, lse: float) -> float:
    """Bound on the relative error of the weights of a row, all alike, where a logsumexp is as large as that.

    Half a unit in the last place is its own, and half of one that of logits, which may all be equal. Gradients may be
    off by as much of the terms that they are sums of.
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps * lse


def sum_error(dtype: torch.dtype, terms: int) -> float:
    """What a sum of so many terms, one after the other, may be off by; above `TOLERANCE` from some 600 on.

    Twice the usual: squares of bfloat16 numbers leave one remainder more often than others, and round alike.
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps * terms**0.5


def relative_error(value: Tensor, truth: Tensor) -> float:
    """2-norm of the difference relative to the truth; inf where the two differ in what is not finite."""
    value, truth = value.detach().double(), truth.detach().double()
    if value.shape != truth.shape:
        raise ValueError(f"relative_error: shapes must be equal, got {tuple(value.shape)} and {tuple(truth.shape)}")
    finite = truth.isfinite()
    same = torch.equal(value.isfinite(), finite) and torch.equal(
        value[~finite].nan_to_num(nan=7.0), truth[~finite].nan_to_num(nan=7.0)
    )
    if not same:
        return float("inf")
    difference, size = (value - truth)[finite].norm().item(), truth[finite].norm().item()
    return difference / size if size > 0 else difference


@dataclass
class Problem:
    """Inputs of one similarity_reduce call."""

    x: Tensor
    y: Tensor | None = None
    scale: Tensor | float = 1.0
    row_bias: Tensor | None = None
    col_bias: Tensor | None = None
    target: Tensor | None = None
    diagonal: int | None = None

    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are taken for."""
        fields = (self.x, self.y, self.scale, self.row_bias, self.col_bias)
        return [t for t in fields if isinstance(t, Tensor) and t.requires_grad]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers as leaves of another dtype."""

        def convert(t: Tensor | float | None) -> Tensor | float | None:
            return t.detach().to(dtype).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

        converted = {name: convert(getattr(self, name)) for name in ("x", "y", "scale", "row_bias", "col_bias")}
        return changed(self, **converted)


def sample_problem(
    rows: int,
    columns: int,
    depth: int,
    *,
    dtype: torch.dtype = torch.float32,
    self_similarity: bool = False,
    per_row_scale: bool = True,
    biases: bool = True,
    target: bool = True,
    diagonal: int | None = None,
    seed: int = 0,
) -> Problem:
    """Random inputs with everything that `similarity_reduce` takes, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, low_precision: bool = False) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        kind = dtype if low_precision else torch.float64 if dtype == torch.float64 else torch.float32
        return values.to(kind).requires_grad_()

    x = random(rows, depth, low_precision=True)
    y = None if self_similarity else random(columns, depth, low_precision=True)
    columns = rows if self_similarity else columns
    column = (torch.arange(rows) * 7 + 1 + (diagonal or 0)) % max(columns, 1)
    scale = random(rows) if per_row_scale else random(1).detach().squeeze(0).requires_grad_()
    return Problem(
        x=x,
        y=y,
        scale=scale,
        row_bias=random(rows) if biases else None,
        col_bias=random(columns) if biases else None,
        target=column if target and columns else None,
        diagonal=diagonal,
    )


def dense(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row lse, column lse and target logits in plain torch, in the dtype of the inputs, N x M and all."""
    p = problem
    reduced = dense_reduce(
        p.x,
        p.y,
        dim=(0, 1),
        scale=p.scale,
        row_bias=p.row_bias,
        col_bias=p.col_bias,
        target=p.target,
        pairs=Pairs(diagonal=p.diagonal),
    )
    return reduced.rows[0], reduced.cols[0], reduced.target  # type: ignore[index]


def clustered_pairs(
    rows: int, depth: int, loss: float, *, dtype: torch.dtype, scale: float = 50.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit rows (query, key) whose InfoNCE loss is about `loss`, with negatives in clusters of eight.

    Clusters keep some negatives close to the positive, which is what makes gradients near convergence hard: the softmax
    of the positive is close to 1 and `lse - logit` cancels.
    """
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn((rows + 7) // 8, depth, generator=generator, dtype=torch.float64).repeat_interleave(8, 0)[
        :rows
    ]
    own = torch.randn(rows, depth, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, depth, generator=generator, dtype=torch.float64)

    def build(spread: float) -> tuple[Tensor, Tensor, float]:
        key = normalize(center + spread * own, dim=1)
        query = normalize(key + 0.3 * noise / depth**0.5, dim=1)
        value = torch.nn.functional.cross_entropy(scale * query @ key.T, torch.arange(rows)).item()
        return query, key, value

    low, high = 0.0, 4.0  # the wider a cluster, the smaller the loss
    for _ in range(40):
        middle = (low + high) / 2
        query, key, value = build(middle)
        low, high = (middle, high) if value > loss else (low, middle)
    return query.to(dtype), key.to(dtype)
