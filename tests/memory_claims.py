"""A call of every public function whose docstring says how much memory it takes, at the shape that is worst for it.

Run as a script it prints, for each name that it is given, the peak of the resident set above what was there before,
and the bytes of what the docstring counts: arguments, gradients, results, and what `beside` names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import contrastive_ops as co
from contrastive_ops import decoding, losses, metrics, mining, moe, ops
from contrastive_ops.testing import reset_peak, resident_bytes

# One row, a few rows, and many columns; lists of thousands. What is forbidden is at least 400 MB in each case.
MANY, DEEP = 1 << 17, 1 << 16

Call = Callable[[str], tuple[Callable[[], Any], int]]
CLAIMS: dict[str, list[Call]] = {}


def leaf(*shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).requires_grad_()


def claim(*names: str) -> Callable[[Call], Call]:
    def add(call: Call) -> Call:
        for name in names:
            CLAIMS.setdefault(name, []).append(call)
        return call

    return add


def numbers(*counts: int) -> int:
    return 4 * sum(counts)


def size(value: Any) -> int:
    """Bytes of tensors in whatever holds them."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(size(each) for each in value)
    return sum(size(each) for each in vars(value).values()) if hasattr(value, "__dict__") else 0


def _differentiable(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _differentiable(each)]
    return []


def measure(call: Call, backend: str) -> dict[str, int]:
    torch.manual_seed(0)
    run, counted = call(backend)
    base = reset_peak()
    value = run()
    total = [t.sum() for t in _differentiable(value)]
    counted += size(value)
    if total:
        torch.stack([t.float() for t in total]).sum().backward()
    return {"peak": resident_bytes("VmHWM") - base, "counted": counted}


# ---- One row against many columns, and the other way round ---------------------------------------------------------


def two_sides(function: Callable[..., Any], rows: int, columns: int, **options: Any) -> Call:
    def call(backend: str) -> tuple[Callable[[], Any], int]:
        x, y = leaf(rows, 8), leaf(columns, 8)
        given = {name: make(rows, columns) for name, make in options.items() if callable(make)}
        given |= {name: value for name, value in options.items() if not callable(value)}
        backends = {} if function in WITHOUT_BACKEND else {"backend": backend}
        return lambda: function(x, y, **given, **backends), 2 * size([x, y])

    return call


def one_list(make: Callable[[], dict[str, Any]], function: Callable[..., Any]) -> Call:
    def call(backend: str) -> tuple[Callable[[], Any], int]:
        given = make()
        backends = {} if function in WITHOUT_BACKEND else {"backend": backend}
        return lambda: function(**given, **backends), 2 * size(given)

    return call


WITHOUT_BACKEND = {
    losses.pair_bce,
    losses.pairwise_rank_distillation,
    losses.group_whiten,
    losses.linear_kl,
    losses.covariance_penalty,
    losses.barlow_twins,
    losses.vicreg,
    losses.log_det,
    losses.effective_rank,
    losses.triplet,
    losses.contrastive,
    losses.alignment,
    mining.collapse,
    metrics.retrieval_metrics,
}


