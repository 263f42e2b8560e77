"""Losses at the batch sizes that people train with, against the same mathematics in plain torch.

    python -m benchmarks.run --small                 all, appended to results/<machine>-small.csv
    python -m benchmarks.run --small --op clip       one function

A step is forward and backward in float32 at D=512. Up to N=256 it is timed in CPU time of one thread, which a busy
machine leaves alone to 3%; above in wall time with all threads. Both sides take turns, ratios are of minima.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import provenance, results
from benchmarks.measure import Timing
from benchmarks.registry import OURS

PLAIN = "plain torch"
DEPTH, EXPERTS = 512, 32
# Rows in CPU time of one thread, and rows in wall time; what each may take of plain torch's time.
LIMITS = {8: 1.0, 64: 1.0, 256: 1.0, 512: 0.9, 1024: 0.75, 2048: 0.7}
ONE_THREAD = 256
CALLS = 5


def limit_of(function: str, rows: int) -> float:
    """The share of plain torch's time that a step may take."""
    return 0.7 if rows == 8 and function in ("clip", "info_nce") else LIMITS[rows]


@dataclass(frozen=True)
class Side:
    """Both ways to compute one loss, of the same leaves."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    matrices: int = 2
    largest: int = 2048


def clip(x: Tensor, y: Tensor) -> Tensor:
    """CLIP's loss, dense."""
    logits, labels = x @ y.T / 0.07, torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def info_nce(x: Tensor, y: Tensor) -> Tensor:
    """InfoNCE of one direction, dense."""
    return F.cross_entropy(x @ y.T / 0.07, torch.arange(len(x)))


def siglip(x: Tensor, y: Tensor) -> Tensor:
    """SigLIP, dense."""
    logits, sign = 10.0 * x @ y.T - 10.0, 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


def nt_xent(x: Tensor, y: Tensor) -> Tensor:
    """NT-Xent, dense."""
    views, rows = F.normalize(torch.cat([x, y]), dim=1), len(x)
    logits = (views @ views.T / 0.5).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, (torch.arange(2 * rows) + rows) % (2 * rows))


def sup_con(x: Tensor) -> Tensor:
    """SupCon over four classes, dense."""
    views, labels = F.normalize(x, dim=1), torch.arange(len(x)) % 4
    logits = (views @ views.T / 0.1).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    logs = logits.log_softmax(1).masked_fill(~positive, 0.0)
    return -(logs.sum(1) / positive.sum(1)).mean()


def route(logits: Tensor) -> Tensor:
    """Top-2 gates, slots of all choices, and the two losses that a router trains with, dense."""
    p = logits.softmax(1)
    gates, chosen = p.topk(2, dim=1)
    taken = F.one_hot(chosen.T.reshape(-1), EXPERTS)  # all first choices before any second one
    places = ((taken.cumsum(0) - 1) * taken).sum(1).view(2, -1).T
    capacity = -(-2 * len(logits) // EXPERTS)
    kept = torch.where(places < capacity, gates, 0.0)
    balance = EXPERTS * (taken.float().mean(0) * p.mean(0)).sum()
    return kept.sum() + 0.01 * balance + 0.001 * logits.logsumexp(1).square().mean()


def ours() -> dict[str, Side]:
    """Every function with what it is compared with."""
    import contrastive_ops as co

    def our_route(logits: Tensor) -> Tensor:
        losses = (co.ops.RouterLoss("switch", 0.01), co.ops.RouterLoss("z", 0.001))
        routing = co.route(logits, 2, capacity=1.0, priority="position", losses=losses)
        return torch.where(routing.slots >= 0, routing.gates, 0.0).sum() + routing.loss

    def our_sup_con(x: Tensor) -> Tensor:
        return co.sup_con(x, torch.arange(len(x)) % 4, temperature=0.1)

    return {
        "clip": Side(lambda x, y: co.clip(x, y, normalize=False), clip),
        "info_nce": Side(lambda x, y: co.info_nce(x, y, normalize=False), info_nce),
        "siglip": Side(lambda x, y: co.siglip(x, y, normalize=False), siglip),
        "nt_xent": Side(lambda x, y: co.nt_xent(x, y, temperature=0.5), nt_xent, largest=1024),
        "sup_con": Side(our_sup_con, sup_con, matrices=1),
        "route": Side(our_route, route, matrices=0, largest=256),
    }


def steps_of(side: Side, rows: int) -> dict[str, Callable[[], None]]:
    """One forward and backward of both, of the same leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, DEPTH)] * side.matrices or [(rows, EXPERTS)]
    leaves = [F.normalize(torch.randn(shape, generator=generator), dim=1).requires_grad_() for shape in shapes]

    def step(function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            function(*leaves).backward()

        return run

    return {OURS: step(side.ours), PLAIN: step(side.plain)}


def measure_one(side: Side, rows: int, rounds: int) -> dict[str, Timing]:
    """Times of both sides in turns."""
    clock = time.thread_time if rows <= ONE_THREAD else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(1 if rows <= ONE_THREAD else before)
    try:
        steps = steps_of(side, rows)
        samples: dict[str, list[float]] = {name: [] for name in steps}
        turns = rounds * (30 if rows <= 64 else 8 if rows <= 512 else 2)
        for turn in range(turns + 2):
            for name, step in steps.items():
                start = clock()
                for _ in range(CALLS):
                    step()
                if turn > 1:
                    samples[name].append((clock() - start) / CALLS)
    finally:
        torch.set_num_threads(before)
    return {name: Timing.of(values) for name, values in samples.items()}


def rows_of(function: str, rows: int, timings: dict[str, Timing], rounds: int) -> list[results.Row]:
    """CSV rows of both sides."""
    common = {"op": function, "case": f"small-{function}-N{rows}", "shapes": f"N={rows} D={DEPTH}", "dtype": "fp32"}
    found = []
    for name, timing in timings.items():
        seconds = {"min": timing.minimum, "median": timing.median, "p20": timing.p20, "p80": timing.p80}
        times = {f"{key}_ms": f"{1e3 * value:.4g}" for key, value in seconds.items()}
        package = "contrastive_ops" if name == OURS else "torch"
        said = {"provider": name, "kind": "ours" if name == OURS else "torch", "version": provenance.version(package)}
        found.append({**common, **said, "status": "ok", "rounds": str(rounds), **times})
    return found


def run(op: str | None, *, rounds: int, quick: bool = False, csv: Path | None = None) -> int:
    """The command; returns the exit status."""
    sides = {name: side for name, side in ours().items() if op in (None, name)}
    if not sides:
        print(f"no small batch of op={op!r}; there are {', '.join(ours())}", file=sys.stderr)
        return 2
    stamp = {"run": provenance.now(), **provenance.gather()}
    if csv is None and not quick:
        csv = results.file_of(f"{provenance.machine_kind()}-small")
    print(f"{'step':24s} {'ours us':>10s} {'torch us':>10s}   ratio", flush=True)
    for name, side in sides.items():
        for rows in LIMITS if not quick else (8,):
            if rows > side.largest:
                continue
            timings = measure_one(side, rows, rounds)
            mine, other = timings[OURS].minimum, timings[PLAIN].minimum
            mark = "" if mine <= limit_of(name, rows) * other else f"  above {limit_of(name, rows)}"
            print(
                f"{name + f' N={rows}':24s} {1e6 * mine:10.0f} {1e6 * other:10.0f} {mine / other:7.2f}{mark}",
                flush=True,
            )
            if csv is not None:
                results.append(csv, [{**row, **stamp} for row in rows_of(name, rows, timings, rounds)])
    return 0
