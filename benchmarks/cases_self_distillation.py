"""The cases of self-distillation: DINO's cross entropy over many prototypes, and KoLeo of a large batch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import providers_self_distillation as providers
from benchmarks.inputs import views_of_things
from benchmarks.providers_self_distillation import EAGER, EPS, NO_CACHE, TEACHER_TEMPERATURE, TEMPERATURE
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Outcome, Target, register
from benchmarks.truth import differentiated, mean_over_rows


def dino_inputs(case: Case) -> Inputs:
    """Two views of the same things, by student and teacher, prototypes of both, and a centre."""
    n, m, d = case.shapes["N"], case.shapes["M"], case.shapes["D"]
    student, teacher = views_of_things(n, d, cosine=0.8)
    prototypes, of_teacher = views_of_things(m, d, cosine=0.95, seed=1)
    centre = 0.02 * torch.randn(m, generator=torch.Generator().manual_seed(2))
    on = {"device": case.device, "dtype": case.dtype}
    tensors = {"student": student.to(**on), "prototypes": prototypes.to(**on)}
    frozen = {"teacher": teacher.to(**on), "teacher_prototypes": of_teacher.to(**on), "centre": centre.to(**on)}
    return Inputs(tensors, frozen=frozen)


def dino_truth(inputs: Inputs) -> Outcome:
    """Cross entropy of the student's softmax with the teacher's."""
    teacher, of_teacher, centre = (inputs.frozen[name].double() for name in ("teacher", "teacher_prototypes", "centre"))

    def loss_of(student: Tensor, prototypes: Tensor) -> Tensor:
        def of_rows(part: slice) -> Tensor:
            q = ((teacher[part] @ of_teacher.T - centre) / TEACHER_TEMPERATURE).softmax(1)
            return -(q * (student[part] @ prototypes.T / TEMPERATURE).log_softmax(1)).sum()

        return mean_over_rows(of_rows, len(student), len(prototypes), student.device)

    return differentiated(loss_of, inputs)


def dino_case(n: int, m: int, d: int) -> Case:
    """Products of student and teacher forward, the student's and the teacher's again backward, and two gradients."""
    return Case(
        op="dino",
        shapes={"N": n, "M": m, "D": d},
        dtype=torch.float32,
        make_inputs=dino_inputs,
        truth=dino_truth,
        providers=(
            providers.our_dino(),
            providers.our_dino(NO_CACHE, memory_budget=0),
            providers.eager_dino(),
            providers.dino_products(),
        ),
        baseline=EAGER,
        flops=lambda s: 8 * s["N"] * s["M"] * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(Target("dino", "faster", 1.0, OURS, EAGER), Target("dino", "memory", 1 / 10, OURS, EAGER)),
    )


def koleo_inputs(case: Case) -> Inputs:
    """Embeddings of one view of things in clusters."""
    x, _ = views_of_things(case.shapes["N"], case.shapes["D"], cosine=0.6)
    return Inputs({"x": x.to(case.device, case.dtype)})


def koleo_truth(inputs: Inputs) -> Outcome:
    """Minus the logarithm of the distance to the nearest other row."""

    def loss_of(x: Tensor) -> Tensor:
        rows = torch.nn.functional.normalize(x, dim=1)

        def of_rows(part: slice) -> Tensor:
            own = torch.arange(part.start, part.stop, device=x.device)[:, None]
            nearest = (rows[part] @ rows.T).detach().scatter(1, own, -2.0).argmax(1)
            return -(torch.linalg.vector_norm(rows[part] - rows[nearest], dim=1) + EPS).log().sum()

        return mean_over_rows(of_rows, len(x), len(x), x.device)

    return differentiated(loss_of, inputs)


def koleo_case(n: int, d: int) -> Case:
    """The inner products of half of the pairs."""
    return Case(
        op="koleo",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=koleo_inputs,
        truth=koleo_truth,
        providers=(providers.our_koleo(), providers.eager_koleo(), providers.koleo_products()),
        baseline=EAGER,
        flops=lambda s: s["N"] ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(Target("koleo", "faster", 3.0, OURS, EAGER), Target("koleo", "memory", 1 / 3, OURS, EAGER)),
    )


register(dino_case(1024, 65536, 256))
register(koleo_case(16384, 384))
