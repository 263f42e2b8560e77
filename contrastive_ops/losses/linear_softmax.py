"""A large softmax on top of a linear layer, such as a vocabulary: its log-probabilities, cross entropy and divergences.

gradients                              multiply-adds (2 each), T rows, V classes
linear_log_prob                   recomputed in backward, or kept        8 T V D, 6 if kept
linear_log_prob, entropy          recomputed in backward (plain torch)   8 T V D
linear_cross_entropy, mean, sum   in the forward pass (weighted_total)   6 T V D
linear_kl                         recomputed in backward (plain torch)   8 T V D, and 4 T V D for the reference
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autocast, _checks
from .._masks import left_out
from .._ordered import ordered_sum
from ..ops.similarity_reduce import fold, needs_gradient, weighted_total
from ..reference.similarity_reduce import softplus
from . import _arguments, _linear_chunks

DIRECTIONS = ("reverse", "forward")


class LogProb(NamedTuple):
    """What `linear_log_prob` returns with ``entropy=True``.

    Attributes:
        log_prob: logarithm of the probability of each label.
        entropy: of each row's softmax, in nats.
    """

    log_prob: Tensor
    entropy: Tensor


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | LogProb:
    """Log-probability of each label under the softmax of a linear layer, whose logits are never stored.

    Equivalent to::

        log_prob = F.linear(hidden, weight, bias).float().log_softmax(-1)
        selected = log_prob.gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == ignore_index, 0.0)
        entropy = torch.special.entr(log_prob.exp()).sum(-1).masked_fill(labels == ignore_index, 0.0)

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, such as (B, L, D).
        weight: (V, D) of the same dtype, as `torch.nn.Linear` stores it.
        labels: int64, shaped as ``hidden`` without its last dimension; in [0, V), or `ignore_index`.
        bias: (V,).
        ignore_index: a label that stands for none; such rows are left out of the work, and have value and gradient 0.
        entropy: also return the entropy of each row. With "auto" and "reference", both are then made of the same
            logits by plain torch, in chunks; with another backend, the entropy alone is.
        memory_budget: bytes of logits kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        Tensor shaped as ``labels``, in float32 (float64 for float64 inputs), never positive; or `LogProb`. Not reduced,
        so that sums over sequences (``.sum(-1)``), ratios and policy gradients can be made of it.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((T + V) D) beside ``memory_budget`` for T rows; work 8 T V D with gradients of any cotangent. A mean
        or a weighted sum of them takes 6 T V D as `linear_cross_entropy`.

    Source:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.

    Example:
        >>> hidden, head = torch.randn(2, 5, 16), torch.nn.Linear(16, 100)
        >>> labels = torch.randint(100, (2, 5))
        >>> labels[1, 3:] = -100                                              # the second sequence has three tokens
        >>> linear_log_prob(hidden, head.weight, labels, bias=head.bias).sum(-1).shape
        torch.Size([2])
    """
    name = "linear_log_prob"
    problem = _Problem(name, hidden, weight, labels, bias, ignore_index)
    with _autocast.disabled(problem.rows):
        if entropy and backend in ("auto", "reference"):
            found = _linear_chunks.log_prob_and_entropy(problem.rows, problem.weight, problem.bias, problem.target)
            return LogProb(*map(problem.spread, found))
        log_prob = problem.spread(problem.log_prob(memory_budget, backend))
        if not entropy:
            return log_prob
        _, of_rows = _linear_chunks.log_prob_and_entropy(problem.rows, problem.weight, problem.bias, problem.target)
        return LogProb(log_prob, problem.spread(of_rows))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of a linear layer's softmax, whose logits are never stored: the loss of language models.

    Equivalent to::

        logits = F.linear(hidden, weight, bias).float().flatten(0, -2)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="none")
        (token_weight.flatten() * loss).sum() / token_weight[labels != ignore_index].sum()

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, such as (B, L, D).
        weight: (V, D) of the same dtype, as `torch.nn.Linear` stores it.
        labels: int64, shaped as ``hidden`` without its last dimension; in [0, V), or `ignore_index`.
        bias: (V,).
        ignore_index: a label that stands for none; such rows are left out of the work.
        token_weight: shaped as ``labels``, the weight of each row; the mean divides by the sum of those that are used.
            Differentiable. With ``reduction="sum"`` of any sign, such as advantages: a policy gradient. A row of weight
            0 is left out like one whose label is ignored, whatever it and its label hold.
        reduction: "mean", "sum" or "none".
        memory_budget: bytes of logits kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or shaped as ``labels`` for ``reduction="none"``, in float32 (float64 for float64 inputs). The mean is 0
        where every label is ignored.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`; a negative weight in a mean.

    Note:
        Memory O((T + V) D) for T rows. A mean or sum forms its gradients in the forward pass: 6 T V D.

    Example:
        >>> hidden, head, labels = torch.randn(2, 5, 16), torch.nn.Linear(16, 100), torch.randint(100, (2, 5))
        >>> loss = linear_cross_entropy(hidden, head.weight, labels, bias=head.bias)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(head(hidden).mT, labels), atol=1e-5)
        True
    """
    name = "linear_cross_entropy"
    _arguments.check_reduction(name, reduction)
    flat = None
    if token_weight is not None:
        _check_entries(name, "token_weight", token_weight, hidden)
        flat = token_weight.reshape(-1)
        if reduction == "mean":
            _arguments.check_weight(name, flat, flat.shape[0], "hidden", hidden, "token_weight")
    problem = _Problem(name, hidden, weight, labels, bias, ignore_index, flat)
    share = problem.used.to(_checks.accumulator(problem.rows.dtype))
    if flat is not None:
        share = left_out(flat.to(share.dtype), problem.used)
    with _autocast.disabled(problem.rows):
        given = (problem.rows, problem.weight, problem.bias, token_weight)
        if reduction == "none" or not needs_gradient(*given):
            losses = problem.spread(-problem.log_prob(memory_budget, backend))
            if reduction == "none":
                return losses if token_weight is None else losses * share.view(labels.shape)
            total = ordered_sum(losses.reshape(-1) * share)
        else:
            total = weighted_total(
                problem.rows,
                problem.weight,
                scale=1.0,
                col_bias=problem.bias,
                target=problem.target,
                weight=share if problem.places is None else share[problem.places],
                names=problem.names,
                backend=backend,
            )
    return total if reduction == "sum" else _arguments.divide(total, share, share)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    mask: Tensor | None = None,
    direction: str = "reverse",
) -> Tensor:
    """Divergence of two linear softmaxes, token by token and over all classes, whose logits are never stored.

    Equivalent to::

        log_p = F.linear(hidden, weight, bias).float().log_softmax(-1)
        log_q = F.linear(reference_hidden, reference_weight, reference_bias).float().log_softmax(-1).detach()
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1).masked_fill(~mask, 0.0)
        forward = (log_q.exp() * (log_q - log_p)).sum(-1).masked_fill(~mask, 0.0)

    Args:
        hidden: (..., D) of the policy, or of the student: float32, bfloat16, float16 or float64.
        weight: (V, D) of the same dtype, as `torch.nn.Linear` stores it.
        reference_hidden: (..., D') of the reference model, or of the teacher: the same tokens; D' and the dtype may be
            others. Nothing of the reference receives a gradient.
        reference_weight: (V, D') over the same classes. It may be ``weight`` itself.
        bias: (V,).
        reference_bias: (V,).
        mask: bool, shaped as ``hidden`` without its last dimension: which tokens count. Those that do not are left out
            of the work, and have value and gradient 0.
        direction: "reverse" for KL(policy || reference), the penalty of preference training and of distillation from
            what the student writes; "forward" for KL(reference || policy).

    Returns:
        Tensor shaped as ``hidden`` without its last dimension, in nats, in float32 (float64 for float64 inputs). Not
        reduced. Never negative: the terms are p log(p / q) - p + q, so that it keeps its digits where both models are
        nearly the same. Infinite where a class that one has is impossible for the other.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Plain torch, in chunks of at most D rows, or about a million logits. Memory O((T + V) (D + D')) for T rows,
        work 8 T V D + 4 T V D' with gradients.

    Source:
        The reverse divergence: Gu et al., MiniLLM, 2023; its estimates from samples alone: `kl_estimate`.

    Example:
        >>> policy, reference = torch.nn.Linear(16, 100), torch.nn.Linear(16, 100)
        >>> hidden = torch.randn(2, 5, 16)
        >>> linear_kl(hidden, policy.weight, hidden, reference.weight).shape
        torch.Size([2, 5])
    """
    name = "linear_kl"
    _checks.check_choice(name, "direction", direction, DIRECTIONS)
    rows, weight, bias = _checked(name, ("hidden", hidden), ("weight", weight), ("bias", bias))
    of_reference = ("reference_hidden", reference_hidden), ("reference_weight", reference_weight)
    q_rows, q_weight, q_bias = _checked(name, *of_reference, ("reference_bias", reference_bias))
    shape = hidden.shape[:-1]
    if reference_hidden.shape[:-1] != shape:
        raise ValueError(
            f"{name}: reference_hidden must have the tokens of hidden {tuple(shape)}, "
            f"got {tuple(reference_hidden.shape[:-1])}"
        )
    if q_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{name}: reference_weight must have the {weight.shape[0]} classes of weight, got {q_weight.shape[0]}"
        )
    _checks.check_device(name, "hidden", rows, "reference_hidden", q_rows)
    used = torch.ones(shape, dtype=torch.bool, device=rows.device) if mask is None else mask
    _check_entries(name, "mask", used, hidden)
    if used.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool, got {used.dtype}")
    used = used.reshape(-1)
    places, (rows, q_rows) = _of_used(used, rows, q_rows)
    with _autocast.disabled(rows):
        found = _linear_chunks.divergence(rows, weight, bias, q_rows, q_weight, q_bias, direction)
    return _spread(found, used, places).view(shape)


