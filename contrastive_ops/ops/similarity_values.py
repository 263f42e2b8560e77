"""Sum values, weighted by the softmax of each row of a similarity matrix that is not stored."""

from __future__ import annotations

import functools

from torch import Tensor

from ..core import autocast, checks, extension, triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend, choose, enrol, unsupported_by_cpu
from ..core.declarations import Declaration, Named, declare
from ..core.operators import call
from ..core.problem import LogitSets, Problem, SetFold
from ..core.rules import Pairs, Slot
from ..reference import similarity_values as reference
from ._idle_rows import clean_rows, cleaned_values
from .similarity_reduce import KEEP_FROM_DIMENSION, budget_bytes, needs_gradient

# One hop to every implementation; each offers forward and backward with the same arguments.
BACKENDS = enrol(
    "similarity_values",
    {
        "reference": Backend(
            source="contrastive_ops/reference/similarity_values.py",
            functions=lambda: reference,
            unsupported=lambda x: [],
        ),
        "cpu": Backend(
            source="csrc/cpu/similarity_values.cpp",
            functions=functools.cache(lambda: extension.functions("similarity_values")),
            unsupported=unsupported_by_cpu,
            keeps=True,
        ),
        "triton": Backend(
            source="kernels/similarity_values.py",
            functions=functools.cache(lambda: triton_kernels.functions("similarity_values")),
            unsupported=triton_kernels.unsupported,
            by_name=NEVER_ON_A_DEVICE,
        ),
    },
)


def _clean(given: Named, backward: bool) -> Named:
    """And the values of columns that take part in no pair, which forward multiplies by 0 too."""
    matrices = (given[name] for name in ("values", "x", "y", "pair_data", "spec"))
    return {"values": cleaned_values(*matrices), **clean_rows(given, backward)}


# `lse` is not differentiated: neither it nor the sums count as inputs of the derivative.
declare(
    Declaration(
        "similarity_values",
        takes="Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor values, Tensor[] pair_data,"
        " SymInt[] spec, SymInt kept_size",
        differentiable=6,
        returns="Tensor sums, Tensor lse, Tensor kept",
        reads="x y scale row_bias col_bias values pair_data spec sums lse d_sums kept",
        shapes=lambda given: (
            (given["x"].shape[0], given["values"].shape[1]),
            (given["x"].shape[0],),
            (given["kept_size"],),
        ),
        reference=reference,
        value=lambda *problem: reference.weighted_sums(*problem)[0],
        clean=_clean,
    ),
    BACKENDS,
)


def similarity_values(
    x: Tensor,
    y: Tensor | None = None,
    values: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    col_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum the values of all columns, weighted by each row's softmax: soft assignment to a codebook, soft retrieval.

    Equivalent to::

        logits = (scale * x @ y.T + col_bias).masked_fill(~keep, -torch.inf)       # (N, M), in float32
        logits.softmax(1) @ values                                                 # (N, V)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64. Differentiable, as all that follow.
        y: (M, D) of the same dtype, such as the entries of a codebook; None for y = x.
        values: (M, V); None for ``values=y``. Where its dtype is another one, all are multiplied in float32 (in float64
            for a float64 x).
        scale: float, 0-d tensor, or (N,) with one scale per row.
        col_bias: (M,) added to the logits of each column.
        pairs: which pairs take part. `fill` is refused.
        memory_budget: bytes of inner products to keep between forward and backward, so that backward need not compute
            them again; 0 keeps none. None: 128 MiB. Does not change results. Of use to "cpu".
        backend: "auto", "reference", "cpu" or "triton", which "auto" does not take. An explicit backend runs or raises.

    Returns:
        (N, V) float32 (float64 for float64 inputs). A row in which no pair takes part is 0 with gradient 0. NaN
        propagates.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Memory: O((N + M) (D + V)), the inner products of 512 rows and ``memory_budget``; never N x M. Work:
        2 N M (D + V) forward, and 6 N M D + 4 N M V backward, less 2 N M D where they are kept. The weights of a
        gradient are p (t - mean), with t the product of the upstream gradient and the values, formed in float32 before
        they are rounded for a product; that of a column with nearly all of its row's weight is minus the sum of the
        others, so that rows that are decided have no gradient, whatever the scale. Processors that multiply bfloat16
        (AVX-512-BF16, AMX) round the weights of bfloat16 inputs before they are multiplied, each by 2^-9 at most, and
        divide by the sum of what was rounded. Results are bitwise the same for any
        number of threads. Differentiable twice; the second derivative runs on the reference backend.

        By squared distances, which assign to the nearest entry: ``scale=2 / temperature`` and
        ``col_bias=-y.square().sum(1) / temperature``, of rows less a common one where they lie far from the origin.

    Source:
        The soft assignment with which a vector quantizer is trained: Agustsson et al., Soft-to-Hard Vector Quantization
        for End-to-End Learning Compressible Representations, 2017.

    Examples:
        >>> x, codebook = torch.randn(5, 4), torch.randn(7, 4)
        >>> assigned = (2.0 * x @ codebook.T).softmax(1) @ codebook
        >>> torch.allclose(similarity_values(x, codebook, scale=2.0), assigned, atol=1e-5)
        True
    """
    name = "similarity_values"
    (values,) = autocast.cast(values)
    problem = Problem.of((name, "x", "y"), x, y, None, col_bias)
    values = problem.columns if values is None else values
    _check_values(name, values, "x" if y is None else "y", problem.columns)
    if values.dtype != problem.x.dtype:
        problem, values = problem.wide(), values.to(checks.accumulator(problem.x.dtype))
    x, y = problem.x, problem.columns
    sets = LogitSets(problem)
    sets.add(scale, pairs)
    if Slot.FILL in sets.sets[0].data:
        raise NotImplementedError(
            f"{name}: pairs.fill must be None, got one\n  give the column a bias, or leave it out"
        )
    _, _, factor, *biases = sets.arguments()
    budget = budget_bytes(name, memory_budget, x.device.type)
    chosen = choose(name, BACKENDS, x, backend)
    kept_size = 0
    if x.shape[1] >= KEEP_FROM_DIMENSION and BACKENDS[chosen].keeps and needs_gradient(x, y, factor, *biases, values):
        whole = (x.shape[0] + 32) * (y.shape[0] + 128)  # tiles are padded
        kept_size = min(budget // checks.accumulator(x.dtype).itemsize, whole)
    rules = sets.layout(SetFold(0, "logsumexp", False)).encode()
    sums, _, _ = call.similarity_values_forward(x, y, factor, *biases, values, *rules, kept_size, chosen)
    return sums


def _check_values(function: str, values: Tensor, y_name: str, y: Tensor) -> None:
    checks.check_matrix(function, "values", values)
    checks.check_device(function, y_name, y, "values", values)
    if values.shape[0] != y.shape[0]:
        raise ValueError(
            f"{function}: values must have as many rows as {y_name}, "
            f"got {y_name} {checks.shape(y)} and values {checks.shape(values)}"
        )
