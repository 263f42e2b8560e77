"""The cases of losses with several positives in a row: sup_con.

Classes of eight, as in supervised batches that draw classes first. A loss of log 7 is converged:
the seven positives of a row share its probability.
"""

from __future__ import annotations

import torch

from benchmarks import providers
from benchmarks.inputs import labelled_case_inputs
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Target, memory_case, register
from benchmarks.truth import sup_con_truth

PER_CLASS = 8


def sup_con_inputs(case: Case) -> Inputs:
    """Rows of different lengths, which the loss normalises, and their labels."""
    return labelled_case_inputs(case, "x", per_class=PER_CLASS, cosine=0.6, constants={"temperature": 0.1})


def sup_con_case(n: int, d: int) -> Case:
    """SupCon on one matrix: 4 N^2 D, because the logits are symmetric."""
    peer = "pytorch-metric-learning SupConLoss"
    return Case(
        op="sup_con",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=sup_con_inputs,
        truth=sup_con_truth,
        providers=(
            providers.ours("sup_con"),
            providers.metric_learning_sup_con(),
            providers.torch_eager("torch eager", providers.eager_sup_con),
            providers.torch_eager("torch.compile", providers.eager_sup_con, compiled=True),
            providers.matmuls("NT NN", self_similarity=True),
        ),
        baseline=peer,
        flops=lambda s: 4 * s["N"] ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(Target("sup_con", "faster", 6.0, OURS, peer),),
    )


SUP_CON = sup_con_case(2048, 128)

register(SUP_CON, memory_case("memory-sup_con", SUP_CON, 65_536, 64))
