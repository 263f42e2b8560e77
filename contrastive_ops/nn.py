"""Modules of the losses: the functions' argument names, and a temperature that can be learned.

A module's `logit_scale` is the logarithm of the scale (log 1 / temperature), under the key that CLIP checkpoints use.
With a fixed temperature a module has no state. A learnable temperature is a parameter: put the module inside the model
that DistributedDataParallel wraps, and leave `logit_scale` out of weight decay.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import losses

__all__ = ["CLIPLoss", "InfoNCELoss", "NTXentLoss"]


class ScaledLoss(nn.Module):
    """A loss function with its options and a temperature, fixed or learnable. Subclasses name the function.

    Args:
        temperature: divides the inner products; the start value if learnable. Default: that of the class.
        learnable: make the temperature a parameter, `logit_scale` = log(1 / temperature).
        max_scale: upper bound of exp(logit_scale) in training.
        options: any keyword argument of the function that is not a tensor: reduction, normalize, memory_budget, ...
    """

    function: ClassVar[Callable[..., Tensor]]
    default_temperature: ClassVar[float]
    default_learnable: ClassVar[bool] = False

    def __init__(
        self,
        temperature: float | None = None,
        *,
        learnable: bool | None = None,
        max_scale: float = 100.0,
        **options: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        temperature = self.default_temperature if temperature is None else temperature
        learnable = self.default_learnable if learnable is None else learnable
        if not temperature > 0:
            raise ValueError(f"{name}: temperature must be positive, got {temperature}")
        if not max_scale > 0:
            raise ValueError(f"{name}: max_scale must be positive, got {max_scale}")
        parameters = inspect.signature(self.function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("temperature", "scale")]
        for option in options:
            if option not in known:
                raise TypeError(f"{name}: options must be among {', '.join(known)}, got {option}")
        self.temperature = temperature
        self.max_scale = max_scale
        self.options = options
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None

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

    def forward(self, *tensors: Tensor | None, **keywords: Any) -> Tensor:
        """Return the loss; tensors and keywords as in the function."""
        return self.function(*tensors, scale=self.scale(), **{**self.options, **keywords})

    def extra_repr(self) -> str:
        """The temperature and the options that were given."""
        kind = "fixed" if self.logit_scale is None else "learnable"
        return ", ".join([f"temperature={self.temperature} ({kind})", *(f"{k}={v!r}" for k, v in self.options.items())])


class InfoNCELoss(ScaledLoss):
    """`contrastive_ops.info_nce` as a module: ``InfoNCELoss(0.05)(query, key, negatives)``."""

    function = staticmethod(losses.info_nce)
    default_temperature = 0.07


class CLIPLoss(ScaledLoss):
    """`contrastive_ops.clip` as a module with a learnable temperature: ``CLIPLoss()(image, text)``."""

    function = staticmethod(losses.clip)
    default_temperature = 0.07
    default_learnable = True


class NTXentLoss(ScaledLoss):
    """`contrastive_ops.nt_xent` as a module: ``NTXentLoss(0.1)(view0, view1)``."""

    function = staticmethod(losses.nt_xent)
    default_temperature = 0.5
