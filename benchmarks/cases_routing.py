"""The cases of expert routing: a router with all its losses, rows in groups times their matrices, and a whole layer.

Tokens of two modalities, 49 of images for each 8 of text, and logits as spread as those of a trained router.
"""

from __future__ import annotations

import math

import torch

from benchmarks import providers_routing
from benchmarks.inputs import grouped_inputs, layer_inputs, router_inputs
from benchmarks.providers_routing import DENSE, GROUPED, ST_MOE, TORCH, TRANSFORMERS
from benchmarks.registry import OURS, Case, Target, register
from benchmarks.truth import grouped_truth, layer_truth, router_truth

TOLERANCE = 1e-4


def route_case(tokens: int, experts: int, k: int, *, noise_std: float, targets: tuple[Target, ...] = ()) -> Case:
    """Scores, choices, places by priority, and every balance loss; with noise also the load loss."""
    constants = {"noise_std": noise_std, "threshold": math.log(20), "segments": 2, "capacity": 1.05}
    return Case(
        op="route" if noise_std else "route-without-noise",
        shapes={"T": tokens, "E": experts, "k": k},
        dtype=torch.float32,
        make_inputs=lambda case: router_inputs(case, constants),
        truth=router_truth,
        providers=(providers_routing.ours_route(), providers_routing.torch_route(), providers_routing.copy_logits()),
        baseline=TORCH,
        flops=lambda s: 2 * s["T"] * s["E"],
        tolerance=TOLERANCE,
        targets=targets,
    )


def grouped_case(each: int, *, faster: float) -> Case:
    """As many rows for every expert of a layer, forward and both gradients."""
    return Case(
        op="grouped_matmul",
        shapes={"E": 32, "T": each, "D": 512, "F": 2048},
        dtype=torch.float32,
        make_inputs=grouped_inputs,
        truth=grouped_truth,
        providers=(
            providers_routing.ours_grouped(),
            providers_routing.torch_grouped(),
            providers_routing.dense_product(),
        ),
        baseline=GROUPED,
        flops=lambda s: 6 * s["E"] * s["T"] * s["D"] * s["F"],
        tolerance=TOLERANCE,
        targets=(
            Target("grouped_matmul", "faster", faster, OURS, GROUPED),
            Target("grouped_matmul", "faster", 0.95, OURS, DENSE),
        ),
    )


def layer_case(tokens: int) -> Case:
    """A layer of gated experts, dropless, without losses, which the others would compute elsewhere."""
    return Case(
        op="sparse_moe",
        shapes={"T": tokens, "D": 512, "F": 2048, "E": 32, "k": 1},
        dtype=torch.float32,
        make_inputs=layer_inputs,
        truth=layer_truth,
        providers=(
            providers_routing.ours_layer(),
            providers_routing.transformers_layer(),
            providers_routing.st_moe_layer(),
            providers_routing.dense_layer(),
        ),
        baseline=TRANSFORMERS,
        flops=lambda s: 18 * s["T"] * s["D"] * s["F"],
        tolerance=TOLERANCE,
        targets=(
            Target("sparse_moe", "faster", 1.15, OURS, TRANSFORMERS),
            Target("sparse_moe", "faster", 3.0, OURS, ST_MOE),
        ),
    )


register(
    route_case(65_536, 32, 2, noise_std=1.0, targets=(Target("route", "faster", 20.0, OURS, TORCH),)),
    route_case(65_536, 32, 2, noise_std=0.0),
    grouped_case(128, faster=1.25),
    grouped_case(512, faster=1.15),
    layer_case(16_384),
)
