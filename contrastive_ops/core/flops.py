"""Floating point operations of the operators, for torch.utils.flop_counter and the loggers that are built on it.

Counted is what an operator computes: two operations for each multiply-add of its matrix products, those that backward
computes again included, and not what is done to single logits. Self-similarity without y takes half of a product.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import Any

import torch

_MODULE = "torch.utils.flop_counter"
Shape = Any  # the formulas get the shapes of tensors, and None for no tensor


def _product(x: Shape, y: Shape) -> int:
    """Of the rows of both; half of it where x meets itself."""
    return prod(x) * x[0] if y is None else 2 * prod(x) * y[0]


def _recomputed(x: Shape, y: Shape, kept: Shape) -> int:
    """What is left to compute again of a product of which some numbers were kept."""
    pairs = x[0] * (x[0] + 1) // 2 if y is None else x[0] * y[0]
    return _product(x, y) - 2 * x[1] * min(kept[0], pairs)


def _gradients(x: Shape, y: Shape, needs: int) -> int:
    """The products of weights with the other side; self-similarity has one for both."""
    if y is None:
        return 2 * prod(x) * x[0] * bool(needs & 3)
    return 2 * prod(x) * y[0] * (bool(needs & 1) + bool(needs & 2))


def _reduce(x: Shape, y: Shape, *_: Any, **__: Any) -> int:
    return _product(x, y)


def _reduce_backward(x: Shape, y: Shape, *rest: Any, **__: Any) -> int:
    kept, needs = rest[-3:-1]
    return _recomputed(x, y, kept) + _gradients(x, y, needs)


def _loss(x: Shape, y: Shape, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    # Gradients that forward has not formed are empty.
    formed = sum(1 << bit for bit, shape in enumerate(out_shape[4:6]) if shape[0])
    return _product(x, y) + _gradients(x, y, formed)


def _listed(x: Shape, *rest: Any, **_: Any) -> int:
    return 2 * prod(rest[-2]) * x[1]


def _topk_backward(x: Shape, *rest: Any, **_: Any) -> int:
    indices, needs = rest[-4], rest[-2]
    return 2 * prod(indices) * x[1] * sum(bool(needs >> bit & 1) for bit in range(3))


def _values(x: Shape, y: Shape, _: Any, __: Any, ___: Any, values: Shape, *____: Any, **_____: Any) -> int:
    return _product(x, y) + 2 * x[0] * prod(values)


def _values_backward(x: Shape, y: Shape, _: Any, __: Any, ___: Any, values: Shape, *rest: Any, **____: Any) -> int:
    kept, needs = rest[-3:-1]
    weighted = 2 * x[0] * prod(values)
    return _recomputed(x, y, kept) + _gradients(x, y, needs) + weighted * (1 + bool(needs >> 5 & 1))


def _distill(x: Shape, y: Shape, *rest: Any, **_: Any) -> int:
    return _product(x, y) + _product(rest[3], rest[4])


def _distill_backward(x: Shape, y: Shape, *rest: Any, **_: Any) -> int:
    return _product(x, y) + _product(rest[3], rest[4]) + _gradients(x, y, rest[-2])


def _prefix_sides(x: Shape, y: Shape, dims: Any) -> tuple[Shape, Shape]:
    return (x[0], dims[-1]), None if y is None else (y[0], dims[-1])


def _prefix(x: Shape, y: Shape, *rest: Any, **_: Any) -> int:
    return _product(*_prefix_sides(x, y, rest[4]))


def _prefix_backward(x: Shape, y: Shape, *rest: Any, **_: Any) -> int:
    sides = _prefix_sides(x, y, rest[4])
    return _product(*sides) + _gradients(*sides, rest[-2])


def _maxsim(queries: Shape, documents: Shape, *rest: Any, **_: Any) -> int:
    document_offsets, pairs, longest = rest[1], rest[4], rest[6]
    if pairs is None:
        return _product(queries, documents)
    # Of listed pairs the lengths are not known: documents as long as the mean.
    sets = max(document_offsets[0] - 1, 1)
    return 2 * queries[1] * pairs[0] * longest * documents[0] // sets


def _maxsim_backward(queries: Shape, *rest: Any, **_: Any) -> int:
    winners, needs = rest[-4], rest[-2]
    return 2 * prod(winners) * queries[1] * (bool(needs & 1) + bool(needs & 2))


def _grouped(a: Shape, b: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(out_shape) * b[1]


def _outer(a: Shape, g: Shape, *rest: Any, **_: Any) -> int:
    return 2 * prod(g) * a[1] * bool(rest[4])


def _linear_rows(x: Shape, y: Shape, *rest: Any, **_: Any) -> int:
    qx, qy = rest[3:5]
    return _product(x, y) + (0 if qx is None else _product(qx, qy))


def _linear_rows_backward(x: Shape, y: Shape, *rest: Any, **_: Any) -> int:
    return _linear_rows(x, y, *rest) + _gradients(x, y, rest[-1])


def _pairs(x: Shape, y: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * y[1]


FORMULAS: dict[str, Callable[..., int]] = {
    "similarity_reduce_forward": _reduce,
    "similarity_reduce_backward": _reduce_backward,
    "similarity_loss": _loss,
    "similarity_topk_forward": _reduce,
    "similarity_topk_at": _listed,
    "similarity_topk_backward": _topk_backward,
    "listed_logits": _listed,
    "nearest_columns": _reduce,
    "similarity_values_forward": _values,
    "similarity_values_backward": _values_backward,
    "similarity_distill_forward": _distill,
    "similarity_distill_backward": _distill_backward,
    "similarity_prefix_forward": _prefix,
    "similarity_prefix_backward": _prefix_backward,
    "maxsim_forward": _maxsim,
    "maxsim_backward": _maxsim_backward,
    "grouped_matmul_forward": _grouped,
    "grouped_matmul_outer": _outer,
    "linear_rows_forward": _linear_rows,
    "linear_rows_backward": _linear_rows_backward,
    "pair_similarity": _pairs,
    "scatter_pairs": _pairs,
}


def register(counter: ModuleType) -> None:
    """Give the formulas to torch.utils.flop_counter."""
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.contrastive_ops, name))(formula)


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers when somebody imports the counter, which imports Triton: half a second for who never counts."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def execute(module: ModuleType) -> None:
                run(module)
                register(module)

            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """`register` now or when torch.utils.flop_counter is imported."""
    if _MODULE in sys.modules:
        register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _OnImport())
