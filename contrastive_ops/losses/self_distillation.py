"""Self-distillation with prototypes, of which there may be many: DINO, iBOT, SwAV.

The cross entropy of two softmaxes over prototypes is `similarity_distillation` with a bias of the teacher's columns,
whatever balances them: minus the centre over the temperature, or the potentials of Sinkhorn's plan. So no matrix of
rows and prototypes is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.state import State
from ..core.unit_rows import unit_rows
from ..ops.similarity_reduce import budget_bytes
from ..ops.sinkhorn import Ranks, column_potentials
from . import _arguments
from .distillation import similarity_distillation

ASSIGNMENTS = ("softmax", "sinkhorn")


class RunningCentre(State):
    """The teacher's mean logits of each prototype, averaged over steps: ``centre = running(teacher, prototypes)``.

    Args:
        prototypes: K, how many there are.
        momentum: weight of a batch, in (0, 1]; DINO's ``center_momentum`` is 1 less this.
        normalize: the logits are cosines, as those of `dino` are.

    Note:
        State that keeps its digits and moves with a model, 0 at first. In evaluation nothing is updated, and numbers
        that are not finite are not stored.

    Source:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021.

    Examples:
        >>> running, teacher, prototypes = RunningCentre(7), torch.randn(5, 4), torch.randn(7, 4)
        >>> bool((running(teacher, prototypes) == 0).all()), bool((running(teacher, prototypes) == 0).any())
        (True, False)
    """

    digits = own = ("centre",)
    centre: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.1, *, normalize: bool = True) -> None:
        super().__init__()
        name = "RunningCentre"
        self.momentum = checks.number(name, "momentum", momentum, "(0, 1]")
        self.normalize = checks.flag(name, "normalize", normalize)
        self.centre = torch.zeros(checks.integer(name, "prototypes", prototypes, 1), dtype=torch.float32)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to 0."""
        self.centre.zero_()

    @torch.no_grad()
    def forward(self, teacher: Tensor, prototypes: Tensor, *, group: Any = None) -> Tensor:
        """Return (K,) the centre before this batch, which is then counted.

        Args:
            teacher: (N, D) the teacher's rows.
            prototypes: (K, D) its prototypes.
            group: processes whose rows count, as in `sinkhorn`.
        """
        name, before = "RunningCentre", self.centre.clone()
        checks.check_matrices(name, "teacher", teacher, "prototypes", prototypes)
        if len(prototypes) != len(before):
            raise ValueError(
                f"{name}: prototypes must have {len(before)} rows, as it was made for, got {checks.shape(prototypes)}"
            )
        if not self.training:
            return before
        with autocast.disabled(teacher):
            x, y = (each.to(self.centre.dtype) for each in (teacher, prototypes))
            x, y = (unit_rows(x), unit_rows(y)) if self.normalize else (x, y)
            ranks = Ranks.find(name, group)
            # The mean of products is a product of the mean.
            total, number = ranks.sum(x.sum(0)), ranks.sum(x.new_full((), x.shape[0]))
            mean = (y * (total / number)).sum(1)
        new = self.momentum * mean + (1 - self.momentum) * before
        self.centre.copy_(torch.where(new.isfinite().all(), new, before))
        return before


