"""Prototypes that follow rows, not gradients: means of classes, codes of a codebook, centroids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.ordered import segment_sums
from ..core.state import State
from ..ops.similarity_topk import similarity_topk
from ..ops.sinkhorn import Ranks


class RunningPrototypes(State):
    """The mean row of each class, averaged over steps: ``prototypes = running(x, labels)``.

    Equivalent to, for each class that has rows in the batch::

        mean = x[labels == c].mean(0)
        prototypes[c] = momentum * mean + (1 - momentum) * prototypes[c] if seen[c] else mean

    A commitment term is ``F.mse_loss(x, running(x, labels)[labels])``; a classifier by distance is
    ``info_nce(x, running.prototypes.clone(), target=labels, metric="sqeuclidean", normalize=False)``.

    Args:
        classes: C, how many there are.
        dim: D.
        momentum: weight of a batch, in (0, 1]; decays of papers are 1 less this.

    Note:
        State that keeps its digits and moves with a model, 0 at first. In evaluation nothing is updated, and means that
        are not finite are not stored.

    Source:
        Means of classes: Snell et al., Prototypical Networks for Few-shot Learning, 2017. Codes: van den Oord et al.,
        Neural Discrete Representation Learning, 2017, appendix A.

    Examples:
        >>> running, x = RunningPrototypes(3, 4), torch.randn(6, 4)
        >>> found = running(x, torch.tensor([0, 0, 2, 2, 2, -1]))
        >>> torch.allclose(found[0], x[:2].mean(0)), running.seen.tolist()
        (True, [True, False, True])
    """

    digits = own = ("prototypes", "seen")
    prototypes: Tensor
    seen: Tensor

    def __init__(
        self, classes: int, dim: int, momentum: float = 0.1, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        name = "RunningPrototypes"
        self.momentum = checks.number(name, "momentum", momentum, "(0, 1]")
        shape = checks.integer(name, "classes", classes, 1), checks.integer(name, "dim", dim, 1)
        self.prototypes = torch.zeros(shape, dtype=torch.float32, device=device)
        self.seen = torch.zeros(shape[:1], dtype=torch.bool, device=device)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all batches."""
        self.prototypes.zero_()
        self.seen.zero_()

    @torch.no_grad()
    def start(self, prototypes: Tensor) -> None:
        """Begin with these (C, D), such as rows that were drawn; all classes count as seen."""
        checks.check_matrix("RunningPrototypes.start", "prototypes", prototypes)
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(
                f"RunningPrototypes.start: prototypes must have shape {checks.shape(self.prototypes)}, "
                f"got {checks.shape(prototypes)}"
            )
        self.prototypes.copy_(prototypes)
        self.seen.fill_(True)

    @torch.no_grad()
    def forward(self, x: Tensor, labels: Tensor | None = None, *, group: Any = None) -> Tensor:
        """Return (C, D) the prototypes, this batch counted.

        Args:
            x: (N, D) rows; no gradient goes to them.
            labels: (N,) int64 in [0, C), -1 for rows that do not count. None: the nearest prototype of each row, for
                codes and centroids; `start` says where they begin.
            group: processes whose rows count, as in `sinkhorn`. None: those of this process.
        """
        name, old = "RunningPrototypes", self.prototypes
        checks.check_matrix(name, "x", x)
        if x.shape[1] != old.shape[1]:
            raise ValueError(f"{name}: x must have shape (N, {old.shape[1]}), got {checks.shape(x)}")
        checks.check_device(name, "x", x, "prototypes", old)
        if labels is not None:
            labels = checks.check_index(name, "labels", labels, x.shape[0], "x", x)
            checks.check_index_values(name, "labels", labels, len(old), or_none=True)
        if not self.training:
            return old.clone()
        with autocast.disabled(x):
            rows, ranks = x.detach().to(old.dtype), Ranks.find(name, group)
            if labels is None:
                labels = similarity_topk(rows, old, 1, metric="sqeuclidean").indices[:, 0]
            sums = ranks.sum(segment_sums(rows, labels, len(old)))
            counts = ranks.sum(segment_sums(rows.new_ones(len(rows)), labels, len(old)))
            mean = sums / counts.clamp_min(1)[:, None]
            averaged = torch.where(self.seen[:, None], self.momentum * mean + (1 - self.momentum) * old, mean)
            kept = (counts > 0) & averaged.isfinite().all(1)
            self.prototypes.copy_(torch.where(kept[:, None], averaged, old))
            self.seen.logical_or_(kept)
        return self.prototypes.clone()
