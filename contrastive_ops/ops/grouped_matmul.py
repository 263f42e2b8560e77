"""Rows in groups, each group times a matrix of its own: the layers of experts.

Two operators are each other's derivatives, so that any order of differentiation runs on the same two kernels:
`forward`, rows times the matrix of their group, and `outer`, the sums of outer products over each group. The rows of
`a` in both are those of a matrix, or with `slots` and `order` of a `Routing` those of its tokens, read where they are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..core import autocast, checks, extension, triton_kernels
from ..core.backends import Backend, choose, enrol, unsupported_by_cpu
from ..core.operators import call, define
from ..reference import grouped_matmul as reference
from .expert_routing import Routing, check_rows

# One hop to every implementation; each offers forward and outer with the same arguments.
BACKENDS = enrol(
    "grouped_matmul",
    {
        "reference": Backend(
            source="contrastive_ops/reference/grouped_matmul.py",
            functions=lambda: reference,
            unsupported=lambda a: [],
        ),
        "cpu": Backend(
            source="csrc/cpu/grouped_matmul.cpp",
            functions=functools.cache(lambda: extension.functions("grouped_matmul")),
            unsupported=unsupported_by_cpu,
        ),
        "triton": Backend(
            source="kernels/grouped_matmul.py",
            functions=functools.cache(lambda: triton_kernels.functions("grouped_matmul")),
            unsupported=triton_kernels.unsupported,
        ),
    },
)


def grouped_matmul(
    a: Tensor, b: Tensor, offsets: Tensor | Routing, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Multiply every row by the matrix of its group.

    Equivalent to::

        if isinstance(offsets, Routing):                                  # a are tokens
            a, offsets = dispatch(a, offsets), offsets.offsets            # of which no copy is made
        out = torch.zeros(R, F)
        for e in range(E):
            rows = slice(offsets[e], offsets[e + 1])
            out[rows] = a[rows] @ b[e] + bias[e]                          # accumulated in float32

    Rows outside ``[offsets[0], offsets[E])``, such as the padding of a batch, are never read: they are exactly zero in
    the output and in the gradient of `a`, and whatever they hold, NaN included, reaches no other result.

    Args:
        a: (R, D) rows, those of one group in succession, or the tokens (T, D) of a routing; float32, bfloat16, float16
            or float64.
        b: (E, D, F) one matrix per group, of the same dtype. Experts stored as (E, F, D) are passed as
            ``weight.transpose(1, 2)``, which is not copied.
        offsets: (E + 1,) int64, ascending within [0, R]: group e is the rows offsets[e] to offsets[e + 1]. Or a
            `Routing`, of which every row reads its token; the output is in the layout of `dispatch`.
        bias: (E, F) added to the rows of each group, of the same dtype; None for none.
        backend: "auto", "reference", "cpu" or "triton". An explicit backend runs or raises.

    Returns:
        (R, F) in the dtype of `a`: sums in float32 (float64 for float64), rounded once.

    Raises:
        ValueError: shapes, devices, offsets or a routing that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Differentiable in a, b and bias, any number of times. A group without rows has a gradient of exactly zero, and
        the gradient of a token is summed in the order of its choices, in float32. The same bits in every run and for
        any number of threads. Work: 2 R D F operations, and twice as many in backward. Memory: the output and a few MiB
        per thread, never the dispatched rows of a routing; kept for backward are `a` where `b` needs a gradient, so
        tokens and not rows, and `b` where `a` does.

    Examples:
        >>> tokens, experts = torch.randn(10, 8), torch.randn(3, 8, 16)
        >>> out = grouped_matmul(tokens, experts, torch.tensor([0, 4, 4, 9]))      # 4, 0 and 5 rows; row 9 is padding
        >>> out.shape, bool((out[9] == 0).all())
        (torch.Size([10, 16]), True)
        >>> from contrastive_ops import route
        >>> routing = route(torch.randn(10, 3), k=2)
        >>> grouped_matmul(tokens, experts, routing).shape                         # two rows of every token
        torch.Size([20, 16])
    """
    name = "grouped_matmul"
    a, b, bias = autocast.cast(a, b, bias)
    checks.check_matrix(name, "a", a)
    slots = order = None
    if isinstance(offsets, Routing):
        check_rows(name, "a", a, offsets.slots.shape[0], offsets)
        slots, order, offsets = offsets.slots, offsets.order, offsets.offsets
    offsets = checks.as_index(name, "offsets", offsets)
    _check(name, a, b, offsets, bias, a.shape[0] if order is None else order.shape[0])
    backend = choose(name, BACKENDS, a, backend)
    return call.grouped_matmul_forward(a, b, offsets, bias, slots, order, backend)


def _check(function: str, a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, rows: int) -> None:
    _check_like(function, "b", b, a)
    if b.dim() != 3 or b.shape[1] != a.shape[1]:
        raise ValueError(
            f"{function}: b must have shape (E, {a.shape[1]}, F) for a {checks.shape(a)}, got {checks.shape(b)}\n"
            "  weights stored as (E, F, D) are passed as weight.transpose(1, 2)"
        )
    groups, columns = b.shape[0], b.shape[2]
    if bias is not None:
        _check_like(function, "bias", bias, a)
        if bias.dim() != 2 or bias.shape[0] != groups or bias.shape[1] != columns:
            raise ValueError(f"{function}: bias must have shape ({groups}, {columns}), got {checks.shape(bias)}")
    checks.check_index(function, "offsets", offsets, groups + 1, "a", a)
    # Only what is at hand is read: not a traced tensor, and not one on a GPU, which every call would have to wait for.
    if offsets.device.type == "cpu" and checks.may_read(offsets):
        _check_offsets(function, checks.numbers_in(offsets), rows)


