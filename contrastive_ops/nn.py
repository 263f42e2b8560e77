"""Modules of the losses, with the functions' argument names and, if learnable, their temperature.

A module's `logit_scale` is the logarithm of the scale (log 1 / temperature), under the key that CLIP checkpoints use.
With a fixed temperature a module has no state. A learnable temperature is a parameter: put the module inside the model
that DistributedDataParallel wraps, and leave `logit_scale` out of weight decay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import losses

__all__ = ["CLIPLoss", "InfoNCELoss", "NTXentLoss"]


class _ScaledLoss(nn.Module):
    """Holds the temperature, fixed or learnable, and the arguments that all losses share."""

    def __init__(
        self,
        temperature: float,
        *,
        learnable: bool,
        max_scale: float,
        reduction: str,
        normalize: bool,
        memory_budget: int | None,
        backend: str,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not temperature > 0:
            raise ValueError(f"{name}: temperature must be positive, got {temperature}")
        if not max_scale > 0:
            raise ValueError(f"{name}: max_scale must be positive, got {max_scale}")
        self.temperature = temperature
        self.max_scale = max_scale
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None
        self.options = {
            "reduction": reduction,
            "normalize": normalize,
            "memory_budget": memory_budget,
            "backend": backend,
        }

    def scale(self) -> float | Tensor:
        """The factor of the inner products: 1 / temperature, or exp(logit_scale), at most `max_scale`."""
        if self.logit_scale is None:
            return 1.0 / self.temperature
        if self.training:
            # Clipping the parameter, as CLIP's training does, and not its use: a clamp in the graph would have
            # gradient 0 from then on, and the temperature could never come back.
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(self.max_scale))
        return self.logit_scale.exp()

    def extra_repr(self) -> str:
        """The temperature and every option that is not the default."""
        kind = "learnable" if self.logit_scale is not None else "fixed"
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"temperature={self.temperature} ({kind}), {options}"


class InfoNCELoss(_ScaledLoss):
    """`contrastive_ops.info_nce` as a module.

    Args:
        temperature: divides the inner products; the start value if learnable.
        learnable: make the temperature a parameter, `logit_scale` = log(1 / temperature).
        max_scale: upper bound of exp(logit_scale) in training.
        label_smoothing: as in `info_nce`.
        reduction: as in `info_nce`.
        normalize: as in `info_nce`.
        memory_budget: as in `info_nce`.
        backend: as in `info_nce`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = False,
        max_scale: float = 100.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        normalize: bool = False,
        memory_budget: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable=learnable,
            max_scale=max_scale,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
        self.label_smoothing = label_smoothing

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        row_negatives: Tensor | None = None,
        target: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; arguments as in `info_nce`."""
        return losses.info_nce(
            query,
            key,
            negatives,
            row_negatives=row_negatives,
            target=target,
            scale=self.scale(),
            label_smoothing=self.label_smoothing,
            weight=weight,
            **self.options,  # type: ignore[arg-type]
        )


class CLIPLoss(_ScaledLoss):
    """`contrastive_ops.clip` as a module, with a learnable temperature unless told otherwise.

    Args:
        temperature: divides the inner products; the start value if learnable.
        learnable: make the temperature a parameter, `logit_scale` = log(1 / temperature).
        max_scale: upper bound of exp(logit_scale) in training.
        reduction: as in `clip`.
        normalize: as in `clip`.
        memory_budget: as in `clip`.
        backend: as in `clip`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = True,
        max_scale: float = 100.0,
        reduction: str = "mean",
        normalize: bool = False,
        memory_budget: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable=learnable,
            max_scale=max_scale,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )

    def forward(self, image: Tensor, text: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Return the loss; arguments as in `clip`."""
        return losses.clip(image, text, scale=self.scale(), weight=weight, **self.options)  # type: ignore[arg-type]


class NTXentLoss(_ScaledLoss):
    """`contrastive_ops.nt_xent` as a module.

    Args:
        temperature: divides the cosines; the start value if learnable.
        learnable: make the temperature a parameter, `logit_scale` = log(1 / temperature).
        max_scale: upper bound of exp(logit_scale) in training.
        reduction: as in `nt_xent`.
        normalize: as in `nt_xent`.
        memory_budget: as in `nt_xent`.
        backend: as in `nt_xent`.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        learnable: bool = False,
        max_scale: float = 100.0,
        reduction: str = "mean",
        normalize: bool = True,
        memory_budget: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable=learnable,
            max_scale=max_scale,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Return the loss; arguments as in `nt_xent`."""
        return losses.nt_xent(z0, z1, scale=self.scale(), **self.options)  # type: ignore[arg-type]
