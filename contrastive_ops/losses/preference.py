"""Preference losses, made of log-probabilities under two models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import softplus
from . import _arguments

KINDS = ("sigmoid", "ipo", "hinge")
ESTIMATES = ("k1", "k2", "k3")


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float | Tensor = 0.0,
    margin: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Direct preference optimisation and its relatives, from log-probabilities of two answers to each prompt.

    Equivalent to::

        r = (chosen - reference_chosen) - (rejected - reference_rejected)
        z = beta * r - margin
        sigmoid = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
        ipo = (r - 1 / (2 * beta)).square()
        hinge = F.relu(1 - z)

    Args:
        chosen: (N,) log-probability of the answer that was preferred: a sum over its tokens, as `linear_log_prob` gives
            it. Differentiable, as are the others.
        rejected: (N,) the same of the other answer.
        reference_chosen: (N,) the same of the first answer under the reference model; None for a loss without one.
        reference_rejected: (N,); given exactly where ``reference_chosen`` is.
        beta: how strongly to prefer; a number > 0. This and the next two may be (N,), one of each pair, differentiable.
        kind: "sigmoid" (DPO), "ipo" or "hinge" (SLiC).
        label_smoothing: the share of preferences that are wrong, in [0, 0.5); conservative DPO. For "sigmoid".
        margin: by how much ``beta r`` must be larger, such as the difference of two rewards; SimPO is that without a
            reference, of log-probabilities that are divided by the lengths. Not for "ipo".
        weight: (N,) weight >= 0 of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Log-probabilities may be -inf:
        an answer that is impossible has loss 0 where it was rejected and inf where it was chosen ("ipo": inf in both
        cases, with gradient 0). NaN where nothing can be said: two impossible answers, or one that is impossible under
        both models. Leave such pairs out by weight 0.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Rafailov et al., Direct Preference Optimization, 2023; Azar et al., A General Theoretical Paradigm to Understand
        Learning from Human Preferences, 2023 (IPO); Zhao et al., SLiC-HF, 2023; Meng et al., SimPO, 2024.

    Examples:
        >>> dpo(torch.tensor([-4.0]), torch.tensor([-9.0]), torch.tensor([-5.0]), torch.tensor([-8.0]), beta=1.0)
        tensor(0.1269)
    """
    name = "dpo"
    _arguments.check_reduction(name, reduction)
    checks.check_choice(name, "kind", kind, KINDS)
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError(f"{name}: reference_chosen and reference_rejected must both be given, or neither")
    checks.check_tensor(name, "chosen", chosen)
    if chosen.dim() != 1:
        raise ValueError(f"{name}: chosen must have shape (N,), got {checks.shape(chosen)}")
    given = {
        "chosen": chosen,
        "rejected": rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }
    dtype = checks.accumulator(chosen.dtype)
    vectors = []
    if weight is not None:
        _arguments.check_weight(name, weight, chosen.shape[0], "chosen", chosen)
    of_each = {"beta": (beta, "(0, inf)", 1), "label_smoothing": (label_smoothing, "[0, 0.5)", 0)}
    of_each["margin"] = (margin, "(-inf, inf)", 0)
    beta, label_smoothing, margin = (
        _arguments.one_or_each(name, key, _arguments.of_weighted(weight, each, other), interval, "chosen", chosen)
        for key, (each, interval, other) in of_each.items()
    )
    for key, option, of_kinds in (("label_smoothing", label_smoothing, KINDS[1:]), ("margin", margin, ("ipo",))):
        if kind in of_kinds and (isinstance(option, Tensor) or option):
            raise ValueError(f'{name}: {key} must be 0 for kind="{kind}", got {checks.shown(option)}')
    for key, each in given.items():
        if each is not None:
            checks.check_vector(name, key, each, chosen.shape[0], "chosen", chosen)
            vectors.append(_arguments.of_weighted(weight, each.to(dtype)))
    ratio = vectors[0] - vectors[1]
    if reference_chosen is not None:
        ratio = (vectors[0] - vectors[2]) - (vectors[1] - vectors[3])
    z = beta * ratio - margin
    if kind == "ipo":
        losses = _square(ratio - 1 / (2 * beta))
    elif kind == "hinge":
        losses = (1 - z).relu()
    else:
        losses = softplus(-z)
        if (
            isinstance(label_smoothing, Tensor) or label_smoothing
        ):  # not softplus(-z) + label_smoothing * z, which is inf - inf for an impossible answer
            losses = (1 - label_smoothing) * losses + label_smoothing * softplus(z)
    return _arguments.reduce_rows(losses, weight, reduction)


