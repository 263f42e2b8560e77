"""NT-Xent: InfoNCE of the rows of two stacked views among each other.

The matrix is symmetric, and only tiles on and above its diagonal are computed. The mirrored ones need the statistics
of every row before the first gradient: 4 N^2 D operations, 3 if products are kept, where N counts both views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..core import checks
from ..core.records import changed
from ..core.rules import Pairs
from . import _arguments
from ._columns import smoothing_share
from ._distances import LOGITS, METRICS, as_products
from ._eager import STACKED, eager_loss, is_off
from ._euclidean import check_plain, euclidean_softmax
from ._hardness import checked_hardness
from ._row_softmax import row_softmax
from ._sweep import Prepared
from ._views import stacked
from .diagnostics import Diagnostics

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.FilteredOptions],
) -> Tensor: ...


@overload
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.FilteredOptions],
) -> tuple[Tensor, Diagnostics]: ...


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    smooth: str = "all",
    hardness: float = 0.0,
    metric: str = "dot",
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """NT-Xent (SimCLR): two views of N samples, each must find the other among all 2 N - 1 others.

    Equivalent to::

        z = F.normalize(torch.cat([z0, z1]))                                        # (2 N, D)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        F.cross_entropy(logits, (torch.arange(2 * N) + N) % (2 * N))

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.5.
        scale: 1 / temperature instead; not both.
        pairs: which of the other rows are negatives: ids of false negatives, bounds on the similarity, a guide, ...
            Vectors of rows have 2 N entries, those of z0 first: ``differ=(ids.repeat(2), ids.repeat(2))``. The other
            view always takes part, and a row itself never. A row without negatives has loss 0.
        col_bias: (2 N,), added to the logits of each row as a column, positives included; differentiable.
        label_smoothing: share of the target distribution that is spread evenly over all columns that take part; a
            float, or (2 N,) with a share for each row, differentiable.
        smooth: "all" columns share it, the other view too, or the "others" alone.
        hardness: bonus of each negative's logit, ``hardness`` times its similarity, which is not differentiated: what
            is close counts more. Not with label smoothing, nor with a ``col_bias`` that requires a gradient.
        metric: "dot": inner products, cosines where rows are normalised. "sqeuclidean": minus the squared distances, of
            the normalised rows unless ``normalize=False``, in the dtype of sums; bounds of ``pairs`` and diagnostics
            are of that. It takes twice as long. "euclidean": minus the distances, of which a mean or a sum with a
            constant ``weight``, and no other option, is formed in 24 N^2 D operations; differentiable once.
        weight: (N,) weight of each sample, or (2 N,) of each row; the mean divides by its sum. Differentiable.
            0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does; O(N D).
        diagnostics: also return `Diagnostics` (accuracy, ranks, mean similarities) from the same sweep.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton", "cuda" or "hopper"; as in `similarity_reduce`.

    Returns:
        0-d, or (2 N,) for ``reduction="none"`` (first the rows of ``z0``), in float32 (float64 for float64 inputs);
        with ``diagnostics`` the pair (loss, Diagnostics). Never negative without label smoothing.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. The similarity matrix is symmetric and only its tiles on and above
        the diagonal are computed: half the work.

    Source:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020.

    Examples:
        >>> z0, z1 = torch.randn(4, 16), torch.randn(4, 16)
        >>> nt_xent(z0, z1, reduction="none").shape
        torch.Size([8])
    """
    plain = pairs is None and col_bias is None and weight is None and metric == "dot" and diagnostics is False
    loss = None
    if plain and smooth == "all" and is_off(label_smoothing, hardness):
        loss = eager_loss(
            "softmax",
            STACKED,
            z0,
            z1,
            temperature=temperature,
            scale=scale,
            default_temperature=0.5,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
    if loss is not None:
        return loss
    given: dict[str, Any] = {"temperature": temperature, "scale": scale, "pairs": pairs, "col_bias": col_bias}
    given.update(label_smoothing=label_smoothing, smooth=smooth, hardness=hardness, weight=weight, reduction=reduction)
    given.update(
        normalize=normalize, metric=metric, diagnostics=diagnostics, memory_budget=memory_budget, backend=backend
    )
    checks.check_choice("nt_xent", "metric", metric, LOGITS)
    if metric != "euclidean":
        return prepared_nt_xent(z0, z1, **given).loss()
    off = ("pairs", "col_bias", "label_smoothing", "smooth", "hardness", "diagnostics")
    check_plain("nt_xent", reduction, **{each: given[each] for each in off})
    return euclidean_softmax(prepared_nt_xent(z0, z1, **{**given, "metric": "dot"}))


def prepared_nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    label_smoothing: float | Tensor,
    smooth: str,
    hardness: float,
    diagnostics: bool,
    metric: str,
    shifted: bool = True,
    **shared: Any,
) -> Prepared:
    """`nt_xent`, checked; all of its options are given, and whether distances are of rows less a common one."""
    name = "nt_xent"
    checks.check_choice(name, "metric", metric, METRICS)
    views = stacked(name, z0, z1, 0.5, **shared)
    share = smoothing_share(name, _arguments.of_weighted(views.weight, label_smoothing), "z0", views.z, smooth)
    options: dict[str, Any] = {
        "target": None,
        "share": share,
        "smooth": smooth,
        "hardness": checked_hardness(name, hardness, views.sweep.scale, share, views.sweep.col_bias),
        "weight": views.weight,
        "reduction": shared["reduction"],
        "diagnostics": diagnostics,
    }
    if metric == "dot":
        return Prepared(row_softmax, views.sweep, views.z, None, options)
    # Rows and columns are not alike, and no half of the matrix is the mirror of the other.
    x, y = as_products([views.z], [views.z], views.sweep.unit, shifted)
    sweep = changed(views.sweep, unit=False)
    return Prepared(row_softmax, sweep, x, y, {**options, "target": views.partner})
