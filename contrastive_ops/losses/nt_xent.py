"""NT-Xent: InfoNCE of the rows of two stacked views among each other.

The matrix is symmetric, and only tiles on and above its diagonal are computed. The mirrored ones need the statistics
of every row before the first gradient: 4 N^2 D operations, 3 if products are kept, where N counts both views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.rules import Pairs
from ..ops.similarity_loss import similarity_loss
from . import _arguments
from ._eager import STACKED, eager_loss

if TYPE_CHECKING:
    pass  # comes with torch


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """NT-Xent (SimCLR): two views of N samples, each must find the other among all 2 N - 1 others.

    Equivalent to::

        z = F.normalize(torch.cat([z0, z1]))                                        # (2 N, D)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        F.cross_entropy(logits, (torch.arange(2 * N) + N) % (2 * N))

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.5.
        scale: 1 / temperature instead; not both.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does; O(N D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"`` (first the rows of ``z0``), in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. The similarity matrix is symmetric and only its tiles on and above
        the diagonal are computed: half the work.

    Source:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020.

    Example:
        >>> z0, z1 = torch.randn(4, 16), torch.randn(4, 16)
        >>> nt_xent(z0, z1, reduction="none").shape
        torch.Size([8])
    """
    name = "nt_xent"
    loss = eager_loss(
        "softmax",
        STACKED,
        z0,
        z1,
        temperature=temperature,
        scale=scale,
        default_temperature=0.5,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )
    if loss is not None:
        return loss
    z0, z1, scale = _arguments.two_sides(
        name,
        (("z0", z0), ("z1", z1)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.5,
        reduction=reduction,
        normalize=normalize,
        partners=True,
    )
    z = torch.cat([z0, z1])
    return similarity_loss(
        z,
        scale=scale,
        pairs=Pairs(diagonal=0),
        reduction=reduction,
        unit=_arguments.in_sweep(normalize, z),
        memory_budget=memory_budget,
        names=(name, "z0", "z1"),
        backend=backend,
    )
