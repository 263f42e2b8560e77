"""Recipes of papers against the folds that they rest on.

    python -m benchmarks.run --recipes                 all, appended to results/<machine>-recipes.csv
    python -m benchmarks.run --recipes --op simcse     one recipe

A step is forward and backward in float32 at N=2048, D=256, in CPU time of one thread, which a busy machine leaves alone
to 3%. Both sides take turns, ratios are of minima. The other side is `similarity_reduce` of the same matrices, sums of
its rows, one call for each sweep that the formula asks for, searches, whitening and codes: what nobody does without.
Recipes whose released code was read should take at most 1.3 times as long.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import provenance, results
from benchmarks.measure import Timing
from benchmarks.registry import OURS
from contrastive_ops import Pairs, recipes, similarity_topk
from contrastive_ops.losses import group_whiten
from contrastive_ops.losses._sweep import Sweep
from contrastive_ops.ops import Guide, maxsim

FOLDS = "folds"
ROWS, DEPTH = 2048, 256
LIMIT = 1.3


def inputs(rows: int) -> dict[str, Tensor]:
    """Unit rows that learn, labels, and rows of a teacher."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    found = {name: drawn(rows, DEPTH).requires_grad_() for name in ("x", "y", "z")}
    found["private"] = drawn(rows, 4, DEPTH).requires_grad_()
    found["tokens"], found["others"] = (drawn(rows // 32, 16, DEPTH).requires_grad_() for _ in range(2))
    found |= {"teacher": drawn(rows, DEPTH), "queue": drawn(rows, DEPTH)}
    found["scores"] = torch.rand(rows, generator=generator)
    found["labels"] = torch.randint(rows // 8, (rows,), generator=generator)
    return found


def fold(x: Tensor, y: Tensor | None = None, *, reduce: str = "logsumexp", pairs: Pairs | None = None) -> Tensor:
    """One sweep, and a gradient for every row."""
    return Sweep(("fold", "x", "y"), 20.0, pairs).fold(x, y, reduce).rows[0].sum()


def both_ways(x: Tensor, y: Tensor) -> Tensor:
    """One sweep of rows and columns."""
    found = Sweep(("fold", "x", "y"), 20.0).fold(x, y, "logsumexp", dim=(0, 1))
    return found.rows[0].sum() + found.cols[0].sum()


def steps(t: dict[str, Tensor]) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each recipe whose code was read and that compares rows with rows, and its folds."""
    x, y, z, private, teacher, queue = (t[name] for name in ("x", "y", "z", "private", "teacher", "queue"))
    labels, scores, tokens, others = (t[name] for name in ("labels", "scores", "tokens", "others"))
    rows = x.shape[0]
    guided = Pairs(guide=Guide(teacher, torch.cat([queue, torch.zeros_like(queue)]), below=0.9))

    def two() -> Tensor:
        return fold(x, torch.cat([y, z]))

    def near() -> Tensor:
        return fold(x, y, reduce="sum_relu", pairs=Pairs(diagonal=0, same=(labels, labels)))

    def whitened() -> Tensor:
        a, b, c = (group_whiten(each, 32) for each in (x, y, z))
        return fold(a, b) + fold(a, c)

    def autoencoder() -> Tensor:
        codes = (x - queue[0]) @ queue.T + queue[:, 0]
        values, places = codes.topk(32, 1)
        kept = [torch.zeros_like(codes).scatter(1, places[:, :n], values[:, :n]).relu() for n in (8, 32)]
        return sum((F.mse_loss(each @ queue + queue[0], x) for each in kept), fold(F.normalize(kept[0])))

    def targets() -> Tensor:
        both = torch.cat([x, y], 1).detach()
        for bias in (None, scores):
            similarity_topk(both, both, 1, col_bias=bias)
        return fold(x, y) + fold(y, x) + fold(both)

    return {
        "simcse": (lambda: recipes.simcse(x, y), lambda: fold(x, y)),
        "simcse hard": (lambda: recipes.simcse(x, y, z), two),
        "simcse weighted": (lambda: recipes.simcse(x, y, z, hard_weight=0.5), two),
        "promcse": (lambda: recipes.promcse(x, y, z), lambda: two() + fold(x, torch.cat([y, z]), reduce="max")),
        "mcse": (lambda: recipes.mcse(x, y, y, z, x), lambda: fold(x, y) + fold(torch.cat([y, z]), x)),
        "sg_opt": (
            lambda: recipes.sg_opt(x, private),
            lambda: fold(x, private.flatten(0, 1)) + fold(x, private.flatten(0, 1)),
        ),
        "clhaif": (lambda: recipes.clhaif(x, y, z, scores), two),
        "clhaif all": (lambda: recipes.clhaif(x, y, z, scores, smooth="all"), two),
        "quick_thought": (lambda: recipes.quick_thought(x, y), lambda: fold(x, y)),
        "cluster_ns": (
            lambda: recipes.cluster_ns(x, y, queue[:128]),
            lambda: two() + near() + near(),
        ),
        "consert": (lambda: recipes.consert(x, y), lambda: fold(torch.cat([x, y]))),
        "whitened_cse": (lambda: recipes.whitened_cse(x, y, z, groups=32), whitened),
        "dclr": (lambda: recipes.dclr(x, y, z, teacher, queue), lambda: fold(x, torch.cat([y, z]), pairs=guided)),
        "dclr released": (
            lambda: recipes.dclr(x, y, z, teacher, queue, released=True),
            lambda: fold(x, torch.cat([y, z]), pairs=guided),
        ),
        "cosine_contrastive": (
            lambda: recipes.cosine_contrastive(x, labels),
            lambda: fold(x, reduce="sum_relu", pairs=Pairs(differ=(labels, labels))),
        ),
        "dpr": (lambda: recipes.dpr(x, y), lambda: fold(x, y)),
        "fedsa": (
            lambda: recipes.fedsa(x, labels % 128, queue[:128].requires_grad_(), 0.5),
            lambda: fold(x, queue[:128].requires_grad_()) + F.mse_loss(x, queue[labels % 128]),
        ),
        "proclip": (lambda: recipes.proclip(x, teacher), lambda: fold(x) + fold(teacher.requires_grad_())),
        "contriever": (lambda: recipes.contriever(x, y, queue), lambda: fold(x, queue)),
        "simlm": (
            lambda: recipes.simlm(x, private[:, :2]),
            lambda: fold(torch.cat([x, private[:, 0]])) + fold(x, private[:, 1]),
        ),
        "pair": (lambda: recipes.pair(x, y, z), lambda: two() + fold(y, torch.cat([x, z]))),
        "confit": (
            lambda: recipes.confit(x, y, z, private[:, 0]),
            lambda: both_ways(x, y) + fold(x, z) + fold(y, private[:, 0]),
        ),
        "mnr_plus": (lambda: recipes.mnr_plus(x, y), targets),
        "splade": (lambda: recipes.splade(x.abs(), y.abs(), z.abs()), lambda: fold(x, y)),
        "rcmd": (
            lambda: recipes.rcmd(tokens, others),
            lambda: maxsim(tokens, others).sum() + maxsim(others, tokens).sum(),
        ),
        "unisrec": (lambda: recipes.unisrec(x, y, labels), lambda: fold(x, y)),
        "mclrec": (
            lambda: recipes.mclrec_regularizer(x, y),
            lambda: fold(torch.cat([x, y]), reduce="max") + fold(torch.cat([x, y]), reduce="sum"),
        ),
        "static_embedding_kd": (
            lambda: recipes.static_embedding_kd(x, teacher),
            lambda: fold(x) + fold(teacher.requires_grad_()),
        ),
        "csr": (
            lambda: recipes.csr(x, queue, queue[:, 0], queue[0], k=8),
            autoencoder,
        ),
        "align_uniform": (lambda: recipes.align_uniform(x, y), lambda: fold(x) + fold(y)),
        "laeo": (lambda: recipes.laeo(x, y), lambda: fold(x, y, reduce="sum_softplus")),
        "laeo cpc": (lambda: recipes.laeo(x, y, kind="cpc"), lambda: fold(x, y)),
        "superflow": (
            lambda: recipes.superflow(x, y, torch.arange(rows), torch.arange(rows), rows),
            lambda: fold(x, y),
        ),
    }


def measure_one(pair: tuple[Callable[[], Tensor], Callable[[], Tensor]], rounds: int) -> dict[str, Timing]:
    """CPU time of both in turns."""
    samples: dict[str, list[float]] = {OURS: [], FOLDS: []}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(2 * rounds + 1):
            for name, step in zip(samples, pair, strict=True):
                start = time.thread_time()
                step().backward()
                if turn:
                    samples[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(before)
    return {name: Timing.of(values) for name, values in samples.items()}


def rows_of(name: str, rows: int, timings: dict[str, Timing], rounds: int) -> list[results.Row]:
    """CSV rows of both sides."""
    common = {"op": f"recipes.{name}", "case": f"recipe-{name}", "shapes": f"N={rows} D={DEPTH}", "dtype": "fp32"}
    version = provenance.version("contrastive_ops")
    found = []
    for side, timing in timings.items():
        seconds = {"min": timing.minimum, "median": timing.median, "p20": timing.p20, "p80": timing.p80}
        times = {f"{key}_ms": f"{1e3 * value:.4g}" for key, value in seconds.items()}
        found.append(
            {**common, "provider": side, "kind": "ours", "version": version, "status": "ok", "rounds": str(rounds)}
            | times
        )
    return found


def run(op: str | None, *, rounds: int, quick: bool = False, csv: Path | None = None) -> int:
    """The command; returns the exit status."""
    rows = 64 if quick else ROWS
    pairs = {name: pair for name, pair in steps(inputs(rows)).items() if op in (None, name)}
    if not pairs:
        print(f"no recipe {op!r}; there are {', '.join(steps(inputs(64)))}", file=sys.stderr)
        return 2
    stamp = {"run": provenance.now(), **provenance.gather()}
    if csv is None and not quick:
        csv = results.file_of(f"{provenance.machine_kind()}-recipes")
    print(f"{'recipe':24s} {'ours ms':>10s} {'folds ms':>10s}   ratio", flush=True)
    for name, pair in pairs.items():
        timings = measure_one(pair, rounds)
        mine, other = timings[OURS].minimum, timings[FOLDS].minimum
        mark = "" if mine <= LIMIT * other else f"  above {LIMIT}"
        print(f"{name:24s} {1e3 * mine:10.1f} {1e3 * other:10.1f} {mine / other:7.2f}{mark}", flush=True)
        if csv is not None:
            results.append(csv, [{**row, **stamp} for row in rows_of(name, rows, timings, rounds)])
    return 0
