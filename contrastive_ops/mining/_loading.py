"""Whether what comes out of a file can be a state: files are cut short, mixed up, and written by others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ._ranges import LAST, Range

PARTS = ("problem", "values", "indices", "covered", "statistics")


def check_parts(function: str, state: object) -> None:
    """A state dict has all of its parts."""
    if not isinstance(state, dict) or any(name not in state for name in PARTS):
        got = f"one with {sorted(state, key=str)}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"{function}: state must be what state_dict returned, with {list(PARTS)}, got {got}")


def loaded(
    function: str, state: dict[str, Any], own: Any, limit: int | None
) -> tuple[Tensor, Tensor, tuple[Range, ...], dict[str, Tensor]]:
    """Values, indices, covered ranges and statistics of a state dict, if they can be those of a state like `own`."""

    def like(name: str, given: object, example: Tensor) -> Tensor:
        if not isinstance(given, Tensor) or given.shape != example.shape or given.dtype != example.dtype:
            got = f"{given.dtype} of {checks.shape(given)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"{function}: {name} of the state must be {example.dtype} of {checks.shape(example)}, got {got}"
            )
        return given.to(example.device)

    values, indices = (like(name, state[name], getattr(own, name)) for name in ("values", "indices"))
    covered = state["covered"]
    count = covered.shape[0] if isinstance(covered, Tensor) and covered.dim() else 0
    ranges = like("covered", covered, torch.empty(count, 2, dtype=torch.int64)).cpu()
    numbers = ranges.flatten()
    last = LAST if limit is None else limit
    if count and (int(numbers[0]) < 0 or bool((numbers[1:] < numbers[:-1]).any()) or last < int(numbers[-1])):
        raise ValueError(
            f"{function}: covered of the state must be ranges in order of the corpus, got {ranges.tolist()}"
        )
    place = torch.searchsorted(ranges[:, 1].contiguous(), indices.cpu().contiguous(), right=True)
    begins = torch.cat([ranges[:, 0], torch.tensor([LAST])])[place]
    if bool(((indices.cpu() != -1) & (indices.cpu() < begins)).any()):
        raise ValueError(f"{function}: indices of the state must be -1 or rows that it has seen, got others")
    given = state["statistics"]
    if not isinstance(given, dict) or any(name not in given for name in own.statistics):
        raise ValueError(f"{function}: statistics of the state must be {sorted(own.statistics)}, got others")
    statistics = {name: like(name, given[name], each) for name, each in own.statistics.items()}
    return values, indices, tuple((begin, end) for begin, end in ranges.tolist()), statistics