def first_column(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def all_columns(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The first row lists every column, the others none."""
    return torch.tensor([0, *[columns] * rows]), torch.arange(columns)


def shares(rows: int, columns: int) -> tuple[Tensor, ...]:
    return (*all_columns(rows, columns), torch.full((columns,), 1 / columns))


def excluded(rows: int, columns: int) -> co.Pairs:
    return co.Pairs(exclude=all_columns(rows, columns))


def same_label(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def same_col_labels(rows: int, columns: int) -> Tensor:
    return torch.zeros(columns, dtype=torch.int64)


for _rows, _columns in ((1, MANY), (MANY, 1)):
    claim("info_nce")(two_sides(losses.info_nce, _rows, _columns, target=first_column))
    claim("matryoshka_info_nce")(
        two_sides(losses.matryoshka_info_nce, _rows, _columns, target=first_column, dims=(4, 8))
    )
    claim("soft_info_nce")(two_sides(losses.soft_info_nce, _rows, _columns, targets=shares))
    claim("similarity_reduce")(two_sides(ops.similarity_reduce, _rows, _columns, pairs=excluded, reduce="logsumexp"))
    claim("similarity_reduce")(two_sides(ops.similarity_reduce, _rows, _columns, linear=all_columns, dim=(0, 1)))
    claim("similarity_prefix")(two_sides(ops.similarity_prefix, _rows, _columns, dims=(4, 8)))
    claim("sup_con")(lambda backend, n=_rows, m=_columns: _labelled(losses.sup_con, n, m, backend))
    claim("multi_positive_info_nce")(
        lambda backend, n=_rows, m=_columns: _labelled(losses.multi_positive_info_nce, n, m, backend)
    )
    claim("multi_positive_siglip")(
        two_sides(losses.multi_positive_siglip, _rows, _columns, labels=same_label, col_labels=same_col_labels)
    )
    claim("batch_hard_triplet")(
        lambda backend, n=_rows, m=_columns: _labelled(losses.batch_hard_triplet, n, m, backend)
    )
    claim("batch_semi_hard_triplet")(
        lambda backend, n=_rows, m=_columns: _labelled(losses.batch_semi_hard_triplet, n, m, backend, target=True)
    )


def _labelled(function: Any, rows: int, columns: int, backend: str, target: bool = False) -> Any:
    x, y = leaf(rows, 8), leaf(columns, 8)
    options = {"target": torch.zeros(rows, dtype=torch.int64)} if target else {}
    labels = torch.arange(rows) % 2, torch.arange(columns) % 2
    return lambda: function(x, labels[0], y=y, col_labels=labels[1], backend=backend, **options), 2 * size([x, y])


@claim("bixse")
def _bixse(backend: str) -> Any:
    x, y, (indptr, listed) = leaf(2, 8), leaf(MANY, 8), all_columns(2, MANY)
    grades = torch.rand(MANY)
    run = lambda: losses.bixse(x, y, grades, target=listed, indptr=indptr, backend=backend)  # noqa: E731
    return run, 2 * size([x, y, grades, listed])


@claim("pair_bce")
def _pair_bce(backend: str) -> Any:
    """All pairs have one row, and rows are long: gathered, they would take 256 MB, twice."""
    x, y = leaf(2, 2048), leaf(50, 2048)
    rows, cols = torch.zeros(1 << 15, dtype=torch.int64), torch.arange(1 << 15) % 50
    return lambda: losses.pair_bce(x, y, rows, cols, (cols % 2).float()), 2 * size([x, y, rows, cols])


@claim("negative_sampling")
def _negative_sampling(backend: str) -> Any:
    center, table, words = leaf(1, 512), leaf(50, 512), torch.arange(1 << 18)[None] % 50
    run = lambda: losses.negative_sampling(center, table, first_column(1, 1), words, backend=backend)  # noqa: E731
    return run, 2 * size([center, table, words])


@claim("mined_info_nce")
def _mined_info_nce(backend: str) -> Any:
    x, y, corpus, listed = leaf(1, 512), leaf(1, 512), leaf(50, 512), torch.arange(1 << 18)[None] % 50
    return lambda: losses.mined_info_nce(x, y, corpus, indices=listed, backend=backend), 2 * size([corpus, listed])


@claim("pairwise_rank_distillation")
def _one_list_of_scores(backend: str) -> Any:
    """All pairs would take 144 MB, seven times."""
    scores, teacher = leaf(1, 6_000), torch.randint(0, 5, (1, 6_000)).float()
    run = lambda: losses.pairwise_rank_distillation(scores, teacher, pair_weight="lambda")  # noqa: E731
    return run, 2 * size([scores, teacher])


@claim("similarity_topk")
def _long_lists(backend: str) -> Any:
    x, y = leaf(2, 8), leaf(MANY, 8)
    return lambda: ops.similarity_topk(x, y, MANY, backend=backend)[0], 2 * size([x, y]) + 3 * 12 * 2 * MANY


@claim("similarity_topk")
def _many_rows(backend: str) -> Any:
    x, y = leaf(MANY, 8), leaf(3, 8)
    return lambda: ops.similarity_topk(x, y, 3, backend=backend)[0], 2 * size([x, y]) + 3 * 12 * 3 * MANY


@claim("csls")
def _csls(backend: str) -> Any:
    x, y = torch.randn(MANY, 8), torch.randn(30, 8)
    return lambda: mining.csls(x, y, backend=backend), 2 * size([x, y]) + 3 * 12 * 10 * MANY


@claim("ratio_margin")
def _ratio_margin(backend: str) -> Any:
    x, y = torch.randn(30, 8), torch.randn(MANY, 8)
    return lambda: mining.ratio_margin(x, y, backend=backend), 2 * size([x, y]) + 3 * 12 * 4 * MANY


@claim("similarity_distill", "similarity_distillation")
def _distilled(backend: str) -> Any:
    x, y, tx, ty = leaf(2, 8), leaf(MANY, 8), torch.randn(2, 4), torch.randn(MANY, 4)
    kept = backend if backend == "reference" else "auto"
    options: Any = {"normalize": False, "memory_budget": 0, "backend": kept}
    return lambda: losses.similarity_distillation(x, y, tx, ty, **options), 2 * size([y, ty])


@claim("distance_distillation")
def _distances(backend: str) -> Any:
    x, teacher = leaf(6_000, 4), torch.randn(6_000, 4)
    kept = backend if backend == "reference" else "auto"
    return lambda: losses.distance_distillation(x, teacher, memory_budget=0, backend=kept), 2 * size([x, teacher])


@claim("similarity_values")
def _values(backend: str) -> Any:
    x, y, values = leaf(2, 8), leaf(MANY, 8), leaf(MANY, 4)
    kept = backend if backend == "reference" else "auto"
    run = lambda: ops.similarity_values(x, y, values, memory_budget=0, backend=kept)  # noqa: E731
    return run, 2 * size([y, values]) + numbers(2 * MANY)


# ---- Few rows of many features: a matrix of features would take 16 GB ------------------------------------------------


for _name in ("covariance_penalty", "log_det", "effective_rank"):
    claim(_name)(lambda backend, name=_name: _of_features(getattr(losses, name), 1))
for _name in ("barlow_twins", "vicreg", "alignment"):
    claim(_name)(lambda backend, name=_name: _of_features(getattr(losses, name), 2))


for _name in ("cosent", "angle"):  # a matrix of all pairs of scores would take 64 GB
    claim(_name)(lambda backend, name=_name: _ranked(getattr(losses, name)))


def _ranked(function: Any) -> Any:
    x, y, labels = leaf(MANY, 2), leaf(MANY, 2), torch.rand(MANY)
    return lambda: function(x, y, labels), 2 * size([x, y, labels])


for _name in ("batch_contrastive", "lifted_structure"):  # all pairs of MANY / 8 rows would take 1 GB
    claim(_name)(lambda backend, name=_name: _of_all_pairs(getattr(losses, name)))


def _of_all_pairs(function: Any) -> Any:
    x, labels = leaf(MANY // 8, 4), torch.arange(MANY // 8) // 8
    return lambda: function(x, labels), 2 * size([x, labels])


@claim("spectral_contrastive")
def _spectral(backend: str) -> Any:
    """All pairs would take 64 GB."""
    x, y = leaf(MANY, 8), leaf(MANY, 8)
    return lambda: losses.spectral_contrastive(x, y), 2 * size([x, y])


def _of_features(function: Any, sides: int) -> Any:
    x = [leaf(3, DEEP) for _ in range(sides)]
    return lambda: function(*x), 2 * size(x)


@claim("group_whiten")
def _groups(backend: str) -> Any:
    x = leaf(8, 1 << 14)
    return lambda: losses.group_whiten(x, 1 << 10), 2 * size(x) + numbers((1 << 28) >> 10)


@claim("cka")
def _kernels(backend: str) -> Any:
    """Kernels of all rows would take 64 GB each."""
    x, y = torch.randn(MANY, 8), torch.randn(MANY, 8)
    return lambda: metrics.cka(x, y), 4 * size([x, y])  # in float64


@claim("pair_recall")
def _pair_recall(backend: str) -> Any:
    """All similarities would take 780 MB."""
    x, y = torch.randn(6_000, 4), torch.randn(MANY // 4, 4)
    labels = torch.arange(6_000), torch.arange(MANY // 4) % 6_000
    return lambda: metrics.pair_recall(x, y, *labels, backend=backend), 2 * size([x, y, labels])


claim("sinkhorn")(lambda backend: _plan(1, 1 << 23))
claim("sinkhorn")(lambda backend: _plan(1 << 12, 1 << 11))


def _plan(rows: int, columns: int) -> Any:
    scores = torch.randn(rows, columns)
    return lambda: ops.sinkhorn(scores), size(scores) + numbers(columns)


@claim("koleo")
def _nearest(backend: str) -> Any:
    """All cosines would take 400 MB."""
    x = torch.randn(10_000, 32)
    return lambda: losses.koleo(x, backend=backend), 4 * size(x)


claim("uniformity")(lambda backend: _spread(1, MANY, backend))
claim("uniformity")(lambda backend: _spread(6_000, 1, backend))


def _spread(rows: int, queued: int, backend: str) -> Any:
    x, queue = leaf(rows, 4), torch.randn(queued, 4)
    return lambda: losses.uniformity(x, queue, memory_budget=0, backend=backend), 2 * size([x, queue])


@claim("triplet", "contrastive")
def _triplets(backend: str) -> Any:
    x, y, z = (leaf(MANY, 8) for _ in range(3))
    labels = torch.arange(MANY) % 2

    def run() -> Any:
        return [losses.triplet(x, y, z), losses.contrastive(x, y, labels.float())]

    return run, 2 * size([x, y, z])


# ---- Large softmaxes: one token and many classes, many tokens and few classes ----------------------------------------


for _tokens, _classes in ((1, MANY), (MANY, 4)):
    claim("linear_cross_entropy")(lambda b, t=_tokens, v=_classes: _large(losses.linear_cross_entropy, t, v, b))
    claim("linear_log_prob")(lambda b, t=_tokens, v=_classes: _large(losses.linear_log_prob, t, v, b))
    claim("linear_kl")(lambda b, t=_tokens, v=_classes: _large_kl(t, v))
    claim("arc_face", "cos_face", "margin_softmax")(lambda b, t=_tokens, v=_classes: _large(losses.arc_face, t, v, b))


def _large(function: Any, tokens: int, classes: int, backend: str) -> Any:
    hidden, head, labels = leaf(tokens, 8), leaf(classes, 8), torch.arange(tokens) % classes
    return lambda: function(hidden, head, labels, backend=backend), 2 * size([hidden, head])


def _large_kl(tokens: int, classes: int) -> Any:
    hidden, head, other = leaf(tokens, 8), leaf(classes, 8), torch.randn(classes, 8)
    return lambda: losses.linear_kl(hidden, head, hidden.detach(), other), 4 * size([hidden, head])


# ---- Late interaction: one query and one document of thousands of tokens --------------------------------------------


@claim("late_interaction")
def _long_documents(backend: str) -> Any:
    x, y = leaf(1, 12_000, 8), leaf(1, 12_000, 8)
    return lambda: losses.late_interaction(x, y, normalize=False, backend=backend), 2 * size([x, y]) + numbers(12_000)


@claim("xtr")
def _retrieved(backend: str) -> Any:
    x, y = leaf(1, 12_000, 8), leaf(2, 6_000, 8)
    return lambda: ops.xtr(x, y, 4, backend=backend), 2 * size([x, y]) + 3 * 12 * 12_000 * 6


# ---- Routers --------------------------------------------------------------------------------------------------------


for _tokens, _experts in ((1, MANY), (MANY, 4)):
    claim("route")(lambda b, t=_tokens, e=_experts: _routed(t, e, b))
    claim("expert_choice")(lambda b, t=_tokens, e=_experts: _chosen(t, e, b))


def _routed(tokens: int, experts: int, backend: str) -> Any:
    logits = leaf(tokens, experts)
    losses_of = ("switch", "z", "importance")
    run = lambda: co.route(logits, 2, losses=losses_of, backend=backend).loss  # noqa: E731
    return run, 4 * size(logits) + numbers(20 * tokens + 4 * experts)  # the last: of a block of tokens, with slack


def _chosen(tokens: int, experts: int, backend: str) -> Any:
    logits = leaf(tokens, experts)
    return lambda: co.ops.expert_choice(logits, 1, backend=backend).gates, 6 * size(logits) + numbers(20 * experts)


@claim("grouped_matmul", "SparseMoE")
def _groups_of_one_row(backend: str) -> Any:
    """Every expert has a row or two: panels padded to a tile of 32 rows would take 1 GB."""
    rows, depth = 1 << 15, 256
    a, b = leaf(rows, depth), leaf(64, depth, 8)
    offsets = torch.cat([torch.arange(64), torch.tensor([rows])])
    return lambda: co.ops.grouped_matmul(a, b, offsets, backend=backend), 2 * size([a, b])


@claim("SoftMoE")
def _soft(backend: str) -> Any:
    layer, x = moe.SoftMoE(8, 8, 4, 4), leaf(2, MANY // 4, 8)
    return lambda: layer(x), 4 * size(x) + numbers(6 * 2 * MANY // 4 * 4 * 4)


# ---- Lists, mining, state -------------------------------------------------------------------------------------------


@claim("retrieval_metrics")
def _one_long_judgement(backend: str) -> Any:
    """10,000 queries of which one has 100,000 judgements: a table would take 8 GB."""
    found, judged = torch.arange(100_000).view(10_000, 10), torch.arange(100_000)
    indptr = torch.tensor([0, *[100_000] * 10_000])
    return lambda: metrics.retrieval_metrics(found, (indptr, judged), k=(10, 100_000)), 20 * size([found, judged])


@claim("UnigramSampler")
def _words(backend: str) -> Any:
    counts = torch.ones(1 << 20)
    return lambda: losses.UnigramSampler(counts).cumulative, 8 * size(counts)


@claim("mine_hard_negatives")
def _many_positives(backend: str) -> Any:
    """One query with 40,000 positives: their rows would take 160 MB, and as much again."""
    query, corpus = torch.randn(2, 1024), torch.randn(512, 1024)
    big = _Repeated(corpus, 41_000)
    positives = all_columns(2, 40_000)
    rules = co.mining.NegativeRules(near_duplicate=2.0)
    run = lambda: co.mine_hard_negatives(query, big, positives, 3, rules=rules, block_rows=2048, backend=backend)  # noqa: E731
    return lambda: run().indices, 6 * size(positives) + 6 * 2048 * 4096


class _Repeated:
    """A corpus that is its rows over and over again."""

    def __init__(self, rows: Tensor, count: int) -> None:
        self.rows, self.shape = rows, (count, rows.shape[1])

    def __getitem__(self, part: slice) -> Tensor:
        return self.rows[torch.arange(part.start, part.stop) % len(self.rows)]


@claim("search", "TopKState")
def _streamed(backend: str) -> Any:
    query = torch.randn(2, 64)
    corpus = _Repeated(torch.randn(512, 64), 1 << 21)
    run = lambda: mining.search(query, corpus, 100, block_rows=1 << 14, backend=backend)  # noqa: E731
    return run, 3 * (1 << 14) * 256


@claim("MemoryBank")
def _bank(backend: str) -> Any:
    def run() -> Tensor:
        bank = mining.MemoryBank(MANY, 8)
        bank.enqueue(torch.randn(MANY, 8))
        return bank.topk(torch.randn(1, 8), 5, backend=backend).values

    return run, 3 * MANY * (8 * 4 + 24)


@claim("ContrastiveCache")
def _cache(backend: str) -> Any:
    context = torch.randn(1, 1 << 15, 64)
    return lambda: decoding.ContrastiveCache(context).rows(), 4 * size(context)


if __name__ == "__main__":
    backend, names = sys.argv[1], sys.argv[2:]
    for name in names:
        for number, each in enumerate(CLAIMS[name]):
            # What is loaded and allocated once is not of the call.
            print(json.dumps({"name": name, "number": number, **measure(each, backend)}), flush=True)
