"""Whether an answer is as near to the truth as the contract asks: one table of tolerances, `testing.TOLERANCE`.

    |ours - truth| <= 2 |torch in the same precision - truth| + tolerance

relative to the truth. Torch is asked a few times, for numbers that differ in their last digit: one answer may be exact
by chance. A gradient that is a sum over results of random weights may be small by chance: then errors are relative to
the usual size of such a sum. Weights of rows of large logits have an error of their own, `testing.weight_error`,
and so have long sums, `testing.sum_error`. Differences below the smallest normal number are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from similarity_cases import leaves, mapped
from torch import Tensor

from contrastive_ops.testing import TOLERANCE, sum_error, weight_error

DOUBLE = torch.float64
# Gradients that are this small next to results over inputs are what rounding leaves of 0.
SMALL = 0.1
DRAWS = 3
WEIGHTS = 8  # how many random weights of results are drawn for the usual size of a gradient


class Difference(AssertionError):
    """An answer that is not the truth."""


@dataclass
class Call:
    """One call with its inputs, and the same in plain torch.

    Attributes:
        inputs: tensors and numbers in dicts, tuples and dataclasses; `ours` and `dense` take them and return tensors.
            Results of integers must be equal, the others near, as must their gradients.
        finite: whether gradients are compared; not of numbers that are NaN or infinite.
        size: of what results are differences of, where those may be next to nothing.
        lse: how large a logsumexp of logits may be.
        length: of an input, next to which gradients are as large as `size` over it.
        rounds: weights of 16-bit inputs may be rounded as their gradients are, so results are judged alike.
    """

    inputs: Any
    ours: Callable[[Any], Sequence[Tensor]]
    dense: Callable[[Any], Sequence[Tensor]]
    finite: bool = True
    size: float = 0.0
    lse: float = 1.0
    length: Callable[[Tensor], float] = lambda t: size_of([t])
    rounds: bool = False


def converted(tree: Any, dtype: torch.dtype, digits: torch.Generator | None = None) -> Any:
    """Leaves of another dtype; with `digits`, the last digit of float32 is drawn anew."""
    known: dict[int, Tensor] = {}

    def change(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        if id(t) not in known:
            other = t.detach().to(dtype)
            if digits is not None:
                signs = torch.randint(-1, 2, t.shape, generator=digits).to(dtype)
                other = other * (1 + signs * torch.finfo(torch.promote_types(t.dtype, torch.float32)).eps)
            known[id(t)] = other.requires_grad_(t.requires_grad)
        return known[id(t)]

    return mapped(tree, change)


def _answers(function: Callable[[Any], Sequence[Tensor]], inputs: Any, finite: bool, seed: int) -> list[Tensor]:
    """Results, then gradients for random weights of all that are finite."""
    results = list(function(inputs))
    wanted = leaves(inputs)
    floating = [r for r in results if r.is_floating_point()]
    if not (finite and wanted and any(r.requires_grad for r in floating)):
        return [r.detach() for r in results] + [torch.zeros_like(t) for t in (wanted if finite else [])]
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=DOUBLE)
    for r in floating:
        weights = torch.randn(r.shape, generator=generator, dtype=DOUBLE)
        total = total + (torch.where(r.isfinite(), r, 0.0).double() * weights).sum()
    gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    return [r.detach() for r in results] + list(gradients)


def _distance(value: Tensor, truth: Tensor, floor: float) -> float:
    """2-norm of the difference relative to the truth, or to `floor`; inf where they differ in what is not finite."""
    smallest = torch.finfo(torch.promote_types(value.dtype, torch.float32)).tiny
    value, truth = value.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if not torch.equal(value.isfinite(), finite):
        return float("inf")
    # Instructions take what is smaller for 0, or give 0 for it.
    apart = ((value - truth)[finite].abs() - smallest).clamp(min=0)
    difference, size = apart.norm().item(), max(truth[finite].norm().item(), floor)
    return difference / size if size else difference


def judge(call: Call, seed: int) -> int:
    """Raise `Difference` where the call does not give what the dense formula gives; return how many numbers it gave."""
    ours = _answers(call.ours, call.inputs, call.finite, seed)
    truth = _answers(call.dense, converted(call.inputs, DOUBLE), call.finite, seed)
    if len(ours) != len(truth):
        raise Difference(f"{len(ours)} results and gradients instead of {len(truth)}")
    count = len(truth) - (len(leaves(call.inputs)) if call.finite else 0)
    size = max(size_of([t for t in truth[:count] if t.is_floating_point()]), call.size)
    floors = [SMALL * call.size] * count + [SMALL * size / max(call.length(t), 1e-300) for t in leaves(call.inputs)]
    dtypes, longest = _dtypes(call), _longest_row(call)
    others: list[list[Tensor]] = []
    for at, (value, expected, floor) in enumerate(zip(ours, truth, floors[: len(truth)], strict=True)):
        what = f"result {at}" if at < count else f"gradient {at - count}"
        if value.shape != expected.shape:
            raise Difference(f"{what} has shape {tuple(value.shape)} instead of {tuple(expected.shape)}")
        if not expected.is_floating_point():
            if not torch.equal(value.long(), expected.long()):
                raise Difference(f"{what} is {value.tolist()} instead of {expected.tolist()}")
            continue
        error = _distance(value, expected, floor)
        rounded = at >= count or call.rounds
        tolerance = max(TOLERANCE[value.dtype], sum_error(value.dtype, longest))
        if rounded:
            tolerance = max(tolerance, *(TOLERANCE[each] for each in dtypes))
        if error <= tolerance:
            continue
        if at >= count:
            if _distance(value, expected, floor / SMALL) <= weight_error(value.dtype, call.lse):
                continue
            floor = max(floor, _usual_size(call, at, seed))
            error = _distance(value, expected, floor)
        others = others or _in_torch(call, seed)
        # A gradient is rounded to the inputs' precision, and so are what it is a sum of.
        usual = max(_distance(other[at], expected, floor) for other in (others if rounded else others[:DRAWS]))
        if not error <= 2 * usual + tolerance:
            raise Difference(f"{what} ({value.dtype}) is off by {error:.1e}, plain torch by {usual:.1e}")
    return sum(t.numel() for t in truth[:count])


def _usual_size(call: Call, at: int, seed: int) -> float:
    """Of the true gradient, over random weights of results: root of the mean square."""
    draws = range(seed + 1, seed + 1 + WEIGHTS)
    found = [_answers(call.dense, converted(call.inputs, DOUBLE), call.finite, each)[at] for each in draws]
    return size_of(found) / WEIGHTS**0.5


def size_of(tensors: Sequence[Tensor]) -> float:
    """2-norm of all finite numbers."""
    return sum(t.detach().double().nan_to_num(0.0, 0.0, 0.0).square().sum().item() for t in tensors) ** 0.5


def _dtypes(call: Call) -> set[torch.dtype]:
    """Of all numbers that a call is given."""
    found: set[torch.dtype] = set()
    mapped(call.inputs, lambda t: found.add(t.dtype) if t.is_floating_point() else None)
    return found


def _longest_row(call: Call) -> int:
    """The depth of the longest inner product that a call may form."""
    found = [1]
    mapped(call.inputs, lambda t: found.append(t.shape[-1]) if t.is_floating_point() and t.dim() > 1 else None)
    return max(found)


def _in_torch(call: Call, seed: int) -> list[list[Tensor]]:
    """What plain torch finds in the precision of sums, a few times, then in that of inputs of 16 bits."""
    dtypes = _dtypes(call)
    dtype = DOUBLE if DOUBLE in dtypes else torch.float32
    generator = torch.Generator().manual_seed(seed)
    draws = [(dtype, None), *[(dtype, generator)] * (DRAWS - 1)]
    draws += [(each, g) for each in dtypes if each.itemsize == 2 for g in (None, *[generator] * (DRAWS - 1))]
    return [_answers(call.dense, converted(call.inputs, each, g), call.finite, seed) for each, g in draws]