def dino(
    student: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor | None = None,
    *,
    centre: Tensor | None = None,
    assignment: str = "softmax",
    iterations: int = 3,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    teacher_temperature: float | Tensor = 0.04,
    group: Any = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """DINO and iBOT: cross entropy of the student's softmax over prototypes with the teacher's, centred or balanced.

    Equivalent to::

        student, prototypes, teacher, teacher_prototypes = (F.normalize(each) for each in ...)
        t = teacher @ teacher_prototypes.T
        q = ((t - centre) / teacher_temperature).softmax(1)                  # assignment="softmax"
        q = sinkhorn(t, epsilon=teacher_temperature, iterations=iterations)  # assignment="sinkhorn"
        log_p = (student @ prototypes.T / temperature).log_softmax(1)
        -(q.detach() * log_p).sum(1).mean()

    Args:
        student: (N, D) float32, bfloat16, float16 or float64: what comes before the last layer of the student's head,
            of one crop (DINO) or of masked patches (iBOT). Differentiable.
        prototypes: (K, D) the weight of that layer. Differentiable.
        teacher: (N, D') of another crop of the same images, or of the same patches unmasked. A constant.
        teacher_prototypes: (K, D'); None for ``prototypes``. A constant.
        centre: (K,) subtracted from the teacher's logits; see `RunningCentre`. For "softmax".
        assignment: "softmax" (DINO, iBOT), or "sinkhorn" (DINOv2): prototypes receive equal shares of the batch.
        iterations: of Sinkhorn-Knopp.
        temperature: divides the student's cosines; float, 0-d or (N,) tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        teacher_temperature: divides the teacher's; a number > 0, of which a tensor has no gradient.
        group: processes over whose rows "sinkhorn" balances; see `sinkhorn`.
        weight: (N,) weight of each row, such as 1 / the masked patches of its image; the mean divides by its sum.
            Differentiable. 0 leaves it out, also of Sinkhorn's shares.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows and prototypes to length 1 first, as the paper's head does.
        memory_budget: bytes of inner products kept for backward; of the teacher's logits for "sinkhorn".
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never below the teacher's
        entropy.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_distillation` and `sinkhorn`.

    Note:
        Memory O((N + K) (D + D')) beside ``memory_budget``. Crops are pairs of calls: each of the student's with each
        of the teacher's others. With "sinkhorn", logits beyond ``memory_budget`` are made again in each half of an
        iteration.

    Source:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021; Zhou et al., iBOT: Image BERT
        Pre-Training with Online Tokenizer, 2022; Oquab et al., DINOv2, 2023.

    Examples:
        >>> student, teacher, prototypes = torch.randn(8, 16), torch.randn(8, 16), torch.randn(32, 16)
        >>> running = RunningCentre(32)
        >>> dino(student, prototypes, teacher, centre=running(teacher, prototypes)).shape
        torch.Size([])
        >>> dino(student, prototypes, teacher, assignment="sinkhorn", reduction="none").shape
        torch.Size([8])
    """
    name = "dino"
    checks.check_choice(name, "assignment", assignment, ASSIGNMENTS)
    if isinstance(teacher_temperature, Tensor):
        teacher_temperature = teacher_temperature.detach()  # a constant, as all of the teacher
    finite = "(0, inf)" if assignment == "sinkhorn" else "(0, inf]"
    teacher_temperature = checks.number(name, "teacher_temperature", teacher_temperature, finite)
    iterations = checks.integer(name, "iterations", iterations, 1)
    of_teacher = prototypes if teacher_prototypes is None else teacher_prototypes
    checks.check_matrices(name, "student", student, "prototypes", prototypes)
    checks.check_matrices(name, "teacher", teacher, "teacher_prototypes", of_teacher)
    for key, each, other, like in (
        ("teacher", teacher, "student", student),
        ("teacher_prototypes", of_teacher, "prototypes", prototypes),
    ):
        if each.shape[0] != like.shape[0]:
            raise ValueError(
                f"{name}: {key} must have as many rows as {other}, "
                f"got {other} {checks.shape(like)} and {key} {checks.shape(each)}"
            )
    if weight is not None:
        _arguments.check_weight(name, weight, student.shape[0], "student", student)
        teacher = _arguments.of_weighted(weight, teacher)
    scale = _factor(name, temperature, scale, weight)
    bias = None
    if assignment == "sinkhorn":
        if centre is not None:
            raise ValueError(f'{name}: centre must be None for assignment="sinkhorn", got a tensor')
        used = teacher if weight is None else _used(teacher, weight)
        bias = _balancing_bias(
            name, used, of_teacher, teacher_temperature, iterations, group, normalize, memory_budget, backend
        )
    elif centre is not None:
        checks.check_vector(name, "centre", centre, of_teacher.shape[0], "teacher", teacher)
        bias = -centre.detach().to(checks.accumulator(teacher.dtype)) / teacher_temperature
    return similarity_distillation(
        student,
        prototypes,
        teacher.detach(),
        of_teacher.detach(),
        divergence="ce",
        scale=scale,
        teacher_temperature=teacher_temperature,
        teacher_bias=bias,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )


def swav(
    x: Tensor,
    y: Tensor,
    prototypes: Tensor,
    queue: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    group: Any = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """SwAV: each view predicts the other's code, a balanced assignment to prototypes.

    Equivalent to::

        x, y, prototypes, queue = (F.normalize(each) for each in ...)
        codes = [sinkhorn(torch.cat([z, queue]) @ prototypes.T, epsilon=epsilon)[:N].detach() for z in (x, y)]
        log_p = [(z @ prototypes.T / temperature).log_softmax(1) for z in (x, y)]
        -((codes[1] * log_p[0]).sum(1) + (codes[0] * log_p[1]).sum(1)).mean() / 2

    Args:
        x: (N, D) float32, bfloat16, float16 or float64: one view. Differentiable.
        y: (N, D) the other. Differentiable.
        prototypes: (K, D). Differentiable; codes have no gradient.
        queue: (Q, D) rows of earlier batches, among which codes are balanced too. A constant.
        epsilon: of Sinkhorn-Knopp; see `sinkhorn`.
        iterations: of it.
        temperature: divides the cosines of the predictions; float, 0-d or (N,) tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        group: processes over whose rows codes are balanced; see `sinkhorn`.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does.
        memory_budget: bytes of inner products kept, as in `dino`.
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `dino`.

    Note:
        Memory O((N + Q + K) D) beside ``memory_budget``. A small crop, which has no code, is a student of `dino` with
        ``assignment="sinkhorn"``.

    Source:
        Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020.

    Examples:
        >>> x, y, prototypes = torch.randn(8, 16), torch.randn(8, 16), torch.randn(4, 16)
        >>> swav(x, y, prototypes, reduction="none").shape
        torch.Size([8])
    """
    name = "swav"
    _arguments.check_reduction(name, reduction)
    epsilon = checks.number(name, "epsilon", epsilon, "(0, inf)")
    iterations = checks.integer(name, "iterations", iterations, 1)
    x, y, prototypes, queue = autocast.cast(x, y, prototypes, queue)
    checks.check_matrices(name, "x", x, "y", y)
    _arguments.check_partners(name, "x", x, "y", y)
    checks.check_matrices(name, "x", x, "prototypes", prototypes)
    if queue is not None:
        checks.check_matrices(name, "x", x, "queue", queue)
    if weight is not None:
        _arguments.check_weight(name, weight, x.shape[0], "x", x)
        x, y = (_arguments.of_weighted(weight, each) for each in (x, y))
    scale = _factor(name, temperature, scale, weight)
    losses = []
    for student, teacher in ((x, y), (y, x)):
        rows = teacher if weight is None else _used(teacher, weight)
        rows = rows if queue is None else torch.cat([rows.detach(), queue.detach()])
        bias = _balancing_bias(name, rows, prototypes, epsilon, iterations, group, normalize, memory_budget, backend)
        losses.append(
            similarity_distillation(
                student,
                prototypes,
                teacher.detach(),
                prototypes.detach(),
                divergence="ce",
                scale=scale,
                teacher_temperature=epsilon,
                teacher_bias=bias,
                weight=weight,
                reduction=reduction,
                normalize=normalize,
                memory_budget=memory_budget,
                backend=backend,
            )
        )
    return (losses[0] + losses[1]) / 2


def _factor(
    function: str, temperature: float | Tensor | None, scale: float | Tensor | None, weight: Tensor | None
) -> float | Tensor:
    """The factor of the student's cosines."""
    temperature, scale = (_arguments.of_weighted(weight, each, 1) for each in (temperature, scale))
    return _arguments.resolve_scale(function, temperature, scale, 0.1)


def _used(rows: Tensor, weight: Tensor) -> Tensor:
    """The rows that count, where that can be read; elsewhere those that do not are rows of zeros."""
    if not checks.may_read(weight, waits=True):
        return rows
    return rows[weight.detach() != 0]


@torch.no_grad()
def _balancing_bias(
    function: str,
    rows: Tensor,
    prototypes: Tensor,
    epsilon: float,
    iterations: int,
    group: Any,
    normalize: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor:
    """(K,) what is added to the logits of the rows, after which their softmax is Sinkhorn's plan."""
    rows, prototypes = autocast.cast(rows, prototypes)
    with autocast.disabled(rows):
        rows, prototypes = (each.detach().to(checks.accumulator(each.dtype)) for each in (rows, prototypes))
        rows, prototypes = (unit_rows(rows), unit_rows(prototypes)) if normalize else (rows, prototypes)
        budget = budget_bytes(function, memory_budget, rows.device.type)
        names = (function, "teacher", "prototypes")
        return column_potentials(names, rows, prototypes, 1 / epsilon, iterations, group, budget, backend)
