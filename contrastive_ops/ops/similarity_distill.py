"""Compare a student's similarity matrix with a teacher's, neither of which is stored."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypedDict, overload

from torch import Tensor

from ..core import autocast, checks, extension, triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend, choose, enrol, unsupported_by_cpu
from ..core.declarations import Declaration, Named, Shapes, declare
from ..core.folds import Reduced
from ..core.operators import call
from ..core.problem import Layout, LogitSets, Problem
from ..core.rules import Pairs, Slot
from ..reference import similarity_distill as reference
from ._idle_rows import clean_rows
from .similarity_reduce import KEEP_FROM_DIMENSION, budget_bytes, directions, most_kept, needs_gradient

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch

# One hop to every implementation; each offers forward and backward with the same arguments.
BACKENDS = enrol(
    "similarity_distill",
    {
        "reference": Backend(
            source="contrastive_ops/reference/similarity_distill.py",
            functions=lambda: reference,
            unsupported=lambda x: [],
        ),
        "cpu": Backend(
            source="csrc/cpu/similarity_distill.cpp",
            functions=functools.cache(lambda: extension.functions("similarity_distill")),
            unsupported=unsupported_by_cpu,
            keeps=True,
        ),
        "triton": Backend(
            source="kernels/similarity_distill.py",
            functions=functools.cache(lambda: triton_kernels.functions("similarity_distill")),
            unsupported=triton_kernels.unsupported,
            by_name=NEVER_ON_A_DEVICE,
        ),
    },
)


def _shapes(given: Named) -> Shapes:
    by_rows, by_cols = bool(given["dims"] & reference.ROWS), bool(given["dims"] & reference.COLS)
    columns = given["x"] if given["y"] is None else given["y"]
    # No product with a bool, which sizes of torch before 2.7 do not have.
    lines = (given["x"].shape[0] if by_rows else 0) + (columns.shape[0] if by_cols else 0)
    return (lines,), (5, 0 if given["kind"] in reference.PAIRWISE else lines), (given["kept_size"],)


# The teacher is a constant. `statistics` are what backward reads of each row and column. Without y, of both sides, only
# lines of rows, and kinds that have no decided entries.
_SIDE = "Tensor {0}x, Tensor? {0}y, Tensor {0}scale, Tensor? {0}row_bias, Tensor? {0}col_bias"
_NAMES = "{0}x {0}y {0}scale {0}row_bias {0}col_bias"

declare(
    Declaration(
        "similarity_distill",
        takes=f"{_SIDE.format('')}, {_SIDE.format('teacher_')}, Tensor[] pair_data, SymInt[] spec, str kind,"
        " float delta, int dims, SymInt kept_size",
        differentiable=5,
        returns="Tensor values, Tensor statistics, Tensor kept",
        reads=f"{_NAMES.format('')} {_NAMES.format('teacher_')} pair_data spec kind delta dims statistics d_values"
        " kept",
        shapes=_shapes,
        reference=reference,
        value=lambda *problem: reference.values(*problem)[0],
        clean=clean_rows,
    ),
    BACKENDS,
)

DIVERGENCES = ("kl", "reverse_kl", "ce", "js")


class _Options(TypedDict, total=False):
    """Those that do not decide what `similarity_distill` returns."""

    divergence: str
    scale: float | Tensor
    teacher_scale: float | Tensor
    teacher_bias: Tensor | None
    pairs: Pairs | None
    memory_budget: int | None
    backend: str


@overload
def similarity_distill(
    x: Tensor,
    y: Tensor | None,
    teacher_x: Tensor,
    teacher_y: Tensor | None = ...,
    *,
    dim: int = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def similarity_distill(
    x: Tensor,
    y: Tensor | None,
    teacher_x: Tensor,
    teacher_y: Tensor | None = ...,
    *,
    dim: tuple[int, ...],
    **options: Unpack[_Options],
) -> Reduced: ...


def similarity_distill(
    x: Tensor,
    y: Tensor | None,
    teacher_x: Tensor,
    teacher_y: Tensor | None = None,
    *,
    divergence: str = "kl",
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    teacher_scale: float | Tensor = 1.0,
    teacher_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | Reduced:
    """Divergence of each row (or column) softmax of a similarity matrix from that of a teacher's, storing neither.

    Equivalent to::

        s = (scale * x @ y.T).masked_fill(~keep, -torch.inf)                       # (N, M), in float32
        t = teacher_scale * teacher_x @ teacher_y.T + teacher_bias
        q, p = s.log_softmax(dim), t.masked_fill(~keep, -torch.inf).log_softmax(dim)
        kl = (p.exp() * (p - q)).sum(dim)                                          # 0 where both are -inf
        reverse_kl, ce = (q.exp() * (q - p)).sum(dim), (p.exp() * -q).sum(dim)
        js = (kl(p, m) + kl(q, m)) / 2                                             # m.exp() = (p.exp() + q.exp()) / 2

    Args:
        x: (N, D) the student's rows: float32, bfloat16, float16 or float64.
        y: (M, D) of the same dtype; None for y = x, at half the work with ``dim=1`` of "kl" and "ce".
        teacher_x: (N, D') the teacher's rows, with a dimension of its own. A constant. Where its dtype is another one,
            both are multiplied in float32 (in float64 for a float64 student).
        teacher_y: (M, D'); None for ``teacher_x``, where y is None.
        divergence: "kl" of the student from the teacher, "reverse_kl" of the teacher from the student, "ce"
            (cross-entropy with the teacher's probabilities as targets: kl plus their entropy), or "js"
            (Jensen-Shannon, at most log 2).
        dim: 1 compares rows, 0 columns, (0, 1) both from the same products.
        scale: float, 0-d tensor, or (N,) with one scale per row. Differentiable.
        teacher_scale: the teacher's own, in the same forms. A constant.
        teacher_bias: (M,) added to the teacher's logits of each column; -inf takes its probability. A constant.
        pairs: which pairs take part, for student and teacher alike. `log_weight` and `fill` are refused.
        memory_budget: bytes of inner products of both to keep between forward and backward, so that backward need not
            compute them again; 0 keeps none. None: 128 MiB. Does not change results. Of use to "cpu".
        backend: "auto", "reference", "cpu" or "triton", which "auto" does not take. An explicit backend runs or raises.

    Returns:
        (N,) for ``dim=1``, (M,) for ``dim=0``, a `Reduced` with ``rows`` and ``cols`` for both; float32 (float64 for
        float64 inputs). Never negative. A row or column in which no pair takes part, or to all of whose pairs the
        teacher gives -inf, is 0 with gradient 0. "reverse_kl" is inf where the student can pick what the teacher
        excludes. NaN propagates.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Memory: O((N + M) (D + D')) and a few MiB of tiles beside ``memory_budget``; never N x M. Divergences are sums
        of terms that are never negative, so they stay accurate where student and teacher agree, and the difference of
        the probabilities, which is the gradient, is formed in float32 before it is rounded for a product. One sweep
        forward ("js": two) and one backward, with both products in each. Results are bitwise the same for any number
        of threads. Differentiable twice; the second derivative runs on the reference backend.

    Examples:
        >>> x, y, tx, ty = torch.randn(6, 8), torch.randn(5, 8), torch.randn(6, 3), torch.randn(5, 3)
        >>> kl = similarity_distill(x, y, tx, ty, scale=2.0)
        >>> p, q = (tx @ ty.T).log_softmax(1), (2.0 * x @ y.T).log_softmax(1)
        >>> torch.allclose(kl, torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1), atol=1e-5)
        True
    """
    name = "similarity_distill"
    checks.check_choice(name, "divergence", divergence, DIVERGENCES)
    rows, cols = compare(
        Problem.of((name, "x", "y"), x, y),
        teacher_x,
        teacher_y,
        kind=divergence,
        dim=dim,
        scale=scale,
        teacher_scale=teacher_scale,
        teacher_bias=teacher_bias,
        pairs=pairs,
        memory_budget=memory_budget,
        backend=backend,
    )
    if isinstance(dim, int):
        return rows if dim == 1 else cols
    return Reduced(rows=rows if 1 in dim else None, cols=cols if 0 in dim else None)


def compare(
    problem: Problem,
    teacher_x: Tensor,
    teacher_y: Tensor | None,
    *,
    kind: str,
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    teacher_scale: float | Tensor = 1.0,
    teacher_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`similarity_distill` of matrices of a student that were checked: (rows, cols), empty where not asked for."""
    (function, x_name, _), x, y_or_none, y = problem.names, problem.x, problem.y, problem.columns
    by_rows, by_cols = directions(function, dim)
    if teacher_y is not None and y_or_none is None:
        raise ValueError(f"{function}: teacher_y must be None where y is None, got {checks.shape(teacher_y)}")
    teacher_x, teacher_y = autocast.cast(teacher_x, teacher_y)
    teacher_x, teacher_y = teacher_sides(problem.names, x, y, teacher_x, teacher_x if y_or_none is None else teacher_y)
    x, y, teacher_x, teacher_y = common_dtype(x, y, teacher_x, teacher_y)
    sets = LogitSets(Problem(problem.names, x, None if y_or_none is None else y))
    mirrored = y_or_none is None and by_rows and not by_cols and kind not in reference.DECIDES
    sets.add(scale, pairs)
    _check_rules(function, sets)
    teacher = checks.scale_tensor(function, teacher_scale, x_name, x, "teacher_scale").detach()
    if teacher_bias is not None:
        checks.check_vector(function, "teacher_bias", teacher_bias, y.shape[0], x_name, x)
        teacher_bias = teacher_bias.detach().to(teacher.dtype)
    return run(
        (x, None if mirrored else y, *sets.arguments()[2:]),
        (teacher_x, None if mirrored else teacher_y, teacher.reshape(-1), None, teacher_bias),
        sets.layout(),
        kind=kind,
        dims=reference.ROWS * by_rows | reference.COLS * by_cols,
        memory_budget=memory_budget,
        function=function,
        backend=backend,
    )


def run(
    student: tuple[Tensor | None, ...],
    teacher: tuple[Tensor | None, ...],
    layout: Layout,
    *,
    kind: str,
    delta: float = 1.0,
    dims: int = reference.ROWS,
    memory_budget: int | None,
    function: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Call the operator: (rows, cols). Both sides are matrices, scale (a vector) and biases, checked and cast.

    The second matrix of both may be None, where rows are compared with each other by a kind that decides no entry.
    """
    x, y = student[:2]
    budget = budget_bytes(function, memory_budget, x.device.type)  # type: ignore[union-attr]
    chosen = choose(function, BACKENDS, x, backend)  # type: ignore[arg-type]
    keeps = needs_gradient(*student) and BACKENDS[chosen].keeps
    kept_size = _kept_size(x, y, teacher[0], budget) if keeps else 0  # type: ignore[arg-type]
    values, _, _ = call.similarity_distill_forward(
        *student, *teacher, *layout.encode(), kind, delta, dims, kept_size, chosen
    )
    rows = x.shape[0] if dims & reference.ROWS else 0  # type: ignore[union-attr]
    return values[:rows], values[rows:]


# ---- Arguments -------------------------------------------------------------------------------------------------------


def teacher_sides(
    names: tuple[str, str, str], x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the teacher's matrices against the student's; constants, whatever they require."""
    function, *student = names
    if teacher_y is None:
        raise ValueError(f"{function}: teacher_y must be given where {names[2]} is, got None")
    checks.check_matrices(function, "teacher_x", teacher_x, "teacher_y", teacher_y)
    checks.check_device(function, names[1], x, "teacher_x", teacher_x)
    for name, matrix, like_name, like in zip(
        ("teacher_x", "teacher_y"), (teacher_x, teacher_y), student, (x, y), strict=True
    ):
        if matrix.shape[0] != like.shape[0]:
            raise ValueError(
                f"{function}: {name} must have as many rows as {like_name}, "
                f"got {like_name} {checks.shape(like)} and {name} {checks.shape(matrix)}"
            )
    return teacher_x.detach(), teacher_y.detach()


def common_dtype(x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor) -> tuple[Tensor, ...]:
    """Student and teacher in one dtype: the student's, or that of its accumulators where they differ."""
    dtype = x.dtype if teacher_x.dtype == x.dtype else checks.accumulator(x.dtype)
    return tuple(t.to(dtype) for t in (x, y, teacher_x, teacher_y))


def _check_rules(function: str, sets: LogitSets) -> None:
    data = sets.sets[0].data
    for name, slot in (("log_weight", Slot.LOG_WEIGHT), ("fill", Slot.FILL)):
        if slot in data:
            raise NotImplementedError(
                f"{function}: pairs.{name} must be None, got one\n"
                "  a pair takes part for student and teacher alike, or for neither; weigh the teacher by teacher_bias"
            )


def _kept_size(x: Tensor, y: Tensor | None, teacher_x: Tensor, budget: int) -> int:
    """How many inner products forward may keep for backward: as many of the student as of the teacher."""
    if x.shape[1] + teacher_x.shape[1] < 2 * KEEP_FROM_DIMENSION:
        return 0
    return 2 * min(budget // (2 * checks.accumulator(x.dtype).itemsize), most_kept(x, y))
