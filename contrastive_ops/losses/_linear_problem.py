"""What losses of a large softmax share: its heads, the rows they use, cross entropies."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.numerics import softplus
from ..core.ordered import ordered_sum
from ..core.problem import Problem
from ..ops.similarity_loss import similarity_loss
from ..ops.similarity_reduce import fold, needs_gradient
from . import _arguments
from ._linear_chunks import statistics
from ._linear_rows import Rows


class Options(NamedTuple):
    """What a cross entropy may have beside labels; 0 for nothing."""

    label_smoothing: float
    z_loss: float
    softcap: float


class Softmax(NamedTuple):
    """Rows (T, D), classes (V, D) and biases (V,) of one head."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None


class Head:
    """One softmax over the rows that it uses, as the primitives take them.

    Attributes:
        rows: (T, D) those that are used.
        weight: (V, D).
        bias: (V,).
        target: (T,) their labels, or (T, V) probabilities.
        share: (T,) what each of them counts.
        classes: (V,) the weight of each class.
        own: (T,) that of each label's class, or None.
    """

    def __init__(
        self,
        names: tuple[str, str, str],
        softmax: Softmax,
        labels: Tensor,
        used: Tensor,
        token_weight: Tensor | None,
        classes: Tensor | None,
    ) -> None:
        rows, self.weight, self.bias = softmax
        self.names, self.classes, self.own = names, classes, None
        self.probabilities = labels.dim() == 2
        if token_weight is not None:
            used = used & (token_weight.detach() != 0)
        self.used = used
        self.places, (self.rows, self.target) = of_used(used, rows, labels)
        dtype = checks.accumulator(rows.dtype)
        share = used.to(dtype) if token_weight is None else left_out(token_weight.to(dtype), used)
        self.share = share if self.places is None else share[self.places]
        if not self.probabilities:
            checks.check_index_values(names[0], "labels", self.target, self.weight.shape[0])
            self.own = None if classes is None else classes[self.target]

    def log_prob(self, softcap: float, memory_budget: int | None, backend: str) -> Tensor:
        """The log-probability of each row."""
        if softcap:
            return -statistics(Rows(self.rows, self.weight, self.bias, self.target, softcap=softcap))[0]
        others, own = self._folded(memory_budget, backend)
        return -softplus(others - own)

    def log_prob_and_entropy(self, softcap: float) -> tuple[Tensor, Tensor]:
        """The same and the entropy of each row, of the same logits."""
        given = (self.rows, self.weight, self.bias, self.target)
        return statistics(Rows(*given, kind="entropy", softcap=softcap))

    def losses(self, options: Options, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor | None]:
        """The cross entropies of the rows, and the terms of their z-loss or None; both count as the rows do."""
        if self.probabilities or options.softcap:
            smoothing, cap = options.label_smoothing, options.softcap
            given = (self.rows, self.weight, self.bias, self.target, self.classes)
            losses, lse = statistics(Rows(*given, label_smoothing=smoothing, softcap=cap))
        else:
            others, own = self._folded(memory_budget, backend)
            losses = softplus(others - own)
            of_lse, of_own, evenly = self._smoothed(options)
            losses = losses if of_lse is None else of_lse * losses
            losses = losses if of_own is None or evenly is None else losses + (of_own * own - evenly)
            lse = torch.logaddexp(others, own) if options.z_loss else others
        return losses * self.share, self.share * (options.z_loss * lse.square()) if options.z_loss else None

    def total(self, options: Options, backend: str) -> Tensor:
        """The sum of the cross entropies, with gradients from the forward pass."""
        of_lse, of_own, evenly = self._smoothed(options)
        total = similarity_loss(
            self._problem(),
            weight=self.share if of_lse is None else self.share * of_lse,
            target_weight=None if of_own is None else self.share * of_own,
            reduction="sum",
            backend=backend,
        )
        return total if evenly is None else total - ordered_sum(self.share * evenly)

    def _folded(self, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
        """The logsumexp over the other classes, and the logit of the label."""
        folded = fold(self._problem(), memory_budget=memory_budget, backend=backend)
        return folded.rows[0], folded.target

    def _problem(self) -> Problem:
        return Problem.of(self.names, self.rows, self.weight, None, self.bias, self.target)

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


class LargeSoftmax:
    """A large softmax with its labels, or several over the same rows.

    Attributes:
        heads: one for each position of the matrix between its first and its last dimension.
        shape: that of the labels.
    """

    def __init__(
        self,
        name: str,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        ignore_index: int | None,
        weight: Tensor | None = None,
        class_weight: Tensor | None = None,
    ) -> None:
        softmaxes = checked(name, ("hidden", hidden), ("head", head), ("bias", bias))
        rows, self.shape = softmaxes[0].rows, shape_of(hidden, head)
        if class_weight is not None:
            checks.check_vector(name, "class_weight", class_weight, head.shape[0], "hidden", rows)
            checks.check_constant(name, "class_weight", class_weight)
            class_weight = class_weight.to(checks.accumulator(rows.dtype))
        of_rows: Any = [None] * len(softmaxes)
        if weight is not None:
            of_rows = split(check_entries(name, "weight", weight, self.shape, hidden), softmaxes)
        self.probabilities = (
            isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == len(self.shape) + 1
        )
        if self.probabilities:
            labels = self._checked_probabilities(name, labels, hidden, head, ignore_index)
            used = torch.ones(rows.shape[:1], dtype=torch.bool, device=rows.device)
            marked = [(each, used) for each in labels.unbind(2)]
        else:
            check_entries(name, "labels", labels, self.shape, hidden)
            flat = checks.check_index(name, "labels", labels.reshape(-1), None, "hidden", rows)
            ignored = -100 if ignore_index is None else ignore_index
            marked = [(each, each != ignored) for each in split(flat, softmaxes)]
        names = (name, "hidden", "head")
        self.heads = [
            Head(names, softmax, *each, weight_of, class_weight)
            for softmax, each, weight_of in zip(softmaxes, marked, of_rows, strict=True)
        ]

    def _checked_probabilities(
        self, name: str, labels: Tensor, hidden: Tensor, head: Tensor, ignore_index: int | None
    ) -> Tensor:
        """(T, V, heads)."""
        rows, heads = hidden.shape[:-1], head.shape[1:-1]
        shape = (*rows, head.shape[0], *heads)
        if labels.shape != shape:
            raise ValueError(
                f"{name}: labels must be probabilities of shape {tuple(shape)}, got {checks.shape(labels)}"
            )
        if ignore_index not in (None, -100):
            raise ValueError(f"{name}: ignore_index must be None where labels are probabilities, got {ignore_index}")
        checks.check_device(name, "hidden", hidden, "labels", labels)
        return labels.reshape(prod(rows), head.shape[0], prod(heads))

    def cross_entropy(
        self, options: Options, reduction: str, memory_budget: int | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """The loss and the part of it that is the z-loss."""
        if reduction != "none" and self._formed_in_forward(options):
            total, more = added([head.total(options, backend) for head in self.heads]), None
        else:
            found = [head.losses(options, memory_budget, backend) for head in self.heads]
            losses, squares = [each for each, _ in found], [each for _, each in found if each is not None]
            if reduction == "none":
                loss = self.spread(losses)
                z_loss = self.spread(squares) if squares else torch.zeros_like(loss)
                return loss + z_loss if squares else loss, z_loss
            total = added([ordered_sum(each) for each in losses])
            more = added([ordered_sum(each) for each in squares]) if squares else None
        if reduction == "mean":
            shares = [head.share for head in self.heads]
            sizes = [each.share if each.own is None else each.share * each.own for each in self.heads]
            total, more = _mean(total, sizes), None if more is None else _mean(more, shares)
        return (total, torch.zeros_like(total)) if more is None else (total + more, more)

    def _formed_in_forward(self, options: Options) -> bool:
        """Whether the gradients of a sum are wanted, and can be formed in the forward pass."""
        if self.probabilities or options.z_loss or options.softcap:
            return False
        return any(needs_gradient(each.rows, each.weight, each.bias, each.share) for each in self.heads)

    def spread(self, values: list[Tensor]) -> Tensor:
        """Values of the rows of each head in the shape of the labels."""
        heads = zip(values, self.heads, strict=True)
        return joined([spread(each, head.used, head.places) for each, head in heads]).view(self.shape)


def joined(values: list[Tensor]) -> Tensor:
    """Values of the same rows by several heads, side by side."""
    return values[0] if len(values) == 1 else torch.stack(values, 1)


def added(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else ordered_sum(torch.stack(values))


def _mean(total: Tensor, sizes: list[Tensor]) -> Tensor:
    size = sizes[0] if len(sizes) == 1 else torch.cat(sizes)
    return _arguments.divide(total, size, size)


def cap_of(name: str, key: str, softcap: float | None) -> float:
    return 0.0 if softcap is None else checks.number(name, key, softcap, "(0, inf)")


def checked(
    name: str, hidden: tuple[str, Tensor], head: tuple[str, Tensor], bias: tuple[str, Tensor | None]
) -> list[Softmax]:
    """The rows with the classes and the bias of each head, cast as autocast asks."""
    (hidden_name, x), (head_name, y), (bias_name, b) = hidden, head, bias
    x, y, b = autocast.cast(x, y, b)
    if checks.check_tensor(name, hidden_name, x).dim() < 1:
        raise ValueError(f"{name}: {hidden_name} must be a tensor (..., D), got {checks.shape(x)}")
    # Not by reshape, which cannot tell how many rows of no numbers there are.
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    if checks.check_floating(name, head_name, y).dim() < 2:
        raise ValueError(f"{name}: {head_name} must be a tensor (V, D) or (V, ..., D), got {checks.shape(y)}")
    size, heads = y.shape[0], prod(y.shape[1:-1])
    if heads == 0:
        raise ValueError(
            f"{name}: {head_name} must have no size of 0 between its first and its last, got {checks.shape(y)}"
        )
    weights = y.flatten(1, -2).unbind(1) if y.dim() > 2 else (y,)
    checks.check_matrices(name, hidden_name, rows, head_name, weights[0])
    biases: Any = (None,) * heads
    if b is not None and y.dim() == 2:
        checks.check_vector(name, bias_name, b, size, hidden_name, rows)
        biases = (b,)
    elif b is not None:
        b = check_entries(name, bias_name, b, y.shape[:-1], x)
        biases = b.flatten(1).unbind(1)
        checks.check_vector(name, bias_name, biases[0], size, hidden_name, rows)
    # One source of all: its gradient is summed over the heads before it is rounded to the dtype of the rows.
    same_rows = (rows,) if heads == 1 else rows.expand(heads, *rows.shape).unbind(0)
    return [Softmax(*each) for each in zip(same_rows, weights, biases, strict=True)]


def shape_of(hidden: Tensor, head: Tensor) -> tuple[int, ...]:
    """That of a value of each row and head."""
    return (*hidden.shape[:-1], *head.shape[1:-1])


def split(values: Tensor, softmaxes: list[Softmax]) -> tuple[Tensor, ...]:
    """Values of that shape as the vectors of the heads."""
    heads = len(softmaxes)
    return (values.reshape(-1),) if heads == 1 else values.reshape(-1, heads).unbind(1)


def check_entries(name: str, key: str, given: object, shape: tuple[int, ...], hidden: Tensor) -> Tensor:
    """`given` must have this shape, and be where `hidden` is."""
    given = checks.check_tensor(name, key, given)
    if given.shape != shape:
        raise ValueError(f"{name}: {key} must have shape {tuple(shape)}, got {checks.shape(given)}")
    checks.check_device(name, "hidden", hidden, key, given)
    return given


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
