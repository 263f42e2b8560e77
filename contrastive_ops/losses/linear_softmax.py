"""A large softmax on top of a linear layer, such as a vocabulary: its log-probabilities, cross entropy and divergences.

gradients                              multiply-adds (2 each), T rows, V classes
linear_log_prob                   recomputed in backward, or kept        8 T V D, 6 if kept
  capped, with the entropy        recomputed in backward (plain torch)   8 T V D
linear_cross_entropy, mean, sum   in the forward pass                    6 T V D
  with a z-loss                   recomputed in backward, or kept        8 T V D, 6 if kept
  capped, of probabilities        recomputed in backward (plain torch)   8 T V D
linear_kl                         recomputed in backward (plain torch)   8 T V D, and 4 T V D for the reference
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.results import named
from . import _arguments
from ._linear_chunks import statistics
from ._linear_problem import (
    LargeSoftmax,
    Options,
    cap_of,
    check_entries,
    checked,
    joined,
    of_used,
    shape_of,
    split,
    spread,
)
from ._linear_rows import Rows

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


@named
class CrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns with ``return_z_loss=True``.

    Attributes:
        loss: all of it, as without.
        z_loss: the part of it that is the z-loss.
    """

    loss: Tensor
    z_loss: Tensor


@overload
def linear_log_prob(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    entropy: Literal[False] = ...,
    softcap: float | None = ...,
    memory_budget: int | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def linear_log_prob(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    entropy: Literal[True],
    softcap: float | None = ...,
    memory_budget: int | None = ...,
    backend: str = ...,
) -> LogProb: ...


def linear_log_prob(
    hidden: Tensor,
    head: Tensor,
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

        logits = F.linear(hidden, head, bias).float()
        logits = softcap * torch.tanh(logits / softcap)                               # where there is one
        log_prob = logits.log_softmax(-1)
        selected = log_prob.gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == ignore_index, 0.0)
        entropy = torch.special.entr(log_prob.exp()).sum(-1).masked_fill(labels == ignore_index, 0.0)

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, such as (B, L, D).
        head: (V, D) of the same dtype, as `torch.nn.Linear` stores it; or (V, ..., D), heads as of
            `linear_cross_entropy`, for which labels and results are (..., heads).
        labels: int64, shaped as ``hidden`` without its last dimension; in [0, V), or `ignore_index`.
        bias: (V,), or (V, ...) of heads.
        ignore_index: a label that stands for none; such rows are left out of the work, and have value and gradient 0.
        entropy: also return the entropy of each row. With "auto" and "reference", both are then made of the same
            logits by plain torch, in chunks; with another backend, the entropy alone is.
        softcap: logits are ``softcap * tanh(logits / softcap)``, as those of Gemma 2; made by plain torch, in chunks.
            None for no cap.
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

    Examples:
        >>> hidden, head = torch.randn(2, 5, 16), torch.nn.Linear(16, 100)
        >>> labels = torch.randint(100, (2, 5))
        >>> labels[1, 3:] = -100                                              # the second sequence has three tokens
        >>> linear_log_prob(hidden, head.weight, labels, bias=head.bias).sum(-1).shape
        torch.Size([2])
    """
    name = "linear_log_prob"
    cap = cap_of(name, "softcap", softcap)
    checks.flag(name, "entropy", entropy)
    problem = LargeSoftmax(name, hidden, head, labels, bias, ignore_index)
    with autocast.disabled(hidden):
        if entropy:
            both = [softmax.log_prob_and_entropy(cap) for softmax in problem.heads]
            log_prob, entropies = (problem.spread(list(each)) for each in zip(*both, strict=True))
            if backend in ("auto", "reference"):
                return LogProb(log_prob, entropies)
        log_prob = problem.spread([softmax.log_prob(cap, memory_budget, backend) for softmax in problem.heads])
        return LogProb(log_prob, entropies) if entropy else log_prob


@overload
def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    weight: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    return_z_loss: Literal[False] = ...,
    memory_budget: int | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    weight: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    return_z_loss: Literal[True],
    memory_budget: int | None = ...,
    backend: str = ...,
) -> CrossEntropy: ...


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_z_loss: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | CrossEntropy:
    """Cross entropy of a linear layer's softmax, whose logits are never stored: the loss of language models.

    Equivalent to::

        logits = F.linear(hidden, head, bias).float().flatten(0, -2)
        logits = softcap * torch.tanh(logits / softcap)                               # where there is one
        options = {"weight": class_weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
        loss = F.cross_entropy(logits, labels.flatten(), reduction="none", **options)
        size = (weight.flatten() * class_weight[labels.flatten()])[labels.flatten() != ignore_index].sum()
        (weight.flatten() * loss).sum() / size
        # with z_loss, of the same tokens, whatever their classes weigh
        + z_loss * (weight.flatten() * logits.logsumexp(1).square()).sum() / weight.sum()

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, such as (B, L, D).
        head: (V, D) of the same dtype, as `torch.nn.Linear` stores it. Or (V, d1, ..., dK, D), torch's K-dimensional
            loss: d1 ... dK heads on the same rows, each with a softmax over its own V classes, such as the codebooks of
            an audio codec. Labels, `weight` and unreduced results then have the shape of ``hidden`` without its
            last dimension and (d1, ..., dK) after it.
        labels: int64, shaped as ``hidden`` without its last dimension; in [0, V), or `ignore_index`. Or probabilities
            (..., V), of heads (..., V, d1, ..., dK), of any floating dtype, differentiable, such as those of a teacher.
        bias: (V,), of heads (V, d1, ..., dK).
        ignore_index: a label that stands for none; such rows are left out of the work. None: -100. Probabilities have
            none.
        weight: shaped as ``labels``, the weight of each row; the mean divides by the sum of those that are used.
            Differentiable. With ``reduction="sum"`` of any sign, such as advantages: a policy gradient. A row of weight
            0 is left out like one whose label is ignored, whatever it and its label hold.
        class_weight: (V,) the weight of each class, torch's ``weight``; not differentiable. As in torch, the mean
            divides by the weights of the labels, but by the number of rows where labels are probabilities.
        label_smoothing: share in [0, 1] of the target that is spread evenly over the classes.
        z_loss: weight of the squared logsumexp, which keeps logits from drifting (Liger's ``lse_square_scale``).
        softcap: logits are ``softcap * tanh(logits / softcap)``, as those of Gemma 2. None for no cap.
        reduction: "mean", "sum" or "none".
        return_z_loss: also return, for a log, the part of the loss that is the z-loss, reduced in the same way.
        memory_budget: bytes of logits kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda". Capped logits and probabilities are the work of plain
            torch on all of them, whose products may depend on the number of threads in the last digit.

    Returns:
        0-d, or shaped as ``hidden`` without its last dimension for ``reduction="none"``, in float32 (float64 for
        float64 inputs). The mean is 0 where every label is ignored. Or `CrossEntropy`, whose parts are both
        differentiable.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`; a negative weight in a mean.

    Note:
        Memory O((T + V) D) for T rows, beside that of probabilities. A mean or sum forms its gradients in the forward
        pass: 6 T V D; with `z_loss`, `softcap` or probabilities they are recomputed in backward: 8 T V D. All of it
        for each head.

    Source:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024. The z-loss: Chowdhery et al., PaLM,
        2022. Options and their meaning as in ``torch.nn.functional.linear_cross_entropy`` of torch 2.13.

    Examples:
        >>> hidden, head, labels = torch.randn(2, 5, 16), torch.nn.Linear(16, 100), torch.randint(100, (2, 5))
        >>> loss = linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, label_smoothing=0.1)
        >>> truth = torch.nn.functional.cross_entropy(head(hidden).mT, labels, label_smoothing=0.1)
        >>> torch.allclose(loss, truth, atol=1e-5)
        True
    """
    name = "linear_cross_entropy"
    _arguments.check_reduction(name, reduction)
    checks.flag(name, "return_z_loss", return_z_loss)
    options = Options(
        checks.number(name, "label_smoothing", label_smoothing, "[0, 1]"),
        checks.number(name, "z_loss", z_loss, "[0, inf)"),
        cap_of(name, "softcap", softcap),
    )
    problem = LargeSoftmax(name, hidden, head, labels, bias, ignore_index, weight, class_weight)
    if weight is not None and reduction == "mean":
        flat = weight.reshape(-1)
        _arguments.check_weight(name, flat, flat.shape[0], "hidden", hidden, "weight")
    with autocast.disabled(hidden):
        found = problem.cross_entropy(options, reduction, memory_budget, backend)
    return CrossEntropy(*found) if return_z_loss else found[0]


def linear_kl(
    hidden: Tensor,
    head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    *,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    mask: Tensor | None = None,
    direction: str = "reverse",
    softcap: float | None = None,
    reference_softcap: float | None = None,
) -> Tensor:
    """Divergence of two linear softmaxes, token by token and over all classes, whose logits are never stored.

    Equivalent to::

        p = F.linear(hidden, head, bias).float()
        q = F.linear(reference_hidden, reference_head, reference_bias).float().detach()
        p, q = softcap * (p / softcap).tanh(), reference_softcap * (q / reference_softcap).tanh()    # where there are
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1).masked_fill(~mask, 0.0)
        forward = (log_q.exp() * (log_q - log_p)).sum(-1).masked_fill(~mask, 0.0)

    Args:
        hidden: (..., D) of the policy, or of the student: float32, bfloat16, float16 or float64.
        head: (V, D) of the same dtype, as `torch.nn.Linear` stores it; or (V, ..., D), heads as of
            `linear_cross_entropy`, for which mask and results are (..., heads).
        reference_hidden: (..., D') of the reference model, or of the teacher: the same tokens; D' and the dtype may be
            others. Nothing of the reference receives a gradient.
        reference_head: (V, D') over the same classes, or heads of them. It may be ``head`` itself.
        bias: (V,), or (V, ...) of heads.
        reference_bias: the same of the reference.
        mask: bool, shaped as ``hidden`` without its last dimension: which tokens count. Those that do not are left out
            of the work, and have value and gradient 0.
        direction: "reverse" for KL(policy || reference), the penalty of preference training and of distillation from
            what the student writes; "forward" for KL(reference || policy).
        softcap: logits of the policy are ``softcap * tanh(logits / softcap)``, as those of Gemma 2. None for no cap.
        reference_softcap: the same of the reference; a copy of a capped policy has the policy's.

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

    Examples:
        >>> policy, reference = torch.nn.Linear(16, 100), torch.nn.Linear(16, 100)
        >>> hidden = torch.randn(2, 5, 16)
        >>> linear_kl(hidden, policy.weight, hidden, reference.weight).shape
        torch.Size([2, 5])
    """
    name = "linear_kl"
    checks.check_choice(name, "direction", direction, DIRECTIONS)
    caps = cap_of(name, "softcap", softcap), cap_of(name, "reference_softcap", reference_softcap)
    heads = checked(name, ("hidden", hidden), ("head", head), ("bias", bias))
    of_reference = ("reference_hidden", reference_hidden), ("reference_head", reference_head)
    q_heads = checked(name, *of_reference, ("reference_bias", reference_bias))
    if reference_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: reference_hidden must have the tokens of hidden {tuple(hidden.shape[:-1])}, "
            f"got {tuple(reference_hidden.shape[:-1])}"
        )
    if reference_head.shape[:-1] != head.shape[:-1]:
        raise ValueError(
            f"{name}: reference_head must have the classes of head {tuple(head.shape[:-1])}, "
            f"got {tuple(reference_head.shape[:-1])}"
        )
    checks.check_device(name, "hidden", hidden, "reference_hidden", reference_hidden)
    shape = shape_of(hidden, head)
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=hidden.device)
    check_entries(name, "mask", mask, shape, hidden)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool, got {mask.dtype}")
    found = []
    with autocast.disabled(hidden):
        for p, q, used in zip(heads, q_heads, split(mask, heads), strict=True):
            places, (x, qx) = of_used(used, p.rows, q.rows)
            of_q = (qx, q.weight, q.bias)
            problem = Rows(x, p.weight, p.bias, None, None, *of_q, direction, 0.0, *caps)
            found.append(spread(statistics(problem)[0], used, places))
    return joined(found).view(shape)
