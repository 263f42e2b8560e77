"""The k best pairs of every row of a similarity matrix that is never stored."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks, cuda_kernels, extension, triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend, choose, enrol, unsupported_by_cpu
from ..core.declarations import Declaration, Named, Shapes, declare
from ..core.operators import call
from ..core.problem import LogitSets, Problem
from ..core.results import named
from ..core.rules import STATISTICS, Pairs, Slot
from ..core.unit_rows import unit_rows
from ..cuda import _products, hopper_topk
from ..reference import similarity_topk as reference
from . import _nearest
from .coarse import Coarse, search

# One hop to every implementation; each offers forward, at, backward, merge and order with the same arguments.
BACKENDS = enrol(
    "similarity_topk",
    {
        "reference": Backend(
            source="contrastive_ops/reference/similarity_topk.py",
            functions=lambda: reference,
            unsupported=lambda x: [],
        ),
        "cpu": Backend(
            source="csrc/cpu/similarity_topk.cpp",
            functions=functools.cache(lambda: extension.functions("similarity_topk")),
            unsupported=unsupported_by_cpu,
        ),
        "triton": Backend(
            source="kernels/similarity_topk.py",
            functions=functools.cache(lambda: triton_kernels.functions("similarity_topk")),
            unsupported=triton_kernels.unsupported,
        ),
        "cuda": Backend(
            source="csrc/cuda/similarity_topk.cu",
            functions=functools.cache(lambda: cuda_kernels.functions("similarity_topk")),
            unsupported=lambda x: [*cuda_kernels.unsupported(x), *_products.unsupported(x)],
        ),
        "hopper": Backend(
            source="csrc/cuda/hopper/topk.cu",
            functions=functools.cache(lambda: cuda_kernels.functions("hopper_topk")),
            unsupported=hopper_topk.unsupported,
            no_room=hopper_topk.no_room,
            by_name=NEVER_ON_A_DEVICE,
        ),
    },
)


def _shapes(given: Named) -> Shapes:
    rows, k = given["x"].shape[0], given["k"]
    return (rows, k), (rows, k), (rows,), (0 if given["count_above"] is None else len(STATISTICS), rows)


_PROBLEM = "Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor[] pair_data, SymInt[] spec"
_READS = "x y scale row_bias col_bias pair_data spec indices d_values"

# `forward` selects, `at` computes the logits of listed pairs; the selection itself is not differentiated. Both have the
# same derivative, that of the logits that `indices` names.
declare(
    Declaration(
        "similarity_topk",
        takes=f"{_PROBLEM}, SymInt k, Tensor? floor, Tensor? count_above",
        differentiable=5,
        returns="Tensor values, Tensor indices, Tensor counts, Tensor statistics",
        reads=_READS,
        shapes=_shapes,
        dtypes=dict.fromkeys(("indices", "counts", "statistics"), torch.int64),
        reference=reference,
    ),
    BACKENDS,
)
declare(
    Declaration(
        "similarity_topk",
        takes=f"{_PROBLEM}, Tensor indices",
        differentiable=5,
        returns="Tensor values",
        reads=_READS,
        shapes=lambda given: [given["indices"].shape],
        reference=reference,
    ),
    BACKENDS,
    "at",
)
_nearest.register(BACKENDS)

METRICS = ("dot", "cosine", "sqeuclidean")


@named
class TopK(NamedTuple):
    """The best columns of every row, best first.

    Attributes:
        values: (N, k) their scores, -inf where there are fewer; float32 (float64 for float64 inputs).
        indices: (N, k) int64 their columns, -1 where there are fewer.
        counts: (N,) int64, how many there are.
        certified: (N,) bool where a coarse pass was asked for: it proved that this row's list is that of the full
            precision.
    """

    values: Tensor
    indices: Tensor
    counts: Tensor
    certified: Tensor | None = None


class Selected(NamedTuple):
    """What `select` returns to mining: a `TopK`, and numbers over all columns by name, where asked for."""

    top: TopK
    statistics: dict[str, Tensor]


def metric_rows(function: str, x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Rows as `select` and `logits_at` take them with this metric: of length 1 for the cosine."""
    if metric == "dot":
        return x, y
    checks.check_choice(function, "metric", metric, METRICS)
    if metric == "cosine":
        return unit_rows(x), unit_rows(y)
    dtype = checks.accumulator(x.dtype)
    return x.to(dtype), y.to(dtype)