# ---- What they share -----------------------------------------------------------------------------------------------


class _Problem:
    """The rows that have a label, as the primitives take them."""

    def __init__(
        self,
        name: str,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        token_weight: Tensor | None = None,
    ) -> None:
        self.names = (name, "hidden", "weight")
        self.rows, self.weight, self.bias = _checked(name, ("hidden", hidden), ("weight", weight), ("bias", bias))
        _check_entries(name, "labels", labels, hidden)
        target = labels.reshape(-1)
        target = _checks.check_index(name, "labels", target, self.rows.shape[0], "hidden", self.rows)
        self.shape, self.used = labels.shape, target != ignore_index
        if token_weight is not None:
            self.used = self.used & (token_weight.detach() != 0)
        self.places, (self.rows, self.target) = _of_used(self.used, self.rows, target)
        _checks.check_index_values(name, "labels", self.target, weight.shape[0])

    def log_prob(self, memory_budget: int | None, backend: str) -> Tensor:
        """The log-probability of each row that has a label."""
        folded = fold(
            self.rows,
            self.weight,
            col_bias=self.bias,
            target=self.target,
            memory_budget=memory_budget,
            names=self.names,
            backend=backend,
        )
        return -softplus(folded.rows[0] - folded.target)

    def spread(self, values: Tensor) -> Tensor:
        """Values of these rows in the shape of the labels."""
        return _spread(values, self.used, self.places).view(self.shape)


