"""What losses of a large softmax share: the rows that are used, their labels, what a cross entropy is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.numerics import softplus
from ..core.ordered import ordered_sum
from ..ops.similarity_reduce import fold, weighted_total
from . import _linear_targets


class Options(NamedTuple):
    """What a cross entropy may have beside labels; 0 and None for nothing."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    class_weight: Tensor | None = None


class Problem:
    """The rows that have a label, as the primitives take them.

    Attributes:
        rows: (T, D) those that are used.
        target: (T,) their labels, or (T, V) probabilities.
        own: (T,) the weight of each label's class, or None.
    """

    def __init__(
        self,
        name: str,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        ignore_index: int | None,
        token_weight: Tensor | None = None,
        options: Options | None = None,
    ) -> None:
        self.names = (name, "hidden", "weight")
        self.rows, self.weight, self.bias = checked(name, ("hidden", hidden), ("weight", weight), ("bias", bias))
        classes = None if options is None else options.class_weight
        if classes is not None:
            checks.check_vector(name, "class_weight", classes, weight.shape[0], "hidden", self.rows)
            checks.check_constant(name, "class_weight", classes)
            classes = classes.to(checks.accumulator(self.rows.dtype))
        self.shape, self.classes, self.own = hidden.shape[:-1], classes, None
        self.probabilities = isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == hidden.dim()
        if self.probabilities:
            target, self.used = self._checked_probabilities(name, labels, ignore_index)
        else:
            check_entries(name, "labels", labels, hidden)
            target = labels.reshape(-1)
            target = checks.check_index(name, "labels", target, self.rows.shape[0], "hidden", self.rows)
            self.used = target != (-100 if ignore_index is None else ignore_index)
        if token_weight is not None:
            self.used = self.used & (token_weight.detach() != 0)
        self.places, (self.rows, self.target) = of_used(self.used, self.rows, target)
        if not self.probabilities:
            checks.check_index_values(name, "labels", self.target, weight.shape[0])
            self.own = None if classes is None else classes[self.target]

    def _checked_probabilities(self, name: str, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
        shape = (*self.shape, self.weight.shape[0])
        if labels.shape != shape:
            raise ValueError(
                f"{name}: labels must be probabilities of shape {tuple(shape)}, got {checks.shape(labels)}"
            )
        if ignore_index not in (None, -100):
            raise ValueError(f"{name}: ignore_index must be None where labels are probabilities, got {ignore_index}")
        checks.check_device(name, "hidden", self.rows, "labels", labels)
        return _rows(labels), torch.ones(self.rows.shape[:1], dtype=torch.bool, device=labels.device)

    def weighted_total_has(self, options: Options) -> bool:
        """Whether the gradients of a sum can be formed in the forward pass."""
        return not (self.probabilities or options.z_loss or options.softcap)

    def log_prob(self, memory_budget: int | None, backend: str) -> Tensor:
        """The log-probability of each row that has a label."""
        others, own = self._folded(memory_budget, backend)
        return -softplus(others - own)

    def losses(self, options: Options, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor | None]:
        """The cross entropies of the rows, and the terms of their z-loss or None."""
        if self.probabilities or options.softcap:
            given = (self.rows, self.weight, self.bias, self.target, self.classes)
            losses, lse = _linear_targets.losses_and_lse(*given, options.label_smoothing, options.softcap)
        else:
            others, own = self._folded(memory_budget, backend)
            losses = softplus(others - own)
            of_lse, of_own, evenly = self._smoothed(options)
            losses = losses if of_lse is None else of_lse * losses
            losses = losses if of_own is None or evenly is None else losses + (of_own * own - evenly)
            lse = torch.logaddexp(others, own) if options.z_loss else others
        return losses, options.z_loss * lse.square() if options.z_loss else None

    def total(self, options: Options, share: Tensor, backend: str) -> Tensor:
        """The sum of the cross entropies, weighted by `share`, with gradients from the forward pass."""
        of_lse, of_own, evenly = self._smoothed(options)
        total = weighted_total(
            self.rows,
            self.weight,
            scale=1.0,
            col_bias=self.bias,
            target=self.target,
            weight=share if of_lse is None else share * of_lse,
            target_weight=None if of_own is None else share * of_own,
            names=self.names,
            backend=backend,
        )
        return total if evenly is None else total - ordered_sum(share * evenly)

    def _folded(self, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
        """The logsumexp over the other classes, and the logit of the label."""
        folded = fold(
            self.rows,
            self.weight,
            col_bias=self.bias,
            target=self.target,
            memory_budget=memory_budget,
            names=self.names,
            backend=backend,
        )
        return folded.rows[0], folded.target

    def _smoothed(self, options: Options) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A loss as a * (lse - own logit) + b * own logit - c: a, b and c of each row; None for 1, 0 and 0.

        What is spread over the classes, s_j = label_smoothing / V times the weight of class j, counts s_j (lse - l_j).
        The sum of s_j l_j is linear in the logits: a product of each row with one row.
        """
        if not options.label_smoothing:
            return self.own, None, None
        dtype, classes = checks.accumulator(self.rows.dtype), self.weight.shape[0]
        each = self.rows.new_full((classes,), options.label_smoothing / max(classes, 1), dtype=dtype)
        each = each if self.classes is None else each * self.classes
        evenly = (self.rows.to(dtype) * (self.weight.to(dtype) * each[:, None]).sum(0)).sum(1)
        if self.bias is not None:
            evenly = evenly + ordered_sum(self.bias.to(dtype) * each)
        own = torch.ones_like(evenly) if self.own is None else self.own
        even = ordered_sum(each).expand(evenly.shape)
        return own * (1 - options.label_smoothing) + even, even, evenly

    def spread(self, values: Tensor) -> Tensor:
        """Values of these rows in the shape of the labels."""
        return spread(values, self.used, self.places).view(self.shape)


def cap_of(name: str, softcap: float | None) -> float:
    return 0.0 if softcap is None else checks.number(name, "softcap", softcap, "(0, inf)")


def checked(
    name: str, hidden: tuple[str, Tensor], weight: tuple[str, Tensor], bias: tuple[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows, classes and bias of one softmax, cast as autocast asks."""
    (hidden_name, x), (weight_name, y), (bias_name, b) = hidden, weight, bias
    x, y, b = autocast.cast(x, y, b)
    if checks.check_tensor(name, hidden_name, x).dim() < 1:
        raise ValueError(f"{name}: {hidden_name} must be a tensor (..., D), got {checks.shape(x)}")
    rows = _rows(x)
    checks.check_matrices(name, hidden_name, rows, weight_name, y)
    if b is not None:
        checks.check_vector(name, bias_name, b, y.shape[0], hidden_name, rows)
    return rows, y, b


def _rows(x: Tensor) -> Tensor:
    """All rows of (..., D) as a matrix. Not by reshape, which cannot tell how many rows of no numbers there are."""
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def check_entries(name: str, key: str, given: object, hidden: Tensor) -> None:
    """`given` must have one entry for each row of `hidden`."""
    given = checks.check_tensor(name, key, given)
    if given.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: {key} must have shape {tuple(hidden.shape[:-1])}, got {checks.shape(given)}")
    checks.check_device(name, "hidden", hidden, key, given)


def of_used(used: Tensor, *given: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Which rows are used, None for all, and these rows of what is given.

    A traced program must not depend on how many there are: it keeps all, with 0 for those that are not used.
    """
    if not checks.may_read(used, waits=True):
        return None, tuple(left_out(each, used) for each in given)
    if bool(used.all()):
        return None, given
    places = used.nonzero()[:, 0]
    return places, tuple(each[places] for each in given)


def spread(values: Tensor, used: Tensor, places: Tensor | None) -> Tensor:
    """The values of the rows that are used at their places, 0 elsewhere."""
    if places is None:
        return torch.where(used, values, 0.0)
    return values.new_zeros(used.shape).index_put((places,), values)
