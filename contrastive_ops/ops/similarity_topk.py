"""The k best pairs of every row of a similarity matrix that is never stored."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks, cuda_kernels, extension, triton_kernels
from ..core.backends import Backend, choose, enrol, unsupported_by_cpu
from ..core.declarations import Declaration, Named, Shapes, declare
from ..core.logit_sets import LogitSets, prepare
from ..core.operators import call
from ..core.problem import Layout, Slot
from ..core.results import named
from ..core.rules import STATISTICS, Pairs
from ..core.unit_rows import unit_rows
from ..cuda import _products
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
    checks.check_choice(function, "metric", metric, METRICS)
    if metric == "cosine":
        return unit_rows(x), unit_rows(y)
    if metric == "sqeuclidean":
        dtype = checks.accumulator(x.dtype)
        x, y = x.to(dtype), y.to(dtype)
        return x, y
    return x, y


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
        backend: "auto", "reference", "cpu", "triton" or "cuda". An explicit backend runs or raises.

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

    Example:
        >>> query, corpus = torch.randn(2, 8), torch.randn(50, 8)
        >>> listed = torch.tensor([0, 1, 2]), torch.tensor([7, 9])          # row 0 excludes column 7, row 1 column 9
        >>> found = similarity_topk(query, corpus, 5, metric="cosine", pairs=Pairs(exclude=listed, below=0.9))
        >>> found.indices.shape, bool((found.values <= 0.9).all())
        (torch.Size([2, 5]), True)
    """
    name = "similarity_topk"
    k = checks.integer(name, "k", k, 1)
    x, y = autocast.cast(x, x if y is None else y)
    checks.check_matrices(name, "x", x, "y", y)
    x, y = metric_rows(name, x, y, metric)
    scale = checks.factor(name, "scale", scale)
    arguments: dict[str, Any] = {"scale": scale, "row_bias": row_bias, "col_bias": col_bias, "pairs": pairs}
    arguments.update(metric=metric, backend=backend)  # not |=, which torch 2.6 cannot trace
    if coarse is None:
        return select(x, y, k, **arguments).top
    coarse = coarse if isinstance(coarse, Coarse) else Coarse(coarse)
    with torch.no_grad():
        indices, certified = search(x, y, k, coarse, metric, scale, row_bias, col_bias, pairs, backend)
    values = logits_at(x, y, indices, **arguments)
    return TopK(values, indices, (indices >= 0).sum(1), certified)


def select(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    floor: Tensor | None = None,
    count_above: Tensor | None = None,
    count_pairs: Pairs | None = None,
    code_scale: Tensor | None = None,
    metric: str = "dot",
    names: tuple[str, str, str] = ("similarity_topk", "x", "y"),
    backend: str = "auto",
) -> Selected:
    """`similarity_topk` for mining.

    Args:
        x: (N, D).
        y: (M, D); int8 codes with `code_scale`, then x is float32 or bfloat16.
        k: length of the lists.
        scale: as in `similarity_topk`.
        row_bias: as in `similarity_topk`.
        col_bias: as in `similarity_topk`.
        pairs: as in `similarity_topk`.
        floor: (N,) only scores above this are of interest, such as the last of a list that is known already.
        count_above: (N,) asks for statistics; "higher" counts the columns with a score above this.
        count_pairs: rules that statistics are counted under where they are not `pairs`.
        code_scale: (M,) what one unit of the codes of each column is worth.
        metric: of rows that `metric_rows` made.
        names: the function and the arguments to name in errors.
        backend: as in `similarity_topk`.

    Returns:
        `Selected`; the statistics are (N,) int64: "eligible" columns, those "higher" than `count_above` whatever the
        rules say, and those that each rule drops, whatever the others say.
    """
    function = names[0]
    k = checks.integer(function, "k", k, 1)
    arguments, chosen = _problem(names, x, y, scale, row_bias, col_bias, pairs, count_pairs, code_scale, backend)
    if metric == "sqeuclidean":
        values, indices, counts, statistics = _nearest.select(arguments, k, floor, count_above, chosen)
    else:
        values, indices, counts, statistics = call.similarity_topk_forward(*arguments, k, floor, count_above, chosen)
    by_name = dict(zip(STATISTICS, statistics.unbind(0), strict=True)) if count_above is not None else {}
    return Selected(TopK(values, indices, counts), by_name)


def logits_at(
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    metric: str = "dot",
    names: tuple[str, str, str] = ("similarity_topk", "x", "y"),
    backend: str = "auto",
) -> Tensor:
    """The logits of the columns that each row lists, in the arithmetic of `select`: (N, P), -inf where it lists -1.

    Args:
        x: (N, D). Differentiable.
        y: (M, D). Differentiable.
        indices: (N, P) int64 columns, or -1 for none.
        scale: as in `similarity_topk`.
        row_bias: as in `similarity_topk`.
        col_bias: as in `similarity_topk`.
        pairs: of its rules only `log_weight` matters here: listed pairs are computed whether dropped or not.
        metric: of rows that `metric_rows` made.
        names: the function and the arguments to name in errors.
        backend: as in `similarity_topk`.
    """
    arguments, chosen = _problem(names, x, y, scale, row_bias, col_bias, pairs, None, None, backend)
    if metric == "sqeuclidean":
        return _nearest.logits_at(arguments, indices)
    return call.similarity_topk_at(*arguments, indices, chosen)


def merge(top: TopK, other: TopK, backend: str = "auto") -> TopK:
    """The best of two lists of every row, as long as the first. Not differentiable."""
    functions = BACKENDS[choose("similarity_topk", BACKENDS, top.values, backend)].functions()
    values, indices = functions.merge(top.values, top.indices, other.values, other.indices)
    return TopK(values, indices, (indices >= 0).sum(1))


def order(values: Tensor, indices: Tensor, k: int, backend: str = "auto") -> TopK:
    """The k best of a list of every row that is in no order. Not differentiable."""
    functions = BACKENDS[choose("similarity_topk", BACKENDS, values, backend)].functions()
    values, indices = functions.order(values, indices, k)
    return TopK(values, indices, (indices >= 0).sum(1))


def _problem(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pairs: Pairs | None,
    count_pairs: Pairs | None,
    code_scale: Tensor | None,
    backend: str,
) -> tuple[tuple[object, ...], str]:
    """Return what the operators take, up to `spec`, and the backend."""
    if pairs is not None and pairs.fill is not None:
        raise ValueError(
            f"{names[0]}: pairs.fill must be None, got {pairs.fill}: a constant logit is no reason to select a pair"
        )
    # Codes are checked by who made them; everything else about them is as for rows in the dtype of x.
    like = y if code_scale is None else x.new_zeros(()).expand(y.shape)
    x, like_y, row_bias, col_bias = prepare(names, x, like, row_bias, col_bias, None)
    sets = LogitSets(names, x, like_y)
    sets.add(scale, pairs)
    if count_pairs is not None:
        sets.add(scale, count_pairs)
    if code_scale is not None:
        sets.sets[0].data[Slot.CODE_SCALE] = code_scale
    rules = Layout(tuple(sets.sets), ()).encode()
    arguments = (x, like_y if code_scale is None else y, sets.scale(), row_bias, col_bias, *rules)
    return arguments, choose(names[0], BACKENDS, x, backend)