def _check_like(function: str, name: str, x: object, a: Tensor) -> None:
    x = checks.check_tensor(function, name, x)
    if x.dtype != a.dtype:
        raise TypeError(
            f"{function}: {name} must have the same dtype as a, got a {a.dtype} and {name} {x.dtype}\n"
            "  convert one of them, or use torch.autocast"
        )
    checks.check_device(function, "a", a, name, x)


def _check_offsets(function: str, offsets: list[int], rows: int) -> None:
    last = 0
    for e, offset in enumerate(offsets):
        if not last <= offset <= rows:
            raise ValueError(
                f"{function}: offsets must ascend within [0, {rows}], got {offset} at index {e}"
                + (f" after {last}" if offset < last and e > 0 else "")
            )
        last = offset


# ---- Operators -------------------------------------------------------------------------------------------------------


def _forward(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    order: Tensor | None,
    backend: str,
) -> Tensor:
    with autocast.disabled(a):
        return BACKENDS[backend].functions().forward(a, b, offsets, bias, slots, order)


def _forward_fake(a: Tensor, b: Tensor, offsets: Any, bias: Any, slots: Any, order: Any, backend: str) -> Tensor:
    return a.new_empty((a.shape[0] if order is None else order.shape[0], b.shape[2]))


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offsets, _, slots, order, ctx.backend = inputs
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.transposed = b.stride(1) == 1 and b.stride(2) != 1
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, offsets, slots, order)


def _forward_derivative(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets, slots, order = ctx.saved_tensors
    needs_a, needs_b, _, needs_bias, *_ = ctx.needs_input_grad
    da = db = dbias = None
    if needs_a:
        da = _through_matrices(g, b, offsets, slots, order, ctx.backend)
    if needs_b or needs_bias:
        # The sums of g alone read no a.
        rows = (a, g, offsets, slots, order) if needs_b else (g, g, offsets, None, None)
        # In the layout of b, or adding it to the gradient of (E, F, D) weights would copy it.
        db, dbias = call.grouped_matmul_outer(*rows, ctx.transposed, needs_b, needs_bias, ctx.backend)
    return da, db if needs_b else None, None, dbias if needs_bias else None, None, None, None


def _through_matrices(
    g: Tensor, b: Tensor, offsets: Tensor, slots: Tensor | None, order: Tensor | None, backend: str
) -> Tensor:
    """Gradient of `a`: that of its rows, summed over those of each token."""
    operators = call
    rows = operators.grouped_matmul_forward(g, b.transpose(1, 2), offsets, None, None, None, backend)
    return rows if order is None else operators.expert_routing_combine(rows, None, slots, order, backend)


def _outer(
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    slots: Tensor | None,
    order: Tensor | None,
    transposed: bool,
    wants_b: bool,
    wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with autocast.disabled(a):
        functions = BACKENDS[backend].functions()
        return functions.outer(a, g, offsets, slots, order, transposed, wants_b, wants_bias)


def _outer_fake(
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    slots: Any,
    order: Any,
    transposed: bool,
    wants_b: bool,
    wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    groups, depth, columns = offsets.shape[0] - 1, a.shape[1], g.shape[1]
    matrices = groups if wants_b else 0
    return (
        a.new_empty((matrices, columns, depth)).transpose(1, 2)
        if transposed
        else a.new_empty((matrices, depth, columns)),
        a.new_empty((groups if wants_bias else 0, columns)),
    )


def _outer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, g, offsets, slots, order, _, ctx.wants_b, ctx.wants_bias, ctx.backend = inputs
    ctx.save_for_backward(a, g, offsets, slots, order)
    ctx.set_materialize_grads(False)


def _outer_derivative(ctx: Any, d_db: Tensor | None, d_dbias: Tensor | None) -> tuple[Tensor | None, ...]:
    a, g, offsets, slots, order = ctx.saved_tensors
    needs_a, needs_g = ctx.needs_input_grad[:2]
    forward = call.grouped_matmul_forward
    # An output that was not asked for is empty, and so is its gradient.
    d_db = d_db if ctx.wants_b else None
    d_dbias = d_dbias if ctx.wants_bias else None
    da = dg = None
    if needs_a and d_db is not None:
        da = _through_matrices(g, d_db, offsets, slots, order, ctx.backend)
    if needs_g and d_db is not None:
        dg = forward(a, d_db, offsets, d_dbias, slots, order, ctx.backend)
    elif needs_g and d_dbias is not None:
        no_depth = d_dbias.new_empty((d_dbias.shape[0], 0, d_dbias.shape[1]))
        dg = forward(g[:, :0], no_depth, offsets, d_dbias, None, None, ctx.backend)
    return da, dg, *(None,) * 7


define(
    "grouped_matmul_forward",
    "(Tensor a, Tensor b, Tensor offsets, Tensor? bias, Tensor? slots, Tensor? order, str backend) -> Tensor",
    _forward,
    _forward_fake,
    _forward_setup,
    _forward_derivative,
)
define(
    "grouped_matmul_outer",
    "(Tensor a, Tensor g, Tensor offsets, Tensor? slots, Tensor? order, bool transposed, bool wants_b, bool wants_bias,"
    " str backend) -> (Tensor db, Tensor dbias)",
    _outer,
    _outer_fake,
    _outer_setup,
    _outer_derivative,
)
