"""The numbers to reach, row by row as the design states them, and which of them are due.

The bounds themselves are the ``Target``s of the cases, tied to a row by its key. A row is due when
the work on its group is finished: from then on a test demands a measurement of every target.
"""

from __future__ import annotations

from dataclasses import dataclass

FINISHED = {
    "softmax",
    "sup_con",
    "sigmoid",
    "partitions",
    "mining",
    "routing",
    "late_interaction",
    "matryoshka",
    "distillation",
    "preference",
    "values",
    "neighbours",
}


@dataclass(frozen=True)
class DesignRow:
    """One line of the table of numbers to reach."""

    key: str
    group: str
    what: str
    against: str
    reach: str


ROWS = (
    DesignRow(
        "clip",
        "softmax",
        "CLIP loss fwd+bwd fp32, N=4096 D=768; N=8192 D=512",
        "open_clip ClipLoss",
        ">= 2x; >= 3x faster; extra memory <= 1/20 with memory_budget=0",
    ),
    DesignRow(
        "clip-matmuls",
        "softmax",
        "the same",
        "its own matmuls alone (8 N^2 D through torch.mm)",
        "<= 0.90x their time without a cache, <= 0.70x with",
    ),
    DesignRow(
        "info_nce-fp32",
        "softmax",
        "InfoNCE one direction fp32",
        "torch F.linear_cross_entropy with LinearCrossEntropyOptions: auto",
        ">= 1.05x faster",
    ),
    DesignRow(
        "info_nce-bf16",
        "softmax",
        "InfoNCE one direction bf16",
        "torch F.linear_cross_entropy with LinearCrossEntropyOptions: auto; compact",
        ">= 1.9x; >= 1.1x faster; gradient error <= 5e-3",
    ),
    DesignRow(
        "nt_xent",
        "softmax",
        "NT-Xent on 2 x 2048 rows, D=512",
        "lightly NTXentLoss",
        ">= 3x faster",
    ),
    DesignRow(
        "memory-softmax",
        "softmax",
        "memory: clip, info_nce, nt_xent at N=65,536 D=64, and clip at D=256",
        "O(N D), peak resident set of a subprocess",
        "<= 256 MiB above inputs and gradients",
    ),
    DesignRow(
        "sup_con",
        "sup_con",
        "SupCon N=2048 D=128",
        "pytorch-metric-learning SupConLoss",
        ">= 6x faster",
    ),
    DesignRow("memory-sup_con", "sup_con", "memory: sup_con at N=65,536 D=64", "O(N D)", "<= 256 MiB"),
    DesignRow("siglip", "sigmoid", "SigLIP N=8192 D=512", "open_clip SigLipLoss", ">= 2x faster"),
    DesignRow("memory-sigmoid", "sigmoid", "memory: siglip at N=65,536 D=64", "O(N D)", "<= 256 MiB"),
    DesignRow(
        "gte",
        "partitions",
        "GTE four-way, N=2048 D=512",
        "sentence-transformers, all four directions",
        ">= 3x faster",
    ),
    DesignRow(
        "gist",
        "partitions",
        "GIST-filtered, N=1024 D=256",
        "sentence-transformers CachedGISTEmbedLoss; the same mathematics dense",
        ">= 300x; >= 1.5x faster",
    ),
    DesignRow(
        "matryoshka",
        "matryoshka",
        "Matryoshka dims 64,128,256,512,768, N=4096",
        "torch loop over dims; our loss in a loop",
        ">= 2.5x; >= 1.8x faster",
    ),
    DesignRow(
        "topk",
        "mining",
        "top-k, N=1024 M=50k, D=768: k=100; 1000; D=128: k=100; 1000",
        "faiss-cpu IndexFlatIP, two threads",
        ">= 1.05x; 1.25x; 1.25x; 2.2x; bf16 with certificate >= 1.8x at D=768",
    ),
    DesignRow(
        "topk-few",
        "mining",
        "top-k at N=1; 16; 64",
        "read bandwidth; faiss",
        ">= 0.9 of it; >= 2.5x; >= 5x",
    ),
    DesignRow(
        "topk-filtered",
        "mining",
        "top-k with exclude lists + relative margin",
        "faiss over-fetching 10 k then filtering; faiss with a selector",
        ">= 1.3x, starved rows 0; >= 8x",
    ),
    DesignRow(
        "maxsim",
        "late_interaction",
        "MaxSim fwd+bwd, 64 queries x 32 tokens, 1,024 documents x 180 tokens, D=128",
        "a padded einsum in torch",
        ">= 3x faster; extra memory <= 1/20",
    ),
    DesignRow(
        "distillation",
        "distillation",
        "similarity distillation fwd+bwd fp32, both directions, N=4096 D=512, teacher of the same size",
        "its own matmuls alone (student and teacher twice, two gradients, through torch.mm)",
        "<= 1.2x their time with memory_budget=0",
    ),
    DesignRow(
        "distillation-dense",
        "distillation",
        "the same",
        "the same mathematics dense in torch; open_clip DistillClipLoss",
        ">= 1.3x faster; extra memory <= 1/20 with memory_budget=0",
    ),
    DesignRow(
        "values",
        "values",
        "values summed by a softmax, fwd+bwd fp32, N=4096 M=8192 D=256, values of the same dimension",
        "its own matmuls alone (logits twice, sums, weights' gradient, three gradients, through torch.mm)",
        "<= 1.2x their time with memory_budget=0",
    ),
    DesignRow(
        "values-dense",
        "values",
        "the same",
        "the same mathematics dense in torch; torch's scaled_dot_product_attention of one head",
        ">= 0.9x; >= 1.1x faster; extra memory <= 1/4 with memory_budget=0",
    ),
    DesignRow(
        "linear_log_prob",
        "preference",
        "linear log-probability, forward + backward, D=512, T=4096 V=32,000 fp32 and T=1024 V=16,000 bf16",
        "torch F.linear_cross_entropy with LinearCrossEntropyOptions: auto, which has the mean alone",
        ">= 1x faster; of the mean alone >= 1.1x",
    ),
    DesignRow(
        "linear_entropy",
        "preference",
        "log-probability and entropy, or divergence from a reference, fwd+bwd fp32, T=2048 V=16,000 D=512",
        "torch eager, all logits",
        ">= 0.9x; >= 0.7x its speed; extra memory <= 1/2",
    ),
    DesignRow(
        "route",
        "routing",
        "route 65,536 x 32, k=2, all losses, fwd+bwd",
        "the same in torch ops",
        ">= 20x faster",
    ),
    DesignRow(
        "grouped_matmul",
        "routing",
        "grouped_matmul fwd+bwd, 32 experts, 128 and 512 tokens each",
        "torch grouped_mm; one dense matmul of equal FLOPs",
        ">= 1.25x, 1.15x; >= 0.95 of its speed",
    ),
    DesignRow(
        "sparse_moe",
        "routing",
        "SparseMoE layer fwd+bwd, T=16,384 D=512 F=2048 E=32 k=1",
        "transformers grouped experts; st-moe-pytorch",
        ">= 1.15x; >= 3x",
    ),
    DesignRow(
        "koleo",
        "neighbours",
        "KoLeo fwd+bwd fp32, N=16,384 D=384",
        "torch eager, all inner products",
        ">= 3x faster; extra memory <= 1/3",
    ),
    DesignRow(
        "dino",
        "neighbours",
        "DINO's cross-entropy fwd+bwd fp32, N=1,024, 65,536 prototypes, D=256",
        "torch eager, all logits",
        ">= 1x faster; extra memory <= 1/10",
    ),
    DesignRow("sinkhorn", "neighbours", "Sinkhorn-Knopp fp32, 4,096 x 3,000", "torch eager", ">= 1x faster"),
    DesignRow(
        "retrieval_metrics",
        "neighbours",
        "retrieval measures of 10,000 queries with 1,000 documents each",
        "pytrec_eval",
        ">= 10x faster",
    ),
    DesignRow(
        "gpu-clip",
        "gpu",
        "CLIP loss fwd+bwd bf16 on a GPU, N=32,768 and 65,536, D=512/768/1024",
        "torch eager and torch.compile; its own matmuls (8 N^2 D through torch.mm)",
        ">= 2x faster; <= 1.67x their time; gradient error <= 5e-3",
    ),
    DesignRow("gpu-siglip", "gpu", "SigLIP fwd+bwd bf16 on a GPU, N=65,536 D=768", "torch eager", ">= 2x faster"),
    DesignRow("gpu-topk", "gpu", "top-k bf16 on a GPU, N=16k M=100k D=128 k=100", "torch mm + topk", ">= 2x faster"),
    DesignRow(
        "gpu-route",
        "gpu",
        "route + all losses fwd+bwd bf16 on a GPU, T E >= 16M",
        "copy bandwidth on 6 bytes per logit",
        "<= 1.25x its time",
    ),
)
