"""The cases of the softmax family: clip, info_nce and nt_xent.

Scales are those of trained models: 50 for CLIP (it starts at 14 and ends at 100), 20 for sentence
embeddings, 1 / 0.1 for SimCLR. ``cosine`` is set so that the loss lies between 0.3 and 2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks import providers
from benchmarks.inputs import paired_case_inputs
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Target, memory_case, register
from benchmarks.truth import clip_truth, info_nce_truth, nt_xent_truth

NO_CACHE = "contrastive_ops no cache"
CACHE = "contrastive_ops cache"


def clip_inputs(case: Case) -> Inputs:
    """Unit rows and a learned scale."""
    return paired_case_inputs(case, ("image", "text"), cosine=0.24, learned={"scale": 50.0})


def info_nce_inputs(case: Case, unit: bool = True) -> Inputs:
    """Unit rows, or rows of different lengths, and a fixed scale."""
    return paired_case_inputs(case, ("query", "key"), cosine=0.45, constants={"scale": 20.0}, unit=unit)


def nt_xent_inputs(case: Case) -> Inputs:
    """Rows of different lengths, which the loss normalises."""
    return paired_case_inputs(case, ("z0", "z1"), cosine=0.8, constants={"temperature": 0.1}, unit=False)


def clip_case(n: int, d: int, *, faster: float) -> Case:
    """CLIP, both directions and the scale's gradient."""
    peer = "open_clip ClipLoss"
    return Case(
        op="clip",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=clip_inputs,
        truth=clip_truth,
        providers=(
            providers.ours("clip"),
            providers.ours("clip", NO_CACHE, cache=False),
            providers.ours("clip", CACHE, cache=True),
            providers.open_clip_loss(),
            providers.torch_eager("torch eager", providers.eager_clip),
            providers.torch_eager("torch.compile", providers.eager_clip, compiled=True),
            providers.matmuls("NT NT NN TN"),
        ),
        baseline=peer,
        flops=lambda s: 8 * s["N"] ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(
            Target("clip", "faster", faster, OURS, peer),
            Target("clip", "memory", 1 / 20, NO_CACHE, peer),
            Target("clip-matmuls", "time", 0.90, NO_CACHE, providers.MATMUL),
            Target("clip-matmuls", "time", 0.70, CACHE, providers.MATMUL),
        ),
    )


def info_nce_case(n: int, d: int, dtype: torch.dtype) -> Case:
    """InfoNCE in one direction against torch's own chunked loss."""
    auto, compact = (f"torch linear_cross_entropy {policy}" for policy in ("auto", "compact"))
    peers = [providers.linear_cross_entropy("auto")]
    if dtype == torch.float32:
        targets = (Target("info_nce-fp32", "faster", 1.05, OURS, auto),)
    else:
        # In float32 "auto" already means "compact"; in bf16 it means "accurate".
        peers.append(providers.linear_cross_entropy("compact"))
        targets = (
            Target("info_nce-bf16", "faster", 1.9, OURS, auto),
            Target("info_nce-bf16", "faster", 1.1, OURS, compact),
            Target("info_nce-bf16", "error", 5e-3, OURS),
        )
    return Case(
        op="info_nce",
        shapes={"N": n, "D": d},
        dtype=dtype,
        make_inputs=info_nce_inputs,
        truth=info_nce_truth,
        providers=(
            providers.ours("info_nce"),
            *peers,
            providers.torch_eager("torch eager", providers.eager_info_nce),
            providers.torch_eager("torch.compile", providers.eager_info_nce, compiled=True),
            providers.sentence_transformers_mnrl(),
            providers.matmuls("NT NN TN"),
        ),
        baseline=auto,
        flops=lambda s: 6 * s["N"] ** 2 * s["D"],
        tolerance=TOLERANCE[dtype],
        targets=targets,
    )


def cosine_info_nce_case(n: int, d: int) -> Case:
    """InfoNCE of rows that the loss normalises, against the package of that name."""
    like = info_nce_case(n, d, torch.float32)
    peer = providers.info_nce_pytorch()
    return replace(
        like,
        op="info_nce-cosine",
        make_inputs=partial(info_nce_inputs, unit=False),
        truth=partial(info_nce_truth, cosine=True),
        providers=(
            providers.ours("info_nce", as_given=False),
            peer,
            providers.torch_eager("torch eager", providers.eager_cosine_info_nce),
            like.provider(providers.MATMUL),
        ),
        baseline=peer.name,
        targets=(),
    )


def nt_xent_case(n: int, d: int) -> Case:
    """NT-Xent on two views of n rows: 4 M^2 D with M = 2 n, because the logits are symmetric."""
    peer = "lightly NTXentLoss"
    return Case(
        op="nt_xent",
        shapes={"N": n, "D": d},
        dtype=torch.float32,
        make_inputs=nt_xent_inputs,
        truth=nt_xent_truth,
        providers=(
            providers.ours("nt_xent"),
            providers.lightly_nt_xent(),
            providers.torch_eager("torch eager", providers.eager_nt_xent),
            providers.torch_eager("torch.compile", providers.eager_nt_xent, compiled=True),
            providers.matmuls("NT NN", self_similarity=True),
        ),
        baseline=peer,
        flops=lambda s: 4 * (2 * s["N"]) ** 2 * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(Target("nt_xent", "faster", 3.0, OURS, peer),),
    )


CLIP = [clip_case(4096, 768, faster=2.0), clip_case(8192, 512, faster=3.0)]
INFO_NCE = [
    info_nce_case(n, d, dtype) for dtype in (torch.float32, torch.bfloat16) for n, d in ((2048, 512), (4096, 768))
]
NT_XENT = [nt_xent_case(2048, 512)]

register(*CLIP, *INFO_NCE, *NT_XENT, cosine_info_nce_case(2048, 512))
register(
    memory_case("memory-softmax", CLIP[0], 65_536, 64),
    memory_case("memory-softmax", CLIP[0], 65_536, 256),
    memory_case("memory-softmax", INFO_NCE[0], 65_536, 64),
    memory_case("memory-softmax", NT_XENT[0], 65_536, 64),
)
