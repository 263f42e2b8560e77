"""Global contrastive loss: denominators are averaged over batches, so that small batches do not bias them.

A sample's denominator over the whole data set is estimated by a running mean of those that it had in its batches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..core import checks
from ..core.rules import Pairs
from ..core.state import State
from ..reference.similarity_loss import usual_target
from . import _arguments
from ._columns import check_filters
from ._hardness import log_number
from ._sweep import Sweep
from .diagnostics import Diagnostics, Ranking

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


class _Options(_arguments.BiasedOptions, total=False):
    """Those that do not decide what `sog_clr` returns."""

    text_temperature: float | Tensor | None
    text_scale: float | Tensor | None
    eps: float


class RunningDenominator(State):
    """The running denominators of a data set's samples, in log space; the state of `sog_clr`.

    Equivalent to::

        u[index] = where(never seen, g, (1 - gamma) * u[index] + gamma * g)         # u = exp(log_u), g = exp(log_mean)

    Args:
        size: number of samples in the data set.
        gamma: weight of the newest batch, in (0, 1]. 1 forgets all others. An attribute: schedules may set it between
            steps.

    Attributes:
        log_u: (2, size) float32, saved in the state dict: the logarithms of the denominators of images and of texts.
            -inf is a sample that was never seen.

    Note:
        8 bytes a sample. It keeps its digits whatever the module is cast to, and under DistributedDataParallel each
        process has its own. It may stay on another device than the batch; then the rows of each batch are copied.
        A denominator that is not finite, of a batch that overflowed, is not stored.

    Examples:
        >>> state = RunningDenominator(1000, gamma=0.5)
        >>> log_u = state(torch.tensor([3, 7]), torch.zeros(2, 2))
        >>> int(state.log_u.isfinite().sum())
        4
    """

    digits = own = ("log_u",)
    log_u: Tensor

    def __init__(self, size: int, gamma: float = 0.9) -> None:
        super().__init__()
        size = checks.integer("RunningDenominator", "size", size, 0)
        self.gamma = checks.number("RunningDenominator", "gamma", gamma, "(0, 1]")
        self.log_u = torch.full((2, size), -torch.inf, dtype=torch.float32)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all samples."""
        self.log_u.fill_(-torch.inf)

    @torch.no_grad()
    def forward(self, index: Tensor, log_mean: Tensor) -> Tensor:
        """Return the updated denominators of a batch; in training mode, store them.

        Args:
            index: (N,) int64, the batch's samples. Where one occurs more than once, the largest of its new
                denominators is stored.
            log_mean: (2, N) the logarithms of this batch's denominators, of images and of texts. What is not finite
                is not stored.

        Returns:
            (2, N) in the dtype of `log_mean`.
        """
        index = index.to(self.log_u.device)
        old = self.log_u[:, index].to(device=log_mean.device, dtype=log_mean.dtype)
        keep = math.log1p(-self.gamma) if self.gamma < 1 else -math.inf
        new = torch.where(old == -torch.inf, log_mean, torch.logaddexp(old + keep, log_mean + math.log(self.gamma)))
        if self.training:
            # A batch without negatives, or one that overflowed, must not spoil what other batches have found.
            stored = torch.where(log_mean.isfinite(), new, -torch.inf).to(self.log_u)
            self.log_u.scatter_reduce_(1, index.expand(2, -1), stored, "amax", include_self=False)
            found = self.log_u[:, index]
            self.log_u[:, index] = torch.where(found == -torch.inf, old.to(self.log_u), found)
        return new

    def extra_repr(self) -> str:
        """The size and gamma."""
        return f"size={self.log_u.shape[1]}, gamma={self.gamma}"


