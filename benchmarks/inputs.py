"""Embeddings that look like those of a model in training, made from a fixed seed.

Independent normal vectors would not do: at D=512 their similarities are all near zero, the loss is
log N, every softmax weight is the same, and rounding errors have nothing to act on. Here the pairs
of a batch are correlated and negatives come in clusters, so the loss lies between 0.3 and 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case, Inputs

CLUSTER_SIZE = 64


def _unit_rows(n: int, d: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=generator), dim=1)


def paired_embeddings(n: int, d: int, *, cosine: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views (n, d) of n things, float32 with unit rows.

    Args:
        n: rows of each view.
        d: dimension.
        cosine: mean similarity of the two views of one thing; members of one cluster, of about 64,
            have a third of it.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    clusters = max(1, n // CLUSTER_SIZE)
    centres = _unit_rows(clusters, d, generator)
    labels = torch.randint(clusters, (n,), generator=generator)
    shared = (1 / 3) ** 0.5 * centres[labels] + (2 / 3) ** 0.5 * _unit_rows(n, d, generator)
    views = []
    for _ in range(2):
        noise = _unit_rows(n, d, generator)
        views.append(F.normalize(cosine**0.5 * shared + (1 - cosine) ** 0.5 * noise, dim=1))
    return views[0], views[1]


def paired_case_inputs(
    case: Case,
    names: tuple[str, str],
    *,
    cosine: float,
    learned: dict[str, float] | None = None,
    constants: dict[str, float] | None = None,
    unit: bool = True,
) -> Inputs:
    """The two views under the case's argument names, in its dtype, on its device.

    Args:
        case: gives N, D, dtype, device and copies.
        names: argument names of the two views.
        cosine: see :func:`paired_embeddings`.
        learned: numbers that training learns (a scale): 0-d float32 tensors with a gradient.
        constants: numbers that it does not.
        unit: False gives rows of different lengths, for losses that normalise themselves.
    """
    n, d = case.shapes["N"], case.shapes["D"]
    if n % case.copies:
        raise ValueError(f"N must be a multiple of copies, got {n} and {case.copies}")
    views = paired_embeddings(n // case.copies, d, cosine=cosine)
    tensors: dict[str, Tensor] = {}
    for name, view in zip(names, views, strict=True):
        if not unit:
            view = view * torch.linspace(0.5, 2.0, len(view))[:, None]
        tensors[name] = view.repeat(case.copies, 1).to(case.device, case.dtype)
    for name, value in (learned or {}).items():
        tensors[name] = torch.tensor(value, device=case.device)
    return Inputs(tensors, dict(constants or {}), case.copies)
