"""CLIP's loss: InfoNCE in both directions of one matrix.

Both directions need the statistics of every column before the first gradient, so products are made again in backward,
or kept: 8 N^2 D operations, 6 if kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.records import changed
from ..core.rules import RULES, Pairs
from ..core.rules import given as given_rules
from . import _arguments
from ._columns import check_filters, check_pairs, smoothing_share
from ._distances import LOGITS, METRICS, as_products
from ._eager import PARTNERS, eager_loss, is_off
from ._euclidean import check_plain, euclidean_softmax
from ._hardness import checked_hardness
from ._row_softmax import both_softmaxes, softmaxes_of_blocks
from ._rules import refuse
from ._sweep import Prepared, Sweep
from .diagnostics import Diagnostics

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def clip(
    image: Tensor,
    text: Tensor,
    text_negatives: Tensor | None = ...,
    image_negatives: Tensor | None = ...,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.FilteredOptions],
) -> Tensor: ...


@overload
def clip(
    image: Tensor,
    text: Tensor,
    text_negatives: Tensor | None = ...,
    image_negatives: Tensor | None = ...,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.FilteredOptions],
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


def clip(
    image: Tensor,
    text: Tensor,
    text_negatives: Tensor | None = None,
    image_negatives: Tensor | None = None,
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
) -> Tensor | tuple[Tensor, tuple[Diagnostics, Diagnostics]]:
    """CLIP's loss: InfoNCE from images to texts and from texts to images, averaged, from one sweep.

    Equivalent to::

        image, text = F.normalize(image), F.normalize(text)
        logits, labels = scale * image @ text.T, torch.arange(N)
        logits = logits.masked_fill(~keep, -torch.inf)                              # the rules of Pairs, not the target
        of_images = torch.cat([logits, scale * image @ F.normalize(text_negatives).T], 1)
        of_texts = torch.cat([logits.T, scale * text @ F.normalize(image_negatives).T], 1)
        (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        text_negatives: (K, D), more columns for every image, such as texts with a word changed (NegCLIP). Rows have no
            ids: one that is given twice counts twice.
        image_negatives: (K', D), more columns for every text.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        pairs: which images and texts are negatives of each other: ids of false negatives, bounds on the similarity, a
            guide, ... An image and its own text always take part, and so do all negatives that are given; beside these
            only ``differ`` goes with label smoothing and diagnostics.
        col_bias: (N,), or (N + K,) with ``text_negatives``, added to the logits of each text; differentiable. The
            softmax of images over texts sees it, that of texts over images does not.
        label_smoothing: share of the target distribution that is spread evenly over all columns that take part; a
            float, or (N,) with a share for each pair, differentiable.
        smooth: "all" columns share it, the target too, or the "others" alone.
        hardness: bonus of each negative's logit, ``hardness`` times its similarity, which is not differentiated: what
            is close counts more. Not with label smoothing, nor with a ``col_bias`` that requires a gradient.
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        metric: "dot": inner products, cosines where rows are normalised. "sqeuclidean": minus the squared distances, of
            the normalised rows unless ``normalize=False``, in the dtype of sums; bounds of
            ``pairs`` and diagnostics are of that. "euclidean": minus the distances, of which a mean or a sum with a
            constant ``weight``, and no other option, is formed in 12 N^2 D operations; differentiable once.
        diagnostics: also return `Diagnostics` of both directions from the same sweep.
        memory_budget: bytes of inner products kept for backward: 0 keeps none (8 N^2 D), 4 N^2 keeps all of them
            (6 N^2 D). None: 128 MiB, on a GPU 1 GiB. Does not change the result.
        backend: "auto", "reference", "cpu", "triton", "triton_persistent", "cuda" or "hopper"; as in
            `similarity_reduce`.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs); with ``diagnostics`` the pair
        (loss, (Diagnostics of images, Diagnostics of texts)). Never negative without label smoothing.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + K + K') D) beside ``memory_budget``. Negatives add a sweep for each direction that has some:
        8 N (N + K + K') D, 6 if kept. Of 16 bits, with label smoothing and with diagnostics they are more rows and
        columns of one sweep: 8 (N + K) (N + K') D.

    Source:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021. Negatives of
        images: Yuksekgonul et al., When and Why Vision-Language Models Behave like Bags-of-Words, 2023 (NegCLIP). The
        bonus: Lan et al., LLaVE, 2025.

    Examples:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> cosines = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
        >>> labels = torch.arange(8)
        >>> both = [torch.nn.functional.cross_entropy(each, labels) for each in (10.0 * cosines, 10.0 * cosines.T)]
        >>> torch.allclose(clip(image, text, scale=10.0), sum(both) / 2, rtol=1e-4)
        True
    """
    name, plain = "clip", pairs is None and col_bias is None and text_negatives is None and image_negatives is None
    loss = None
    if plain and metric == "dot" and diagnostics is False and smooth == "all" and is_off(label_smoothing, hardness):
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
    given: dict[str, Any] = {"temperature": temperature, "scale": scale, "pairs": pairs, "col_bias": col_bias}
    given.update({"label_smoothing": label_smoothing, "smooth": smooth, "hardness": hardness, "weight": weight})
    given.update({"reduction": reduction, "normalize": normalize, "diagnostics": diagnostics})
    checks.check_choice(name, "metric", metric, LOGITS)
    if metric == "euclidean":
        given_off = {each: given[each] for each in ("pairs", "col_bias", "label_smoothing", "smooth", "hardness")}
        of_side = {"text_negatives": text_negatives, "image_negatives": image_negatives}
        check_plain(name, reduction, diagnostics=diagnostics, **given_off, **of_side)
    problem = prepared_clip(image, text, **given, memory_budget=memory_budget, backend=backend)
    if metric == "euclidean":
        return euclidean_softmax(problem, both=True)
    if text_negatives is None and image_negatives is None:
        check_filters(name, pairs, col_bias, problem.x.shape[0], "image", problem.x)
        return by_metric(problem, metric).loss()
    sides = problem.sweep, problem.x, problem.y
    given = {"normalize": normalize, "metric": metric, **problem.options}
    return _with_negatives(*sides, text_negatives, image_negatives, **given)  # type: ignore[arg-type]


def by_metric(problem: Prepared, metric: str, shifted: bool = True) -> Prepared:
    """The same of matrices whose inner products are what `metric` says; `shifted`: as in `as_products`."""
    checks.check_choice("clip", "metric", metric, METRICS)
    if metric == "dot":
        return problem
    x, y = as_products([problem.x], [problem.y], problem.sweep.unit, shifted)  # type: ignore[list-item]
    return changed(problem, x=x, y=y, sweep=changed(problem.sweep, unit=False))


def prepared_clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    pairs: Pairs | None,
    col_bias: Tensor | None,
    label_smoothing: float | Tensor,
    smooth: str,
    hardness: float,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    diagnostics: bool,
    memory_budget: int | None,
    backend: str,
) -> Prepared:
    """`clip` of the pairs alone, checked but for its rules and biases; all of its options are given."""
    name = "clip"
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
    share = smoothing_share(name, _arguments.of_weighted(weight, label_smoothing), "image", image, smooth)
    options: dict[str, Any] = {
        "share": share,
        "smooth": smooth,
        "hardness": checked_hardness(name, hardness, scale, share, col_bias, both=True),
        "weight": weight,
        "reduction": reduction,
        "diagnostics": diagnostics,
    }
    unit = _arguments.in_sweep(normalize, image)
    sweep = Sweep((name, "image", "text"), scale, pairs, col_bias, unit, memory_budget, backend)
    return Prepared(both_softmaxes, sweep, image, text, options)


def _with_negatives(
    sweep: Sweep,
    image: Tensor,
    text: Tensor,
    text_negatives: Tensor | None,
    image_negatives: Tensor | None,
    normalize: bool,
    metric: str,
    **options: Any,
) -> Any:
    """A sweep for each block, or one where a gradient of 16 bits would be rounded more than once."""
    name, count = "clip", image.shape[0]
    negatives = []
    for given_name, side, given in (
        ("image_negatives", image, image_negatives),
        ("text_negatives", text, text_negatives),
    ):
        more = side[:0]
        if given is not None:
            (more,) = autocast.cast(given)
            checks.check_matrices(name, "image", image, given_name, more)
            (more,) = _arguments.unit_sides(normalize, more)
        negatives.append(more)
    numbers = [more.shape[0] for more in negatives]
    check_filters(name, None, sweep.col_bias, count + numbers[1], "image", image)
    check_pairs(name, sweep.pairs)
    if metric == "sqeuclidean":
        image, more, text, *others = as_products([image, negatives[0]], [text, negatives[1]], sweep.unit)
        negatives, sweep = [more, *others], changed(sweep, unit=False)
    of_numbers = not (isinstance(sweep.scale, Tensor) and sweep.scale.dim())
    simple = of_numbers and options["share"] is None and not options["diagnostics"]
    if simple and (image.dtype == checks.accumulator(image.dtype) or _has_more_than_ids(sweep.pairs)):
        del options["share"], options["smooth"], options["diagnostics"]
        with autocast.disabled(image):
            return softmaxes_of_blocks(sweep, image, text, *negatives, **options)
    return _in_one_sweep(sweep, image, text, negatives, **options)


def _has_more_than_ids(pairs: Pairs | None) -> bool:
    return pairs is not None and any(rule.name != "differ" for rule, _ in given_rules(pairs))


def _in_one_sweep(sweep: Sweep, image: Tensor, text: Tensor, negatives: list[Tensor], **options: Any) -> Any:
    """Negatives are rows and columns after those of the pairs; those of a side that has none are none."""
    name, count = "clip", image.shape[0]
    sides = [torch.cat([side, more]) for side, more in zip((image, text), negatives, strict=True)]
    numbers = [more.shape[0] for more in negatives]
    reason = "not with label smoothing, diagnostics or a scale for each row, where negatives are given"
    refused = {rule.name: reason for rule in RULES.values() if rule.name != "differ"}
    refuse(name, "pairs", sweep.pairs, refused)
    rules = Pairs()
    if sweep.pairs is not None and sweep.pairs.differ is not None:
        of_images, of_texts = (
            torch.nn.functional.pad(
                checks.check_index(name, f"pairs.differ of the {side}", ids, count, "image", image), (0, more), value=-1
            )
            for side, ids, more in zip(("rows", "columns"), sweep.pairs.differ, numbers, strict=True)
        )
        rules = Pairs(differ=(of_images, of_texts))
    sweep = changed(sweep, pairs=rules)
    if numbers[1] > 0 or numbers[0] == 0:
        return both_softmaxes(sweep, *sides, count=count, **options)
    # Rows without partners need a column that is nobody's: texts become the rows.
    turned = None if rules.differ is None else (rules.differ[1], rules.differ[0])
    bias = None if sweep.col_bias is None else sweep.col_bias.to(checks.accumulator(image.dtype))
    sweep = changed(sweep, pairs=Pairs(differ=turned), col_bias=None)
    found = both_softmaxes(sweep, *reversed(sides), count=count, row_bias=bias, **options)
    return (found[0], found[1][::-1]) if options["diagnostics"] else found
