"""A large softmax on top of a linear layer, such as a vocabulary: its log-probabilities, cross entropy and divergences.

gradients                              multiply-adds (2 each), T rows, V classes
linear_log_prob                   recomputed in backward, or kept        8 T V D, 6 if kept
linear_log_prob, entropy          recomputed in backward (plain torch)   8 T V D
linear_cross_entropy, mean, sum   in the forward pass (weighted_total)   6 T V D
  with a z-loss                   recomputed in backward, or kept        8 T V D, 6 if kept
  capped, of probabilities        recomputed in backward (plain torch)   8 T V D
linear_kl                         recomputed in backward (plain torch)   8 T V D, and 4 T V D for the reference
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.ordered import ordered_sum
from ..core.results import named
from ..ops.similarity_reduce import needs_gradient
from . import _arguments, _linear_chunks, _linear_targets
from ._linear_problem import Options, Problem, cap_of, check_entries, checked, of_used, spread

DIRECTIONS = ("reverse", "forward")


@named
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
    softcap: float | None = None,
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
        softcap: logits are ``softcap * tanh(logits / softcap)``, as those of Gemma 2; made by plain torch, in chunks,
            and without entropies. None for no cap.
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
    cap = cap_of(name, softcap)
    if cap and entropy:
        raise NotImplementedError(
            f"{name}: entropy must be False with softcap, got True\n  the log-probabilities have both"
        )
    problem = Problem(name, hidden, weight, labels, bias, ignore_index)
    with autocast.disabled(problem.rows):
        if cap:
            given = (problem.rows, problem.weight, problem.bias, problem.target)
            return problem.spread(-_linear_targets.losses_and_lse(*given, None, 0.0, cap)[0])
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
    ignore_index: int | None = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of a linear layer's softmax, whose logits are never stored: the loss of language models.

    Equivalent to::

        logits = F.linear(hidden, weight, bias).float().flatten(0, -2)
        logits = softcap * torch.tanh(logits / softcap)                               # where there is one
        options = {"weight": class_weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
        loss = F.cross_entropy(logits, labels.flatten(), reduction="none", **options)
        size = (token_weight.flatten() * class_weight[labels.flatten()])[labels.flatten() != ignore_index].sum()
        (token_weight.flatten() * loss).sum() / size
        # with z_loss, of the same tokens, whatever their classes weigh
        + z_loss * (token_weight.flatten() * logits.logsumexp(1).square()).sum() / token_weight.sum()

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, such as (B, L, D).
        weight: (V, D) of the same dtype, as `torch.nn.Linear` stores it.
        labels: int64, shaped as ``hidden`` without its last dimension; in [0, V), or `ignore_index`. Or probabilities
            (..., V) of any floating dtype, differentiable, such as those of a teacher.
        bias: (V,).
        ignore_index: a label that stands for none; such rows are left out of the work. None: -100. Probabilities have
            none.
        token_weight: shaped as ``labels``, the weight of each row; the mean divides by the sum of those that are used.
            Differentiable. With ``reduction="sum"`` of any sign, such as advantages: a policy gradient. A row of weight
            0 is left out like one whose label is ignored, whatever it and its label hold.
        class_weight: (V,) the weight of each class, torch's ``weight``; not differentiable. As in torch, the mean
            divides by the weights of the labels, but by the number of rows where labels are probabilities.
        label_smoothing: share in [0, 1] of the target that is spread evenly over the classes.
        z_loss: weight of the squared logsumexp, which keeps logits from drifting (Liger's ``lse_square_scale``).
        softcap: logits are ``softcap * tanh(logits / softcap)``, as those of Gemma 2. None for no cap.
        reduction: "mean", "sum" or "none".
        memory_budget: bytes of logits kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda". Capped logits and probabilities are the work of plain
            torch on all of them, whose products may depend on the number of threads in the last digit.

    Returns:
        0-d, or shaped as ``hidden`` without its last dimension for ``reduction="none"``, in float32 (float64 for
        float64 inputs). The mean is 0 where every label is ignored.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`; a negative weight in a mean.

    Note:
        Memory O((T + V) D) for T rows, beside that of probabilities. A mean or sum forms its gradients in the forward
        pass: 6 T V D; with `z_loss`, `softcap` or probabilities they are recomputed in backward: 8 T V D.

    Source:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024. The z-loss: Chowdhery et al., PaLM,
        2022. Options and their meaning as in ``torch.nn.functional.linear_cross_entropy`` of torch 2.13.

    Example:
        >>> hidden, head, labels = torch.randn(2, 5, 16), torch.nn.Linear(16, 100), torch.randint(100, (2, 5))
        >>> loss = linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, label_smoothing=0.1)
        >>> truth = torch.nn.functional.cross_entropy(head(hidden).mT, labels, label_smoothing=0.1)
        >>> torch.allclose(loss, truth, atol=1e-5)
        True
    """
    name = "linear_cross_entropy"
    _arguments.check_reduction(name, reduction)
    options = Options(
        checks.number(name, "label_smoothing", label_smoothing, "[0, 1]"),
        checks.number(name, "z_loss", z_loss, "[0, inf)"),
        cap_of(name, softcap),
        class_weight,
    )
    flat = None
    if token_weight is not None:
        check_entries(name, "token_weight", token_weight, hidden)
        flat = token_weight.reshape(-1)
        if reduction == "mean":
            _arguments.check_weight(name, flat, flat.shape[0], "hidden", hidden, "token_weight")
    problem = Problem(name, hidden, weight, labels, bias, ignore_index, flat, options)
    share = problem.used.to(checks.accumulator(problem.rows.dtype))
    if flat is not None:
        share = left_out(flat.to(share.dtype), problem.used)
    used_share = share if problem.places is None else share[problem.places]
    with autocast.disabled(problem.rows):
        given = (problem.rows, problem.weight, problem.bias, token_weight)
        if reduction == "none" or not needs_gradient(*given, problem.target) or not problem.weighted_total_has(options):
            losses, squares = problem.losses(options, memory_budget, backend)
            if reduction == "none":
                losses = problem.spread(losses if squares is None else losses + squares)
                return losses if token_weight is None else losses * share.view(problem.shape)
            total = ordered_sum(losses * used_share)
            more = None if squares is None else ordered_sum(squares * used_share)
        else:
            total, more = problem.total(options, used_share, backend), None
    if reduction == "sum":
        return total if more is None else total + more
    sizes = used_share if problem.own is None else used_share * problem.own
    mean = _arguments.divide(total, sizes, sizes)
    return mean if more is None else mean + _arguments.divide(more, used_share, used_share)


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
    checks.check_choice(name, "direction", direction, DIRECTIONS)
    rows, weight, bias = checked(name, ("hidden", hidden), ("weight", weight), ("bias", bias))
    of_reference = ("reference_hidden", reference_hidden), ("reference_weight", reference_weight)
    q_rows, q_weight, q_bias = checked(name, *of_reference, ("reference_bias", reference_bias))
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
    checks.check_device(name, "hidden", rows, "reference_hidden", q_rows)
    used = torch.ones(shape, dtype=torch.bool, device=rows.device) if mask is None else mask
    check_entries(name, "mask", used, hidden)
    if used.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool, got {used.dtype}")
    used = used.reshape(-1)
    places, (rows, q_rows) = of_used(used, rows, q_rows)
    with autocast.disabled(rows):
        found = _linear_chunks.divergence(rows, weight, bias, q_rows, q_weight, q_bias, direction)
    return spread(found, used, places).view(shape)
