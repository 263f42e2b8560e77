"""Recipes of images and text, and of points and pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.ordered import segment_sums
from ..losses import alignment, clip, hn_nce, info_nce
from ..losses._columns import wide
from ..losses._one_pass import Part, sum_of_pairs
from ..ops import Pairs, RouterLoss


def limoe_router_losses(
    experts: Sequence[int], *, weight: float = 0.04, local: Sequence[float] | None = None
) -> list[RouterLoss]:
    """LIMoE's losses of the router, for `ops.route` with the modality of each token as its segment.

    Equivalent to::

        [RouterLoss("importance", weight, pooled=True), RouterLoss("load", weight, pooled=True),
         RouterLoss("z", weight, pooled=True), RouterLoss("local_entropy", local),
         RouterLoss("global_entropy", weight, threshold=[math.log(each) for each in experts])]

    Args:
        experts: how many experts each modality must use at least.
        weight: of each loss; 0.04 in the paper.
        local: of the entropy of a token's choice, for each modality; None: `weight` for the last one, text, alone.

    Source:
        Mustafa et al., LIMoE, 2022 (S001); weights and thresholds from memory of the paper. The load needs
        ``Gating(noise_std=1.0)``.
    """
    local = [0.0] * (len(experts) - 1) + [weight] if local is None else local
    pooled = [RouterLoss(name, weight, pooled=True) for name in ("importance", "load", "z")]
    spread = RouterLoss("global_entropy", weight, threshold=[math.log(each) for each in experts])
    return [*pooled, RouterLoss("local_entropy", local), spread]


def diht(
    image: Tensor,
    text: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.25,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """DiHT: HN-NCE of both directions, added.

    Equivalent to::

        2 * hn_nce(image, text, alpha=alpha, beta=beta)

    Args:
        image: (N, D).
        text: as `image`.
        alpha: the share of the positive and the sharpness of hard negatives; not verified.
        beta: as `alpha`.
        scale: 1 / temperature instead; not both.
        temperature: divides the cosines.

    Source:
        Radenovic et al., Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training, 2023 (S073).
    """
    return 2 * hn_nce(image, text, alpha=alpha, beta=beta, temperature=temperature, scale=scale)


def gcl(
    query: Tensor,
    document: Tensor,
    weight: Tensor,
    query_ids: Tensor | None = None,
    *,
    mean_over: str = "weights",
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """GCL: CLIP whose pairs count as much as their score, without other documents of the same query.

    Equivalent to::

        s = (F.normalize(query) @ F.normalize(document).T * scale).masked_fill(same_query_but_not_own, -torch.inf)
        loss = lambda logits: F.cross_entropy(logits, torch.arange(N), reduction="none")
        (weight * (loss(s) + loss(s.T)) / 2).sum() / weight.sum()           # mean_over="rows": / N

    Args:
        query: (N, D).
        document: as `query`.
        weight: (N,) of each pair, from its score.
        query_ids: (N,) int64; pairs of one query are no negatives of each other.
        mean_over: "weights" or "rows"; the paper does not say which.
        scale: 1 / temperature instead; not both.
        temperature: divides the cosines.

    Source:
        Zhu et al., Generalized Contrastive Learning for Multi-Modal Retrieval and Ranking, 2024 (S024).
    """
    checks.check_choice("gcl", "mean_over", mean_over, ("weights", "rows"))
    pairs = None if query_ids is None else Pairs(differ=(query_ids, query_ids))
    if mean_over == "weights":
        return clip(query, document, weight=weight, pairs=pairs, temperature=temperature, scale=scale)
    losses = clip(query, document, pairs=pairs, temperature=temperature, scale=scale, reduction="none")
    return (weight * losses).mean()


def proclip(x: Tensor, teacher: Tensor) -> Tensor:
    """ProCLIP's first stage: rows and their distances follow a frozen text encoder; sums, as released.

    Equivalent to::

        x, t = F.normalize(x), F.normalize(teacher)
        (x - t).square().sum() + F.huber_loss(torch.pdist(x), torch.pdist(t), reduction="sum")

    Args:
        x: (N, D); no gradient to the teacher is needed.
        teacher: as `x`.

    Source:
        Hu et al., ProCLIP, 2025 (S012); released code. The second stage is ``clip(..., label_smoothing=)`` and the same
        two terms on images.
    """
    t = wide(teacher.detach(), True)
    lengths = t.square().sum(1)

    def huber(squared: Tensor, rows: slice, columns: slice, needs: bool) -> Part:
        wanted = lengths[rows, None] + torch.addmm(lengths[columns], t[rows], t[columns].T, alpha=-2)
        distance, wanted = squared.sqrt_(), wanted.clamp_min_(0.0).sqrt_()
        if rows == columns:
            wanted.fill_diagonal_(0.0)
        gap = wanted.neg_().add_(distance)
        slopes = gap.clamp(-1.0, 1.0)
        values = (slopes * gap.sub_(slopes, alpha=0.5)).sum(1)
        return Part(values, slopes.div_(distance.mul_(2)).masked_fill_(distance == 0, 0.0) if needs else None)

    return alignment(x, t, reduction="sum") + sum_of_pairs("proclip", huber, wide(x, True)) / 2


def segment_mean(x: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means of the rows of each segment, and how many there are; differentiable.

    Equivalent to::

        torch.stack([x[ids == i].mean(0) for i in range(count)])            # 0 where there is none

    Args:
        x: (N, D).
        ids: (N,) int64 in [0, count).
        count: number of segments.

    Returns:
        (count, D) means, and (count,) numbers of rows.
    """
    sizes = torch.bincount(ids, minlength=count)
    return segment_sums(x, ids, count) / sizes.clamp_min(1)[:, None], sizes


def superflow(
    points: Tensor,
    pixels: Tensor,
    point_ids: Tensor,
    pixel_ids: Tensor,
    superpixels: int,
    *,
    temperature: float = 0.07,
) -> Tensor:
    """SuperFlow: means of points must find the means of pixels of their superpixel.

    Equivalent to::

        k, q = (segment_mean(F.normalize(each), ids, superpixels)[0] for each, ids in ...)      # not unit again
        F.cross_entropy(k[seen] @ q[seen].T / temperature, torch.arange(seen.sum()))

    Args:
        points: (P, D) and (P', D).
        pixels: as `points`.
        point_ids: the superpixel of each; those without points or pixels take no part.
        pixel_ids: as `point_ids`.
        superpixels: how many there are in the batch.
        temperature: divides the cosines.

    Source:
        Xu et al., 4D Contrastive Superflows are Dense 3D Representation Learners, 2024 (S005, S006); released code,
        which adds this loss over views, sweeps and frames.
    """
    of_points, many = segment_mean(wide(points, True), point_ids, superpixels)
    of_pixels, more = segment_mean(wide(pixels, True), pixel_ids, superpixels)
    seen = (many > 0) & (more > 0)
    return info_nce(of_points[seen], of_pixels[seen], temperature=temperature, normalize=False)