def log_odds(log_prob: Tensor) -> Tensor:
    """Logarithm of p / (1 - p), the odds of what has a probability p whose logarithm is given: the scores of ORPO.

    Equivalent to::

        log_prob - torch.log(1 - torch.exp(log_prob))

    but with all digits for p near 1, where that subtracts equal numbers, and for p near 0. ORPO adds to the chosen
    answer's negative log-likelihood, of log-probabilities that are means over tokens::

        dpo(log_odds(chosen), log_odds(rejected), beta=1.0)

    Args:
        log_prob: (...) float32, bfloat16, float16 or float64, <= 0, as `linear_log_prob` gives it for tokens, or means
            of such numbers. Differentiable.

    Returns:
        Tensor of that shape, in float32 (float64 for float64 inputs); inf for log-probability 0, -inf for -inf, NaN for
        numbers above 0, which belong to no probability.

    Raises:
        TypeError: what is no floating tensor.

    Source:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024.

    Examples:
        >>> log_odds(torch.tensor([0.5, 0.9]).log())
        tensor([0.0000, 2.1972])
        >>> log_odds(torch.tensor([-1e-9]))                                     # 1 - p is 1e-9, not 0
        tensor([20.7233])
    """
    log_prob = checks.check_floating("log_odds", "log_prob", log_prob)
    log_prob = log_prob.to(checks.accumulator(log_prob.dtype))
    # log(1 - p), by that one of two functions that keeps its digits.
    likely = log_prob > -math.log(2)
    near = torch.where(likely, log_prob, -1.0)
    far = torch.where(likely, -1.0, log_prob)
    return log_prob - torch.where(likely, (-near.expm1()).log(), torch.log1p(-far.exp()))


def kl_estimate(log_prob: Tensor, reference_log_prob: Tensor, *, kind: str = "k3") -> Tensor:
    """Estimate KL(policy || reference) token by token from what the policy sampled, without the other classes.

    Equivalent to::

        r = reference_log_prob - log_prob
        k1 = -r
        k2 = r.square() / 2
        k3 = r.exp() - 1 - r

    Args:
        log_prob: (...) logarithm of the policy's probability of each sampled token, as `linear_log_prob` gives it.
            Differentiable.
        reference_log_prob: of the same shape under the reference model; detach it, or compute it without gradients.
        kind: "k1": no bias, but of any sign and of a large variance; "k2": small variance, some bias, and the gradient
            of the divergence where tokens come from the policy itself; "k3": no bias, small variance, never negative.

    Returns:
        Tensor of that shape, in float32 (float64 for float64 inputs); 0 for tokens whose log-probabilities are both 0,
        as those of ignored labels are; infinite for tokens that are impossible under one of the models, NaN under both.
        `linear_kl` has the divergence itself.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Schulman, Approximating KL Divergence, 2020; k3 is the penalty of GRPO (Shao et al., DeepSeekMath, 2024).

    Examples:
        >>> kl_estimate(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5]))
        tensor([0.1065, 0.1487])
    """
    name = "kl_estimate"
    checks.check_choice(name, "kind", kind, ESTIMATES)
    for key, each in (("log_prob", log_prob), ("reference_log_prob", reference_log_prob)):
        if not checks.check_tensor(name, key, each).is_floating_point():
            raise TypeError(f"{name}: {key} must be a floating tensor, got {each.dtype}")
    if log_prob.shape != reference_log_prob.shape:
        raise ValueError(
            f"{name}: reference_log_prob must have the shape of log_prob, "
            f"got {checks.shape(log_prob)} and {checks.shape(reference_log_prob)}"
        )
    dtype = checks.accumulator(log_prob.dtype)
    r = reference_log_prob.to(dtype) - log_prob.to(dtype)
    if kind == "k1":
        return -r
    if kind == "k2":
        return _square(r) / 2
    impossible = r == torch.inf  # where exp(r) - r is inf - inf
    r = torch.where(impossible, 0.0, r)
    return torch.where(impossible, torch.inf, r.expm1() - r)


def _square(x: Tensor) -> Tensor:
    """x^2 whose slope is 0 where it is infinite: a row that does not count hands back 0 times its slope."""
    infinite = x.isinf()
    return torch.where(infinite, torch.inf, torch.where(infinite, 0.0, x).square())