def similarity_topk(
    x: Tensor,
    y: Tensor | None = None,
    k: int | None = None,
    *,
    metric: str = "dot",
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    coarse: torch.dtype | Coarse | None = None,
    backend: str = "auto",
) -> TopK:
    """Find the k best columns of every row of a similarity matrix, without storing the matrix.

    Equivalent to::

        scores = scale * (x @ y.T) + row_bias[:, None] + col_bias         # (N, M), in float32
        scores = scores.masked_fill(~keep, -torch.inf)                    # the rules of Pairs
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        values, indices = values[:, :k], indices[:, :k]

    The rules decide *inside* the selection: a row returns its k best columns that take part wherever there are so many,
    and nothing is fetched in excess and filtered later.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D) of the same dtype; None for y = x, where ``Pairs(diagonal=0)`` leaves out each row itself.
        k: length of the lists, which must be given; more than M is allowed.
        metric: the similarity: "dot" <x, y>; "cosine", of rows that are scaled to length 1 first; "sqeuclidean", minus
            the squared distance. Bounds of `pairs` apply to it. Squared distances are sums of squared differences, in
            float32 for 16-bit rows: equal rows are at 0, wherever the rows lie.
        scale: float, 0-d tensor, or (N,) tensor with one scale per row. Differentiable.
        row_bias: (N,) added to the scores of each row. Differentiable.
        col_bias: (M,) added to the scores of each column. Differentiable.
        pairs: which pairs take part; all rules but `fill`.
        coarse: torch.bfloat16 or torch.int8 make a first pass in that precision, after which scores are computed again
            from x and y; `Coarse.of(y, dtype)` rounds a corpus once for many calls. The lists are those of the full
            precision, and `TopK.certified` says for which rows the first pass was enough.
        backend: "auto", "reference", "cpu", "triton", "cuda" or "hopper". An explicit backend runs or raises. "hopper"
            is for 16-bit rows on GPUs of compute capability 9.0 and lists that are much shorter than there are columns,
            and taken by name only: it has not run on a device.

    Returns:
        `TopK` (values (N, k), indices (N, k), counts (N,), certified). Order: score descending, then index ascending,
        so that equal scores never depend on the backend, the batch, the number of threads or the order of shards. Where
        fewer than k columns take part the rest is -inf and -1. A score of NaN or -inf takes no part, and so never
        displaces a number.

    Raises:
        ValueError: shapes, devices or values that do not fit, k below 1.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Memory: O(N k + D) and a few MiB of tiles; never N x M. The values are differentiable in x, y, scale and biases,
        twice; which columns were selected is not. Backward costs O(N k D). A rule that drops nearly everything costs no
        more than one that drops nothing.

    Examples:
        >>> query, corpus = torch.randn(2, 8), torch.randn(50, 8)
        >>> listed = torch.tensor([0, 1, 2]), torch.tensor([7, 9])          # row 0 excludes column 7, row 1 column 9
        >>> found = similarity_topk(query, corpus, 5, metric="cosine", pairs=Pairs(exclude=listed, below=0.9))
        >>> found.indices.shape, bool((found.values <= 0.9).all())
        (torch.Size([2, 5]), True)
    """
    name = "similarity_topk"
    if type(k) is not int or k < 1:
        k = checks.integer(name, "k", k, 1)
    problem = Problem.of((name, "x", "y"), x, x if y is None else y, row_bias, col_bias)
    if metric != "dot":
        problem.x, problem.y = metric_rows(name, problem.x, problem.columns, metric)
    if coarse is None:
        return select(problem, k, scale=scale, pairs=pairs, metric=metric, backend=backend).top
    coarse = coarse if isinstance(coarse, Coarse) else Coarse(coarse)
    scale = checks.factor(name, "scale", scale)
    with torch.no_grad():
        indices, certified = search(problem, k, coarse, metric, scale, pairs, backend)
    values = logits_at(problem, indices, scale=scale, pairs=pairs, metric=metric, backend=backend)
    return TopK(values, indices, (indices >= 0).sum(1), certified)