def _checked(
    name: str, hidden: tuple[str, Tensor], weight: tuple[str, Tensor], bias: tuple[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows, classes and bias of one softmax, cast as autocast asks."""
    (hidden_name, x), (weight_name, y), (bias_name, b) = hidden, weight, bias
    x, y, b = _autocast.cast(x, y, b)
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"{name}: {hidden_name} must be a tensor (..., D), got {x!r}")
    rows = x.flatten(0, -2)  # not reshape, which cannot tell how many rows of no numbers there are
    _checks.check_matrices(name, hidden_name, rows, weight_name, y)
    if b is not None:
        _checks.check_vector(name, bias_name, b, y.shape[0], hidden_name, rows)
    return rows, y, b


def _check_entries(name: str, key: str, given: object, hidden: Tensor) -> None:
    """`given` must have one entry for each row of `hidden`."""
    if not isinstance(given, Tensor) or given.shape != hidden.shape[:-1]:
        got = _checks.shape(given) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name}: {key} must have shape {tuple(hidden.shape[:-1])}, got {got}")
    _checks.check_device(name, "hidden", hidden, key, given)


def _of_used(used: Tensor, *given: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Which rows are used, None for all, and these rows of what is given.

    A traced program must not depend on how many there are: it keeps all, with 0 for those that are not used.
    """
    if not _checks.may_read(used, waits=True):
        return None, tuple(left_out(each, used) for each in given)
    if bool(used.all()):
        return None, given
    places = used.nonzero()[:, 0]
    return places, tuple(each[places] for each in given)


def _spread(values: Tensor, used: Tensor, places: Tensor | None) -> Tensor:
    """The values of the rows that are used at their places, 0 elsewhere."""
    if places is None:
        return torch.where(used, values, 0.0)
    return values.new_zeros(used.shape).index_put((places,), values)
