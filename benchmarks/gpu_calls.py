"""A few calls of every primitive, forward and backward: what compute-sanitizer watches on a GPU.

    python -m benchmarks.gpu_calls cuda          or: triton; with another device: reference cpu

Sizes are awkward on purpose: no multiple of anything, more than one tile.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import contrastive_ops as co
from benchmarks import measure

N, M, D, E, K = 67, 131, 40, 12, 3


def _matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return torch.nn.functional.normalize(numbers, dim=1).to(like).requires_grad_()


def reduce_folds(like: Tensor, backend: str) -> Tensor:
    """Both directions, several folds, rules."""
    x, y = _matrix(N, D, like), _matrix(M, D, like)
    ids = torch.arange(N, device=like.device), torch.arange(M, device=like.device) // 2
    folds = ("logsumexp", "max", co.Fold("sum_softplus", pairs=co.Pairs(differ=ids, below=0.5)))
    found = co.similarity_reduce(x, y, reduce=folds, dim=(0, 1), scale=5.0, backend=backend)
    return sum(value.float().sum() for value in (*found.rows, *found.cols))


def clip(like: Tensor, backend: str) -> Tensor:
    """The loss that most people come for."""
    return co.clip(_matrix(N, D, like), _matrix(N, D, like), temperature=0.1, normalize=False, backend=backend)


def topk(like: Tensor, backend: str) -> Tensor:
    """Lists longer than a tile is wide, of differentiable values."""
    found = co.similarity_topk(_matrix(N, D, like), _matrix(M, D, like), 50, backend=backend)
    return found.values.float().sum()


def route(like: Tensor, backend: str) -> Tensor:
    """Choices, losses, and the way of rows to experts and back."""
    tokens, logits = _matrix(N, D, like), _matrix(N, E, like)
    routing = co.route(logits, K, capacity=1.0, losses=("switch", "z"), backend=backend)
    rows = co.ops.dispatch(tokens, routing, backend=backend)
    return co.ops.combine(rows, routing, backend=backend).float().sum() + routing.loss


CALLS: dict[str, tuple[str, Callable[[Tensor, str], Tensor]]] = {
    "folds": ("similarity_reduce", reduce_folds),
    "clip": ("similarity_reduce", clip),
    "topk": ("similarity_topk", topk),
    "route": ("expert_routing", route),
}


def main(backend: str, device: str = "cuda") -> int:
    """Makes every call that the backend has; returns the exit status."""
    made = 0
    for name, (stem, call) in CALLS.items():
        table = importlib.import_module(f"contrastive_ops.ops.{stem}").BACKENDS
        if backend not in table:
            print(f"{name}: {stem} has no backend {backend!r}")
            continue
        for dtype in (torch.float32, torch.bfloat16):
            call(torch.empty(0, device=device, dtype=dtype), backend).backward()
            measure.synchronise(device)
            print(f"{name}, {dtype}: done", flush=True)
            made += 1
    return int(made == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
