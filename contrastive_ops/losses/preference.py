"""Log-probabilities under a large softmax, and the preference losses that are made of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autocast, _checks
from ..ops.similarity_reduce import fold
from ..reference.similarity_reduce import softplus
from ..reference.stream import stream_rows
from . import _arguments

KINDS = ("sigmoid", "ipo", "hinge")


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
        entropy: also return the entropy of each row. A row that is computed by plain torch, in chunks.
        memory_budget: bytes of logits kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        Tensor shaped as ``labels``, in float32 (float64 for float64 inputs), never positive; or `LogProb`. Not reduced,
        so that sums over sequences (``.sum(-1)``), ratios and policy gradients can be made of it.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((T + V) D) beside ``memory_budget`` for T rows; work 8 T V D with gradients of any cotangent. For the
        mean of the cross entropy alone ``info_nce(hidden, weight, target=labels, scale=1.0)`` takes 6 T V D.

    Source:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.

    Example:
        >>> hidden, head = torch.randn(2, 5, 16), torch.nn.Linear(16, 100)
        >>> labels = torch.randint(100, (2, 5))
        >>> labels[1, 3:] = -100                                              # the second sequence has three tokens
        >>> linear_log_prob(hidden, head.weight, labels, bias=head.bias).sum(-1).shape
        torch.Size([2])
    """
    name, names = "linear_log_prob", ("linear_log_prob", "hidden", "weight")
    hidden, weight, bias = _autocast.cast(hidden, weight, bias)
    if not isinstance(hidden, Tensor) or hidden.dim() < 2:
        raise ValueError(f"{name}: hidden must be a tensor (..., D), got {hidden!r}")
    if not isinstance(labels, Tensor) or labels.shape != hidden.shape[:-1]:
        got = _checks.shape(labels) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name}: labels must have shape {tuple(hidden.shape[:-1])}, got {got}")
    rows, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    _checks.check_matrices(name, "hidden", rows, "weight", weight)
    _checks.check_index(name, "labels", target, rows.shape[0], "hidden", rows)
    if bias is not None:
        _checks.check_vector(name, "bias", bias, weight.shape[0], "hidden", rows)
    used = target != ignore_index
    # A traced program must not depend on how many there are.
    places = None if torch.compiler.is_compiling() or bool(used.all()) else used.nonzero()[:, 0]
    if places is not None:
        rows, target = rows[places], target[places]
    target = torch.where(target == ignore_index, 0, target)
    _checks.check_index_values(name, "labels", target, weight.shape[0])
    with _autocast.disabled(rows):
        folded = fold(
            rows,
            weight,
            col_bias=bias,
            target=target,
            memory_budget=memory_budget,
            names=names,
            backend=backend,
        )
        found = [-softplus(folded.rows[0] - folded.target)]
        if entropy:
            found.append(_entropy(rows, weight, bias))
    results = [_spread(each, used, places).view(labels.shape) for each in found]
    return LogProb(*results) if entropy else results[0]


def _entropy(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    def of_chunk(logits: Tensor, _: slice) -> Tensor:
        log_prob = (logits if bias is None else logits + bias).log_softmax(1)
        return -(log_prob.exp() * log_prob.clamp_min(torch.finfo(log_prob.dtype).min)).sum(1)

    return stream_rows(of_chunk, rows, weight)  # type: ignore[return-value]


def _spread(values: Tensor, used: Tensor, places: Tensor | None) -> Tensor:
    """The values of the rows that are used at their places, 0 elsewhere."""
    if places is None:
        return torch.where(used, values, 0.0)
    return values.new_zeros(used.shape).index_put((places,), values)


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
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
        beta: how strongly to prefer; a number > 0.
        kind: "sigmoid" (DPO), "ipo" or "hinge" (SLiC).
        label_smoothing: the share of preferences that are wrong, in [0, 0.5); conservative DPO. For "sigmoid".
        margin: by how much ``beta r`` must be larger; SimPO is that without a reference, of log-probabilities that are
            divided by the lengths. Not for "ipo".
        weight: (N,) weight >= 0 of each pair; the mean divides by its sum. Differentiable.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Rafailov et al., Direct Preference Optimization, 2023; Azar et al., A General Theoretical Paradigm to Understand
        Learning from Human Preferences, 2023 (IPO); Zhao et al., SLiC-HF, 2023; Meng et al., SimPO, 2024.

    Example:
        >>> dpo(torch.tensor([-4.0]), torch.tensor([-9.0]), torch.tensor([-5.0]), torch.tensor([-8.0]), beta=1.0)
        tensor(0.1269)
    """
    name = "dpo"
    _arguments.check_reduction(name, reduction)
    _checks.check_choice(name, "kind", kind, KINDS)
    _arguments.check_number(name, "beta", beta, "(0, inf)")
    _arguments.check_number(name, "label_smoothing", label_smoothing, "[0, 0.5)")
    _arguments.check_number(name, "margin", margin, "(-inf, inf)")
    if kind != "sigmoid" and label_smoothing:
        raise ValueError(f'{name}: label_smoothing must be 0 for kind="{kind}", got {label_smoothing}')
    if kind == "ipo" and margin:
        raise ValueError(f'{name}: margin must be 0 for kind="ipo", got {margin}')
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError(f"{name}: reference_chosen and reference_rejected must both be given, or neither")
    if not isinstance(chosen, Tensor) or chosen.dim() != 1:
        got = _checks.shape(chosen) if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ValueError(f"{name}: chosen must have shape (N,), got {got}")
    given = {
        "chosen": chosen,
        "rejected": rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
    }
    dtype = _checks.accumulator(chosen.dtype)
    vectors = []
    for key, each in given.items():
        if each is not None:
            _checks.check_vector(name, key, each, chosen.shape[0], "chosen", chosen)
            vectors.append(each.to(dtype))
    if weight is not None:
        _arguments.check_weight(name, weight, chosen.shape[0], "chosen", chosen)
    ratio = vectors[0] - vectors[1]
    if reference_chosen is not None:
        ratio = (vectors[0] - vectors[2]) - (vectors[1] - vectors[3])
    z = beta * ratio - margin
    if kind == "ipo":
        losses = (ratio - 1 / (2 * beta)).square()
    elif kind == "hinge":
        losses = (1 - z).relu()
    else:
        losses = softplus(-z) + label_smoothing * z
    return _arguments.reduce_rows(losses, weight, reduction)