def select(
    problem: Problem,
    k: int,
    *,
    scale: float | Tensor = 1.0,
    pairs: Pairs | None = None,
    floor: Tensor | None = None,
    count_above: Tensor | None = None,
    count_pairs: Pairs | None = None,
    code_scale: Tensor | None = None,
    metric: str = "dot",
    backend: str = "auto",
) -> Selected:
    """`similarity_topk` of matrices that were checked, with what mining asks for.

    Args:
        problem: of rows that `metric_rows` made; y may be int8 codes with `code_scale`, then x is float32 or bfloat16.
        k: length of the lists.
        scale: as in `similarity_topk`.
        pairs: as in `similarity_topk`.
        floor: (N,) only scores above this are of interest, such as the last of a list that is known already.
        count_above: (N,) asks for statistics; "higher" counts the columns with a score above this.
        count_pairs: rules that statistics are counted under where they are not `pairs`.
        code_scale: (M,) what one unit of the codes of each column is worth.
        metric: as in `similarity_topk`.
        backend: as in `similarity_topk`.

    Returns:
        `Selected`; the statistics are (N,) int64: "eligible" columns, those "higher" than `count_above` whatever the
        rules say, and those that each rule drops, whatever the others say.
    """
    sets = _sets(problem, scale, pairs)
    if count_pairs is not None:
        sets.add(scale, count_pairs)
    if code_scale is not None:
        sets.sets[0].data[Slot.CODE_SCALE] = code_scale
    layout = sets.layout()
    arguments = (*sets.arguments(), *layout.encode())
    asked = hopper_topk.Asked(layout, problem.columns.shape[0], k, count_above is not None)
    chosen = choose(problem.names[0], BACKENDS, problem.x, backend, asked)
    found = _nearest.select if metric == "sqeuclidean" else call.similarity_topk_forward
    values, indices, counts, statistics = found(*arguments, k, floor, count_above, chosen)
    by_name = {} if count_above is None else dict(zip(STATISTICS, statistics.unbind(0), strict=True))
    return Selected(TopK(values, indices, counts), by_name)


def logits_at(
    problem: Problem,
    indices: Tensor,
    *,
    scale: float | Tensor = 1.0,
    pairs: Pairs | None = None,
    metric: str = "dot",
    backend: str = "auto",
) -> Tensor:
    """The logits of the columns that each row lists, in the arithmetic of `select`: (N, P), -inf where it lists -1.

    Args:
        problem: of rows that `metric_rows` made. Differentiable.
        indices: (N, P) int64 columns, or -1 for none.
        scale: as in `similarity_topk`.
        pairs: of its rules only `log_weight` matters here: listed pairs are computed whether dropped or not.
        metric: as in `similarity_topk`.
        backend: as in `similarity_topk`.
    """
    sets = _sets(problem, scale, pairs)
    arguments = (*sets.arguments(), *sets.layout().encode())
    chosen = choose(problem.names[0], BACKENDS, problem.x, backend)
    if metric == "sqeuclidean":
        return _nearest.logits_at(arguments, indices)
    return call.similarity_topk_at(*arguments, indices, chosen)


def merge(top: TopK, other: TopK, backend: str = "auto") -> TopK:
    """The best of two lists of every row, as long as the first. Not differentiable."""
    functions = BACKENDS[choose("similarity_topk", BACKENDS, top.values[:0], backend)].functions()
    values, indices = functions.merge(top.values, top.indices, other.values, other.indices)
    return TopK(values, indices, (indices >= 0).sum(1))


def order(values: Tensor, indices: Tensor, k: int, backend: str = "auto") -> TopK:
    """The k best of a list of every row that is in no order. Not differentiable."""
    functions = BACKENDS[choose("similarity_topk", BACKENDS, values[:0], backend)].functions()
    values, indices = functions.order(values, indices, k)
    return TopK(values, indices, (indices >= 0).sum(1))


def _sets(problem: Problem, scale: float | Tensor, pairs: Pairs | None) -> LogitSets:
    if pairs is not None and pairs.fill is not None:
        raise ValueError(
            f"{problem.names[0]}: pairs.fill must be None, got {pairs.fill}: a constant logit is no reason to select a "
            "pair"
        )
    sets = LogitSets(problem)
    sets.add(scale, pairs)
    return sets
