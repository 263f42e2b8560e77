"""Who computes DINO's cross entropy and KoLeo: this package, and plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import MATMUL, differentiate
from benchmarks.registry import OURS, Inputs, Provider, Step

NO_CACHE = f"{OURS} memory_budget=0"
EAGER = "torch eager"
TEMPERATURE, TEACHER_TEMPERATURE, EPS = 0.1, 0.04, 1e-8


def our_dino(name: str = OURS, memory_budget: int | None = None) -> Provider:
    """``contrastive_ops.losses.dino``, of rows that have length 1."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.losses import dino

        def loss_of(student: Tensor, prototypes: Tensor) -> Tensor:
            options = {**inputs.frozen, "temperature": TEMPERATURE, "teacher_temperature": TEACHER_TEMPERATURE}
            return dino(student, prototypes, normalize=False, memory_budget=memory_budget, **options)

        return differentiate(loss_of, inputs.tensors)

    return Provider(name, build, kind="ours", package="contrastive_ops")


def eager_dino() -> Provider:
    """The formula in torch, with the logits of student and teacher in memory."""

    def build(inputs: Inputs) -> Step:
        teacher, of_teacher, centre = (inputs.frozen[name] for name in ("teacher", "teacher_prototypes", "centre"))

        def loss_of(student: Tensor, prototypes: Tensor) -> Tensor:
            q = ((teacher @ of_teacher.T - centre) / TEACHER_TEMPERATURE).softmax(1)
            return -(q * (student @ prototypes.T / TEMPERATURE).log_softmax(1)).sum(1).mean()

        return differentiate(loss_of, inputs.tensors)

    return Provider(EAGER, build, kind="torch")


def dino_products() -> Provider:
    """The products alone through ``torch.mm``: both logits, and two gradients."""

    def build(inputs: Inputs) -> Step:
        x, y = inputs.tensors["student"], inputs.tensors["prototypes"]
        teacher = inputs.frozen["teacher"], inputs.frozen["teacher_prototypes"]
        logits, dx, dy = x.new_empty(len(x), len(y)), torch.empty_like(x), torch.empty_like(y)

        def step() -> None:
            for left, right in ((x, y), teacher):
                torch.mm(left, right.T, out=logits)
            torch.mm(logits, y, out=dx)
            torch.mm(logits.T, x, out=dy)

        return step

    return Provider(MATMUL, build, kind="matmul")


def our_koleo() -> Provider:
    """``contrastive_ops.losses.koleo``."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.losses import koleo

        return differentiate(lambda x: koleo(x, eps=EPS), inputs.tensors)

    return Provider(OURS, build, kind="ours", package="contrastive_ops")


def eager_koleo() -> Provider:
    """As DINOv2 has it: the nearest row by the matrix of inner products, then its distance."""

    def loss_of(x: Tensor) -> Tensor:
        rows = F.normalize(x, dim=1)
        with torch.no_grad():
            nearest = (rows @ rows.T).fill_diagonal_(-1.0).max(1).indices
        return -(torch.linalg.vector_norm(rows - rows[nearest], dim=1) + EPS).log().mean()

    return Provider(EAGER, lambda inputs: differentiate(loss_of, inputs.tensors), kind="torch")


def koleo_products() -> Provider:
    """The inner products of all rows through ``torch.mm``."""

    def build(inputs: Inputs) -> Step:
        x = inputs.tensors["x"]
        products = x.new_empty(len(x), len(x))

        def step() -> None:
            torch.mm(x, x.T, out=products)

        return step

    return Provider(MATMUL, build, kind="matmul")
