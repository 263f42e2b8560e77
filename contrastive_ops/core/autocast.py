"""Autocast: inputs follow the region as those of a matmul do, statistics never do."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def cast(*tensors: Any) -> Any:
    """Return the tensors in the dtype of the autocast region; float64 and what is no tensor stay as they are."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return tensors
    return tuple(_cast_one(t) for t in tensors)


def _cast_one(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return x
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def disabled(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A region in which operations keep their dtypes: a region stays on inside an operator and in its backward."""
    device = x.device.type if x.device.type in ("cpu", "cuda") else "cpu"
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
