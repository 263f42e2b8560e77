"""Generalised end-to-end loss of speakers: each utterance against the centroids of all speakers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.numerics import softplus
from ..core.ordered import segment_rows, segment_sums
from ..core.recompute import recomputed
from ..core.records import changed
from ..core.unit_rows import unit_rows
from . import _arguments
from ._columns import scaled, wide
from ._sweep import Sweep

KINDS = ("softmax", "contrast")


def ge2e(
    x: Tensor,
    labels: Tensor,
    *,
    kind: str = "softmax",
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor = -5.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """GE2E: an utterance must be closer to the centroid of its speaker's others than to those of other speakers.

    Equivalent to, for utterance i of speaker j::

        e = F.normalize(x)
        centroid = [e[labels == k].mean(0) for k in speakers]
        centroid[j] = e[(labels == j) & (torch.arange(N) != i)].mean(0)                         # without i
        s = scale * F.cosine_similarity(e[i], torch.stack(centroid)) + bias
        softmax = s.logsumexp(0) - s[j]
        contrast = 1 - s[j].sigmoid() + s[others].sigmoid().amax()

    Args:
        x: (N, D) utterances: float32, bfloat16, float16 or float64. Differentiable.
        labels: (N,) int64 the speaker of each; -1 equals nothing: such a row belongs to nobody.
        kind: "softmax" (text-independent verification) or "contrast" (text-dependent).
        temperature: 1 / scale instead; not both.
        scale: factor of the cosines, > 0; float, 0-d or (N,) tensor, differentiable. Default 10.
        bias: added to them; float or 0-d tensor, differentiable. Without effect on "softmax".
        weight: (N,) weight of each utterance; the mean divides by its sum. Differentiable. 0 leaves it out, also of
            centroids.
        reduction: "mean", "sum" or "none". The paper sums.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. An utterance
        that is its speaker's only one has loss and gradient 0 as a row and no part in the mean; its speaker is one of
        the others.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. Work 8 N S D for S speakers, or for N where it is traced.

    Source:
        Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018.

    Examples:
        >>> x, speakers = torch.randn(12, 16), torch.arange(4).repeat_interleave(3)
        >>> ge2e(x, speakers, scale=torch.tensor(10.0, requires_grad=True)).shape
        torch.Size([])
    """
    name = "ge2e"
    checks.check_choice(name, "kind", kind, KINDS)
    if weight is not None:
        temperature, scale = (_arguments.of_weighted(weight, each, 1) for each in (temperature, scale))
    x, factor = _arguments.one_side(
        name,
        "x",
        x,
        temperature=temperature,
        scale=scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
    )
    factor = checks.scale_tensor(name, factor, "x", x)
    labels = checks.check_index(name, "labels", labels, x.shape[0], "x", x)
    labels = _arguments.of_weighted(weight, labels, -1)
    shift = checks.one_number(name, "bias", bias, "x", x)
    with autocast.disabled(x):
        rows = wide(left_out(x, labels != -1), unit=True)
        speaker, sizes = _speakers(labels)
        sums = segment_sums(rows, speaker, x.shape[0])
        own = scaled(factor, recomputed(_with_others)(rows, sums, speaker))
        counted = (speaker >= 0) & (sizes[speaker] > 1)
        sweep = Sweep((name, "x", "x"), factor, memory_budget=memory_budget, backend=backend)
        found = _against_others(sweep, rows, sums, speaker, sizes, kind)
        if kind == "softmax":  # the bias is in both logits; a learned one has a gradient, which is 0
            losses = softplus(found - own + (shift - shift))
        else:
            losses = torch.sigmoid(-own - shift) + torch.sigmoid(found + shift)
        return _arguments.mean_over(losses, counted, weight, reduction)


def _speakers(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) a number in [0, N) for each label, -1 for -1; and (N,) how many rows each number has."""
    sorted_labels, order = labels.sort(stable=True)
    begins = torch.zeros_like(labels)
    begins[1:] = (sorted_labels[1:] != sorted_labels[:-1]).long()
    speaker = torch.zeros_like(labels).scatter(0, order, begins.cumsum(0))
    speaker = torch.where(labels == -1, -1, speaker)
    sizes = torch.zeros_like(labels).scatter_add(0, speaker.clamp_min(0), (speaker >= 0).long())
    return speaker, sizes


def _with_others(rows: Tensor, sums: Tensor, speaker: Tensor) -> Tensor:
    """(N,) the cosine of each row with the centroid of its speaker's others, of which only the direction counts."""
    return (rows * unit_rows(segment_rows(sums, speaker) - rows)).sum(1)


def _against_others(sweep: Sweep, rows: Tensor, sums: Tensor, speaker: Tensor, sizes: Tensor, kind: str) -> Tensor:
    """(N,) the fold of each row's logits with the centroids of other speakers; -inf where there are none."""
    there = sizes > 0
    if checks.may_read(sizes, waits=True):
        sums, speaker = sums[there], (there.cumsum(0) - 1)[speaker.clamp_min(0)]
    else:
        sweep = changed(sweep, col_bias=torch.where(there, 0.0, -torch.inf).to(rows.dtype))
    if sums.shape[0] == 0:
        return rows.sum(1) - torch.inf
    fold = "logsumexp" if kind == "softmax" else "max"
    return sweep.fold(rows, unit_rows(sums), fold, target=speaker.clamp_min(0)).rows[0]
