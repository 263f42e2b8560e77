"""How far losses and their gradients are from float64, by dtype and temperature: `-m benchmarks.numerics --save`.

Truth is the reference in float64 of the same numbers, those of 16 bits rounded before. The error of a loss is relative
to it; that of a gradient is the 2-norm of the difference relative to that of the gradient, the largest over the inputs.
Rows are independent unit vectors, so that no loss is near 0 and nothing is hidden by a floor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.testing import LOSSES, LossCase, leaves

from . import provenance

RESULTS = Path(__file__).parent / "results" / "numerics.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEMPERATURES = (0.005, 0.02, 0.1, 1.0, 10.0)
ROWS, DEPTH = 96, 64
# Entries whose tensor `scale` is what a temperature divides by.
CASES = {name: case for name, case in LOSSES.items() if "scale" in case.tensors}

Envelope = dict[str, dict[str, list[tuple[float, float]]]]


def _loss_and_gradients(case: LossCase, inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    loss = case(inputs, "mean", backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves(inputs), materialize_grads=True)]


def _relative(found: Tensor, truth: Tensor) -> float:
    """Error of what is not 0; NaN and infinity are infinitely wrong."""
    size, error = truth.double().norm().item(), (found.double() - truth.double()).norm().item()
    return (error / size if error == error else float("inf")) if size else float(bool(error))


def errors(name: str, dtype: torch.dtype, temperature: float, backend: str = "auto") -> tuple[float, float]:
    """(error of the loss, largest error of a gradient)."""
    case = CASES[name]
    drawn = case.inputs(ROWS, DEPTH, dtype, seed=0)
    with torch.no_grad():
        drawn["scale"].fill_(1 / temperature)
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for n, t in drawn.items()}  # fmt: skip
    truth = _loss_and_gradients(case, exact, "reference")
    found = _loss_and_gradients(case, drawn, backend)
    each = [_relative(f, t) for f, t in zip(found, truth, strict=True)]
    return each[0], max(each[1:])


def measured() -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """(loss, dtype, errors at each temperature)."""
    for name in CASES:
        for kind, dtype in DTYPES.items():
            yield name, kind, [errors(name, dtype, temperature) for temperature in TEMPERATURES]


def stored() -> dict[str, Any]:
    """What was measured last."""
    return dict(json.loads(RESULTS.read_text()))


def table(found: dict[str, Any]) -> str:
    """Markdown: the largest errors over all losses, and where they are met."""
    lines = ["| inputs | temperature | loss: median | loss: largest | gradient: median | gradient: largest |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for kind in DTYPES:
        for at, temperature in enumerate(TEMPERATURES):
            cells = []
            for part in (0, 1):
                ranked = sorted((by_dtype[kind][at][part], name) for name, by_dtype in found["errors"].items())
                cells += [f"{ranked[len(ranked) // 2][0]:.0e}", "{:.0e} ({})".format(*ranked[-1])]
            lines.append(f"| {kind} | {temperature:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="store the errors in benchmarks/results")
    given = parser.parse_args()
    found: dict[str, Any] = {"rows": ROWS, "depth": DEPTH, "temperatures": TEMPERATURES, "errors": {}}
    for name, kind, each in measured():
        found["errors"].setdefault(name, {})[kind] = [[float(f"{e:.3g}") for e in pair] for pair in each]
    if given.save:
        RESULTS.write_text(json.dumps({**found, **provenance.gather()}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
