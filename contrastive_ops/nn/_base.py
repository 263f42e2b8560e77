"""What all modules of losses share: options of the function, a temperature, a bias, prototypes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import _checks


class Loss(nn.Module):
    """A loss function with its options. Subclasses name the function.

    Args:
        options: any keyword argument of the function that the module does not own: margin, reduction, normalize, ...
    """

    function: ClassVar[Callable[..., Any]]
    owned: ClassVar[tuple[str, ...]] = ()  # keyword arguments that the module itself provides

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.owned]
        for option in options:
            if option not in known:
                raise TypeError(f"{type(self).__name__}: options must be among {', '.join(known)}, got {option}")
        self.options = options

    def provided(self) -> dict[str, Any]:
        """The arguments that the module itself provides."""
        return {}

    def forward(self, *tensors: Any, **keywords: Any) -> Any:
        """Return what the function returns; tensors and keywords as there."""
        return self.function(*tensors, **self.provided(), **{**self.options, **keywords})

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class ScaledLoss(Loss):
    """A loss with a temperature, fixed or learnable.

    Args:
        temperature: divides the inner products; the start value if learnable. Default: that of the class.
        learnable: make the temperature (and the bias, where there is one) a parameter, `logit_scale` =
            log(1 / temperature). Default: that of the class.
        max_scale: upper bound of exp(logit_scale) in training.
        options: as in `Loss`.
    """

    owned: ClassVar[tuple[str, ...]] = ("temperature", "scale")
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
        super().__init__(**options)
        name = type(self).__name__
        temperature = self.default_temperature if temperature is None else temperature
        self.learnable = self.default_learnable if learnable is None else learnable
        self.temperature = _checks.number(name, "temperature", temperature, "(0, inf)")
        self.max_scale = _checks.number(name, "max_scale", max_scale, "(0, inf]")
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(self.temperature))) if self.learnable else None

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

    def provided(self) -> dict[str, Any]:
        """The scale."""
        return {"scale": self.scale()}

    def extra_repr(self) -> str:
        """The temperature and the options that were given."""
        kind = "learnable" if self.learnable else "fixed"
        return ", ".join(filter(None, [f"temperature={self.temperature} ({kind})", super().extra_repr()]))


class BiasedLoss(ScaledLoss):
    """A sigmoid loss with a temperature and a bias, both fixed or both learnable.

    Args:
        temperature: as in `ScaledLoss`.
        bias: added to every logit; the start value of the parameter `logit_bias` if learnable.
        learnable: as in `ScaledLoss`.
        options: as in `ScaledLoss`.
    """

    owned: ClassVar[tuple[str, ...]] = ("temperature", "scale", "bias")
    default_temperature = 0.1
    default_learnable = True
    default_bias: ClassVar[float] = -10.0

    def __init__(
        self,
        temperature: float | None = None,
        bias: float | None = None,
        *,
        learnable: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(temperature, learnable=learnable, **options)
        self.bias = self.default_bias if bias is None else bias
        self.logit_bias = nn.Parameter(torch.tensor(float(self.bias))) if self.learnable else None

    def provided(self) -> dict[str, Any]:
        """The scale and the bias."""
        return {**super().provided(), "bias": self.bias if self.logit_bias is None else self.logit_bias}


class PrototypeLoss(ScaledLoss):
    """A margin softmax over class prototypes that the module owns: ``loss(embeddings, labels)``.

    Args:
        classes: the number of classes.
        dimension: the size of an embedding.
        temperature: as in `ScaledLoss`.
        options: as in `ScaledLoss`.
    """

    default_temperature = 1 / 64

    def __init__(self, classes: int, dimension: int, temperature: float | None = None, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.prototypes = nn.Parameter(torch.empty(classes, dimension))
        nn.init.xavier_uniform_(self.prototypes)

    def forward(self, x: Tensor, labels: Tensor, **keywords: Any) -> Any:
        """Return the loss of embeddings (N, D) with labels (N,)."""
        return super().forward(x, self.prototypes, labels, **keywords)