@overload
def sog_clr(
    image: Tensor,
    text: Tensor,
    index: Tensor,
    state: RunningDenominator,
    *,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def sog_clr(
    image: Tensor,
    text: Tensor,
    index: Tensor,
    state: RunningDenominator,
    *,
    diagnostics: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


def sog_clr(
    image: Tensor,
    text: Tensor,
    index: Tensor,
    state: RunningDenominator,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    text_temperature: float | Tensor | None = None,
    text_scale: float | Tensor | None = None,
    eps: float = 1e-14,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Diagnostics, Diagnostics]]:
    """SogCLR's global contrastive loss of images and texts, with running denominators: small batches suffice.

    Equivalent to::

        s = F.normalize(image) @ F.normalize(text).T
        difference = (s - s.diagonal()[:, None]) / temperature, (s.T - s.diagonal()[:, None]) / temperature
        other = 1 - torch.eye(N)
        g = torch.stack([(d.exp() * other).sum(1) / (N - 1) for d in difference])   # (2, N), of this batch
        u = (1 - gamma) * state.u[:, index] + gamma * g.detach()                    # stored; u = g at first sight
        value = (u + eps).log().mean(0)                                             # what is returned ...
        gradient_of = (g / (u + eps)).mean(0)                                       # ... and what is differentiated

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        index: (N,) int64, which sample of the data set each pair is. A sample that occurs twice in a batch is two
            pairs, and the larger of its denominators is stored.
        state: the running denominators. Updated if it is in training mode, and only read by ``state.eval()``.
        temperature: divides the cosines; float, 0-d or, for a temperature of each sample, (N,) tensor,
            differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        text_temperature: the temperature from texts to images where it is another one; the same forms.
        text_scale: 1 / text_temperature instead; not both.
        eps: added to the denominators, >= 0: samples whose negatives are all farther than log(1 / eps) have almost
            no gradient.
        pairs: which images and texts are negatives of each other: ids of false negatives, bounds on the similarity, a
            guide, ... N - 1 above is then the number of a row's, or column's, negatives.
        col_bias: (N,), added to the logits of each text; differentiable. The denominators of images see it, those of
            texts do not.
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        diagnostics: also return `Diagnostics` of both directions from the same sweep.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs): the logarithm of the running
        denominators, averaged over both directions, which estimates the loss over the whole data set. May be
        negative. Its gradient is the estimator of the papers, grad(g) / (u + eps), and not that of the value, which
        would be gamma times as large. A direction without negatives has loss 0, and its denominator stays; a pair
        without any, such as a single one, is left out of the mean. With ``diagnostics`` the pair (loss,
        (Diagnostics of images, Diagnostics of texts)).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``; one sweep for both directions. With ``gamma=1`` and ``eps=0`` it is the
        decoupled loss of the batch alone. Where the temperature is learned, ``temperature * (loss + rho)`` is the
        objective of FastCLIP-v3. Second derivatives take g / (u + eps) as a constant.

    Source:
        Yuan et al., Provable Stochastic Optimization for Global Contrastive Learning, 2022;
        Wei et al., FastCLIP, 2024.

    Examples:
        >>> image, text, state = torch.randn(4, 8), torch.randn(4, 8), RunningDenominator(100)
        >>> loss = sog_clr(image, text, torch.tensor([3, 14, 15, 92]), state)
        >>> int(state.log_u.isfinite().sum())
        8
    """
    name = "sog_clr"
    eps = checks.number(name, "eps", eps, "[0, inf)")
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
    index = _arguments.of_weighted(weight, index)
    index = _check_samples(name, index, state, image)
    text_temperature, text_scale = (_arguments.of_weighted(weight, each, 1) for each in (text_temperature, text_scale))
    text_scale = _scale_of_texts(name, text_temperature, text_scale, text)
    check_filters(name, pairs, col_bias, text.shape[0], "image", image)
    per_sample = isinstance(scale, Tensor) and scale.dim() == 1
    unit = _arguments.in_sweep(normalize, image)
    sweep = Sweep((name, "image", "text"), scale, pairs, col_bias, unit, memory_budget, backend)
    ranking = (
        Ranking(image, text, text, pairs, both=True, unit=unit, biased=col_bias is not None) if diagnostics else None
    )
    counts = () if pairs is None else ("count",)
    folded = sweep.fold(
        image,
        text,
        "logsumexp",
        *counts,
        *(ranking.folds if ranking else ()),
        dim=(0, 1),
        col_scale=scale if text_scale is None and per_sample else text_scale,
        target=usual_target(image, text),
    )
    (rows, *of_rows), (cols, *of_cols), positive, *_ = folded
    text_positive, numbers = positive, (of_rows[0], of_cols[0]) if counts else (image.shape[0] - 1,) * 2
    if text_scale is not None:
        bias = 0.0 if col_bias is None else col_bias.to(positive.dtype)
        factor = checks.scale_tensor(name, scale, "image", image)
        text_positive = (positive - bias) * (text_scale / factor) + bias
    log_counts = torch.stack([log_number(positive, each).expand(positive.shape) for each in numbers])
    log_mean = torch.stack([rows - positive, cols - text_positive]) - log_counts
    # What is not finite is not stored: of pairs of weight 0 the state learns nothing.
    log_u = state(index, _arguments.of_weighted(weight, log_mean.detach().T, torch.nan).T)
    if eps:
        log_u = torch.logaddexp(log_u, log_u.new_full((), eps).log())
    some = torch.stack([rows, cols]) != -torch.inf
    some = some if weight is None else some & (weight != 0)
    log_mean, log_u = torch.where(some, log_mean, 0.0), torch.where(some, log_u, 0.0)
    # The value of log u with the gradient of g / u, which is that of log g times g / u.
    share = (log_mean.detach() - log_u).exp()
    losses = (log_u + share * (log_mean - log_mean.detach())).mean(0)
    loss = _arguments.mean_over(losses, some.any(0), weight, reduction)
    end = len(counts)
    return (loss, ranking.read_both(of_rows[end:], of_cols[end:])) if ranking else loss


def _check_samples(function: str, index: Tensor, state: object, image: Tensor) -> Tensor:
    if not isinstance(state, RunningDenominator):
        raise TypeError(f"{function}: state must be a RunningDenominator, got {type(state).__name__}")
    index = checks.check_index(function, "index", index, image.shape[0], "image", image)
    checks.check_index_values(function, "index", index, state.log_u.shape[1])
    return index


def _scale_of_texts(
    function: str, temperature: float | Tensor | None, scale: float | Tensor | None, text: Tensor
) -> Tensor | None:
    """The scale from texts to images, as a tensor, where it is another one."""
    if temperature is None and scale is None:
        return None
    found = _arguments.resolve_scale(function, temperature, scale, 1.0, "text_")
    return checks.scale_tensor(function, found, "text", text, "text_scale")
