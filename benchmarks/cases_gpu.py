"""The cases of a GPU, most wanted first: a run that is cut off has measured those.

bfloat16 throughout. A backend of this package that cannot run is named as missing, with its reason.
"""

from __future__ import annotations

import math

import torch

from benchmarks import providers, providers_routing, providers_topk
from benchmarks.cases_sigmoid import siglip_inputs
from benchmarks.cases_softmax import clip_inputs
from benchmarks.inputs import router_inputs, search_inputs
from benchmarks.providers import of_backend
from benchmarks.registry import Case, Target, register
from benchmarks.truth import clip_truth, router_truth, siglip_truth, topk_truth

BACKENDS = ("triton", "cuda")
EAGER, COMPILED = "torch eager", "torch.compile"
# torch rounds logits to bfloat16 and is so far off; the errors are printed, and ours have a target of their own.
ROUNDED_LOGITS = 3e-2
# Scores that torch rounds to bfloat16: half a unit in the last place of cosines below 1.
ROUNDED_SCORES = 2**-8
ROUTED = 2e-2
TOPK_ROWS = 4096  # of torch's scores at a time


def clip_case(n: int, d: int, *, compiled: bool = False) -> Case:
    """CLIP, both directions and the scale's gradient; compiling takes torch half a minute, so it does it once."""
    others = [providers.torch_eager(EAGER, providers.eager_clip), providers.open_clip_loss()]
    rivals = [EAGER]
    if compiled:
        others.append(providers.torch_eager(COMPILED, providers.eager_clip, compiled=True))
        rivals.append(COMPILED)
    targets = []
    for ours in map(of_backend, BACKENDS):
        targets += [Target("gpu-clip", "faster", 2.0, ours, rival) for rival in rivals]
        targets += [
            Target("gpu-clip", "time", 1 / 0.6, ours, providers.MATMUL),
            Target("gpu-clip", "error", 5e-3, ours),
        ]
    return Case(
        op="clip",
        shapes={"N": n, "D": d},
        dtype=torch.bfloat16,
        make_inputs=clip_inputs,
        truth=clip_truth,
        providers=(
            *(providers.ours("clip", of_backend(backend), backend=backend) for backend in BACKENDS),
            *others,
            providers.matmuls("NT NT NN TN"),
        ),
        baseline=EAGER,
        flops=lambda s: 8 * s["N"] ** 2 * s["D"],
        tolerance=ROUNDED_LOGITS,
        targets=tuple(targets),
        device="cuda",
    )


def siglip_case(n: int, d: int) -> Case:
    """SigLIP with the gradients of scale and bias."""
    return Case(
        op="siglip",
        shapes={"N": n, "D": d},
        dtype=torch.bfloat16,
        make_inputs=siglip_inputs,
        truth=siglip_truth,
        providers=(
            *(providers.ours("siglip", of_backend(backend), backend=backend) for backend in BACKENDS),
            providers.torch_eager(EAGER, providers.eager_siglip),
            providers.open_clip_siglip(),
            providers.matmuls("NT NN TN"),
        ),
        baseline=EAGER,
        flops=lambda s: 6 * s["N"] ** 2 * s["D"],
        tolerance=ROUNDED_LOGITS,
        targets=tuple(Target("gpu-siglip", "faster", 2.0, of_backend(backend), EAGER) for backend in BACKENDS),
        device="cuda",
    )


def topk_case(n: int, m: int, d: int, k: int) -> Case:
    """A search without rules."""
    torch_topk = providers_topk.TORCH
    return Case(
        op="topk",
        shapes={"N": n, "M": m, "D": d, "k": k},
        dtype=torch.bfloat16,
        make_inputs=search_inputs,
        truth=topk_truth,
        providers=(
            *(providers_topk.ours(of_backend(backend), backend=backend) for backend in (*BACKENDS, "hopper")),
            providers_topk.mm_topk(TOPK_ROWS),
            providers.matmuls("NT"),
        ),
        baseline=torch_topk,
        flops=lambda s: 2 * s["N"] * s["M"] * s["D"],
        tolerance=ROUNDED_SCORES,
        targets=tuple(Target("gpu-topk", "faster", 2.0, of_backend(backend), torch_topk) for backend in BACKENDS),
        device="cuda",
    )


def route_case(tokens: int, experts: int, k: int) -> Case:
    """Choices, places by priority and every balance loss without noise: 6 bytes to move for each logit."""
    constants = {"noise_std": 0.0, "threshold": math.log(20), "segments": 2, "capacity": 1.05}
    copy = providers_routing.COPY
    return Case(
        op="route-without-noise",
        shapes={"T": tokens, "E": experts, "k": k},
        dtype=torch.bfloat16,
        make_inputs=lambda case: router_inputs(case, constants),
        truth=router_truth,
        providers=(
            *(providers_routing.ours_route(of_backend(backend), backend=backend) for backend in BACKENDS),
            providers_routing.torch_route(),
            providers_routing.copy_logits(),
        ),
        baseline=providers_routing.TORCH,
        flops=lambda s: 2 * s["T"] * s["E"],
        tolerance=ROUTED,
        targets=tuple(Target("gpu-route", "time", 1 / 0.8, of_backend(backend), copy) for backend in BACKENDS),
        device="cuda",
    )


register(
    clip_case(32_768, 768, compiled=True),
    topk_case(16_384, 100_000, 128, 100),
    route_case(524_288, 32, 2),
    siglip_case(65_536, 768),
    *(clip_case(n, d) for n, d in ((65_536, 768), (32_768, 512), (32_768, 1024), (65_536, 512), (65_536, 1024))),
    route_case(131_072, 128, 8),
    clip_case(4_096, 512),
)
