"""CLIP's loss: InfoNCE in both directions of one matrix.

Both directions need the statistics of every column before the first gradient, so products are made again in backward,
or kept: 8 N^2 D operations, 6 if kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..core.rules import Pairs
from . import _arguments
from ._columns import check_filters, smoothing_share
from ._eager import PARTNERS, eager_loss, is_off
from ._row_softmax import both_softmaxes
from ._sweep import Sweep
from .diagnostics import Diagnostics

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def clip(
    image: Tensor, text: Tensor, *, diagnostics: Literal[False] = ..., **options: Unpack[_arguments.FilteredOptions]
) -> Tensor: ...


@overload
def clip(
    image: Tensor, text: Tensor, *, diagnostics: Literal[True], **options: Unpack[_arguments.FilteredOptions]
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


def clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Diagnostics, Diagnostics]]:
    """CLIP's loss: InfoNCE from images to texts and from texts to images, averaged, from one sweep.

    Equivalent to::

        image, text = F.normalize(image), F.normalize(text)
        logits, labels = scale * image @ text.T, torch.arange(N)
        logits = logits.masked_fill(~keep, -torch.inf)                              # the rules of Pairs, not the target
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        pairs: which images and texts are negatives of each other: ids of false negatives, bounds on the similarity, a
            guide, ... An image and its own text always take part.
        col_bias: (N,), added to the logits of each text; differentiable. The softmax of images over texts sees it, that
            of texts over images does not.
        label_smoothing: share of the target distribution that is spread evenly over all columns that take part; a
            float, or (N,) with a share for each pair, differentiable.
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        diagnostics: also return `Diagnostics` of both directions from the same sweep.
        memory_budget: bytes of inner products kept for backward: 0 keeps none (8 N^2 D), 4 N^2 keeps all of them
            (6 N^2 D). None: 128 MiB, on a GPU 1 GiB. Does not change the result.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs); with ``diagnostics`` the pair
        (loss, (Diagnostics of images, Diagnostics of texts)). Never negative without label smoothing.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``.

    Source:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.

    Example:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> cosines = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
        >>> labels = torch.arange(8)
        >>> both = [torch.nn.functional.cross_entropy(each, labels) for each in (10.0 * cosines, 10.0 * cosines.T)]
        >>> torch.allclose(clip(image, text, scale=10.0), sum(both) / 2, rtol=1e-4)
        True
    """
    name, plain = "clip", pairs is None and col_bias is None and diagnostics is False and is_off(label_smoothing)
    loss = None
    if plain:
        loss = eager_loss(
            "softmax_both",
            PARTNERS,
            image,
            text,
            temperature=temperature,
            scale=scale,
            default_temperature=0.07,
            weight=weight,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
    if loss is not None:
        return loss
    image, text, scale = _arguments.two_sides(
        name,
        (("image", image), ("text", text)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
    )
    unit = _arguments.in_sweep(normalize, image)
    check_filters(name, pairs, col_bias, text.shape[0], "image", image)
    share = smoothing_share(name, _arguments.of_weighted(weight, label_smoothing), "image", image)
    sweep = Sweep((name, "image", "text"), scale, pairs, col_bias, unit, memory_budget, backend)
    options: dict[str, Any] = {"share": share, "weight": weight, "reduction": reduction, "diagnostics": diagnostics}
    return both_softmaxes(sweep, image, text, **options)
