"""What all modules of losses share: options of the function, a temperature, a bias, prototypes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.scalars import Scalars, bounded


class Loss(nn.Module):
    """A loss function with its options. Subclasses name the function.

    Args:
        options: any keyword argument of the function that the module does not own: margin, reduction, normalize, ...
    """

    function: ClassVar[Callable[..., Any]]
    owned: ClassVar[tuple[str, ...]] = ()  # arguments that the module itself provides
    taken: ClassVar[tuple[str, ...]] = ()  # the function's tensors, in order, without those that the module provides
    known: ClassVar[dict[str, str]] = {}  # its keyword arguments and what they may be, as annotated

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if not hasattr(cls, "function"):
            return
        parameters = inspect.signature(cls.function).parameters.values()
        cls.taken = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in cls.owned)
        cls.known = {p.name: str(p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for option, value in options.items():
            if option not in self.known or option in self.owned:
                known = ", ".join(name for name in self.known if name not in self.owned)
                raise TypeError(f"{type(self).__name__}: options must be among {known}, got {option}")
            checks.option(type(self).__name__, option, value, self.known[option])
        self.options = options

    def provided(self) -> dict[str, Any]:
        """The arguments that the module itself provides."""
        return {}

    def forward(self, *tensors: Any, **keywords: Any) -> Any:
        """Return what the function returns; tensors and keywords as there."""
        name = type(self).__name__
        if len(tensors) > len(self.taken):
            raise TypeError(
                f"{name}: tensors must be ({', '.join(self.taken)}), got {len(tensors)}; everything else goes by name"
            )
        given = dict(zip(self.taken[: len(tensors)], tensors, strict=True))
        for key in keywords:
            if key in given:
                raise TypeError(f"{name}: {key} must be given once, got it by position and by name")
            if key in self.owned:
                self.check_owned(key)
            elif key not in self.known and key not in self.taken:
                known = ", ".join(each for each in (*self.taken, *self.known) if each not in self.owned)
                raise TypeError(f"{name}: arguments must be among {known}, got {key}")
        return self.function(**given, **{**self.options, **self.provided(), **keywords})

    def check_owned(self, key: str) -> None:
        """Raise where a call may not replace what the module owns."""
        function = getattr(self.function, "__name__", "the function")
        raise TypeError(
            f"{type(self).__name__}: {key} must not be given at a call, the module owns it\n"
            f"  use contrastive_ops.losses.{function} where it comes from elsewhere"
        )

    def reset_parameters(self) -> None:
        """Put back what the constructor made."""

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class ScaledLoss(Scalars, Loss):
    """A loss with a temperature, fixed or learnable.

    Args:
        temperature: divides the inner products; the start value if learnable. Default: that of the class.
        learnable: make the temperature (and the bias, where there is one) a parameter, `logit_scale` =
            log(1 / temperature), of shape (1,), which FSDP can shard. Default: that of the class.
        max_scale: upper bound of exp(logit_scale). The parameter itself is left alone: while it is above the bound,
            only gradients that lead back reach it.
        options: as in `Loss`.

    Note:
        Where the temperature is fixed, a call may have another: ``loss(x, y, scale=model.logit_scale.exp())``. State
        dicts of models whose `logit_scale` is 0-d load too; for the other way, ``reshape(())`` it.
    """

    owned: ClassVar[tuple[str, ...]] = ("temperature", "scale")
    scalars: ClassVar[tuple[str, ...]] = ("logit_scale",)
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
        if learnable is not None:
            checks.flag(name, "learnable", learnable)
        self.learnable = self.default_learnable if learnable is None else learnable
        temperature = self.default_temperature if temperature is None else temperature
        self.temperature = checks.number(name, "temperature", temperature, "(0, inf)")
        self.max_scale = checks.number(name, "max_scale", max_scale, "(0, inf]")
        self.logit_scale = nn.Parameter(torch.empty(1)) if self.learnable else None
        ScaledLoss.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Put back the start value of the temperature."""
        super().reset_parameters()
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, -math.log(self.temperature))

    def scale(self) -> float | Tensor:
        """The factor of the inner products: 1 / temperature, or exp(logit_scale), at most `max_scale`."""
        if self.logit_scale is None:
            return 1.0 / self.temperature
        return bounded(self.logit_scale, math.log(self.max_scale)).exp()

    def provided(self) -> dict[str, Any]:
        """The scale."""
        return {"scale": self.scale()}

    def forward(self, *tensors: Any, **keywords: Any) -> Any:
        """Return what the function returns; tensors and keywords as there, and a scale where it is not learned here."""
        if "temperature" in keywords and not self.learnable:
            keywords = {"scale": None, **keywords}
        return super().forward(*tensors, **keywords)

    def check_owned(self, key: str) -> None:
        """A fixed number may be another one at a call."""
        if key not in ("temperature", "scale", "bias"):
            super().check_owned(key)
        if self.learnable:
            raise TypeError(
                f"{type(self).__name__}: {key} must not be given at a call, the module learns its own\n"
                f"  make it with learnable=False where a model owns the {key}"
            )

    def extra_repr(self) -> str:
        """The temperature and the options that were given."""
        kind = "learnable" if self.learnable else "fixed"
        return ", ".join(filter(None, [f"temperature={self.temperature} ({kind})", super().extra_repr()]))


class BiasedLoss(ScaledLoss):
    """A sigmoid loss with a temperature and a bias, both fixed or both learnable.

    Args:
        temperature: as in `ScaledLoss`.
        bias: added to every logit; the start value of the parameter `logit_bias`, of shape (1,), if learnable.
        learnable: as in `ScaledLoss`.
        options: as in `ScaledLoss`.
    """

    owned: ClassVar[tuple[str, ...]] = ("temperature", "scale", "bias")
    scalars: ClassVar[tuple[str, ...]] = ("logit_scale", "logit_bias")
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
        self.bias = checks.number(type(self).__name__, "bias", self.default_bias if bias is None else bias)
        self.logit_bias = nn.Parameter(torch.empty(1)) if self.learnable else None
        BiasedLoss.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Put back the start values of temperature and bias."""
        super().reset_parameters()
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.bias)

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

    owned: ClassVar[tuple[str, ...]] = ("temperature", "scale", "prototypes")
    default_temperature = 1 / 64

    def __init__(self, classes: int, dimension: int, temperature: float | None = None, **options: Any) -> None:
        super().__init__(temperature, **options)
        name = type(self).__name__
        classes = checks.integer(name, "classes", classes, 1)
        self.prototypes = nn.Parameter(torch.empty(classes, checks.integer(name, "dimension", dimension, 1)))
        PrototypeLoss.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Draw prototypes, and put back the start value of the temperature."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.prototypes)

    def provided(self) -> dict[str, Any]:
        """The scale and the prototypes."""
        return {**super().provided(), "prototypes": self.prototypes}
