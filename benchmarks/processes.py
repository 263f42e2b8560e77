"""CLIP's loss over two processes of one thread each, beside open_clip's gather; and on up to 1,024 ranks, MODELLED.

    python -m benchmarks.processes                       2 processes, 4,096 pairs of 768 dimensions
    python -m benchmarks.processes --rows 2048 --save    appended to results/<machine>-processes.csv
    python -m benchmarks.processes --model               and the model, from the rates that were measured
    python -m benchmarks.processes --model --rate 4e14 --bandwidth 5e10 --latency 2e-5 --dtype-bytes 2
                                                         the model alone, for rates that are given

A step is forward and backward in float32. All providers run in turns on the same processes, which begin each step
together; its time is that of the slower one, and the fastest round counts. `half of one process` is the step of all
pairs on one process, of which both do it at the same time, over 2; `bytes moved` are the collectives of "gather" alone.
The target is 1.15 times the first, and the second.

The model: ranks of n rows each, operations at the measured rate, messages of a latency and a bandwidth, collectives of
W - 1 messages one after another. Ranks do not wait for each other, and links are not shared: real ones will be slower.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import contrastive_ops
from benchmarks import provenance, results
from contrastive_ops import distributed

PROCESSES = 2
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TARGET = 1.15
LABEL = "MODELLED from rates, not measured: see benchmarks/processes.py"
HALF, MOVED = "half of one process", "bytes moved"

Step = Callable[[], object]


# ---------------------------------------------------------------------------------------------
# Measured


def _steps(rank: int, rows: int, depth: int) -> dict[str, Step]:
    """What each process does, by the name of who does it."""
    local = rows // PROCESSES
    generator = torch.Generator().manual_seed(0)
    whole = [torch.nn.functional.normalize(torch.randn(rows, depth, generator=generator)) for _ in range(2)]
    part = [side[rank * local : (rank + 1) * local].clone().requires_grad_() for side in whole]
    whole = [side.requires_grad_() for side in whole]
    scale = torch.tensor(14.3, requires_grad=True)

    def step(function: Callable[..., torch.Tensor], sides: list[torch.Tensor]) -> Step:
        return lambda: torch.autograd.grad(function(*sides), [*sides, scale])

    def moved() -> None:
        x = torch.empty(local, depth)
        every = torch.empty(rows, depth)
        dist.all_gather_into_tensor(every, x)
        dist.all_to_all_single(torch.empty_like(every), every)
        for _ in range(2):  # folds of columns, and their gradients
            dist.all_to_all_single(torch.empty(rows), torch.empty(rows))

    found: dict[str, Step] = {}
    for schedule in ("gather", "ring"):
        loss = partial(distributed.clip, scale=scale, schedule=schedule, normalize=False)
        found[f"contrastive_ops {schedule}"] = step(loss, part)
    found |= _peers(rank, part, scale, step)
    found[HALF] = step(lambda x, y: contrastive_ops.clip(x, y, scale=scale, normalize=False), whole)
    found[MOVED] = moved
    return found


def _peers(rank: int, part: list[torch.Tensor], scale: torch.Tensor, step: Callable[..., Step]) -> dict[str, Step]:
    """open_clip's loss by its flags, those whose gradients are right for shards of one size."""
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return {}
    found = {}
    for name, local in (("open_clip gather_with_grad", False), ("open_clip local_loss + gather_with_grad", True)):
        loss = ClipLoss(local_loss=local, gather_with_grad=True, rank=rank, world_size=PROCESSES)
        found[name] = step(lambda x, y, loss=loss: loss(x, y, scale), part)
    return found


def _process(rank: int, meeting: str, rows: int, depth: int, rounds: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    steps = _steps(rank, rows, depth)
    fastest = dict.fromkeys(steps, math.inf)
    names = list(steps)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            begin = time.perf_counter()
            steps[name]()
            taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if number:  # the first one warms up
                fastest[name] = min(fastest[name], taken.item())
    fastest[HALF] /= 2
    if rank == 0:
        pipe.send(fastest)
    dist.destroy_process_group()


def measure(rows: int, depth: int, rounds: int) -> dict[str, float]:
    """Seconds of a step, by provider."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (os.path.join(folder, "meeting"), rows, depth, rounds, there)
        multiprocessing.spawn(_process, arguments, nprocs=PROCESSES)
        found: dict[str, float] = here.recv()
    return found


# ---------------------------------------------------------------------------------------------
# Modelled


@dataclass(frozen=True)
class Rates:
    """What the model is made of.

    Attributes:
        operations: per second, of a step of a rank.
        bandwidth: bytes per second that a rank sends while it receives as many.
        latency: seconds of a message.
        width: bytes of a number of the rows.
    """

    operations: float
    bandwidth: float
    latency: float
    width: int

    def message(self, size: float) -> float:
        """Seconds of a message of so many bytes."""
        return self.latency + size / self.bandwidth

    def gather(self, ranks: int, rows: int, depth: int) -> float:
        """Seconds of a step of clip with "gather"."""
        of_rows, of_folds = self.message(rows * depth * self.width), self.message(4 * rows)
        agreed = math.ceil(math.log2(ranks)) * self.latency
        travel = (ranks - 1) * (2 * of_rows + 2 * of_folds) + agreed
        return 8 * rows * rows * ranks * depth / self.operations + travel

    def ring(self, ranks: int, rows: int, depth: int) -> float:
        """Seconds of a step of clip with "ring": a block is swept while the next one travels."""
        block = rows * rows * depth / self.operations
        there, back = self.message(rows * depth * self.width), self.message(rows * depth * (self.width + 4))
        folds = (ranks - 1) * 2 * self.message(4 * rows) + math.ceil(math.log2(ranks)) * self.latency
        forward = 2 * block + (ranks - 1) * max(2 * block, there)
        backward = 8 * block + (ranks - 1) * max(8 * block, there, back) + (back if ranks > 1 else 0.0)
        return forward + backward + folds


def rates_of(measured: dict[str, float], rows: int, depth: int) -> Rates:
    """The rates that explain what was measured: messages are taken to cost their bytes alone."""
    sent = (PROCESSES - 1) / PROCESSES * rows * (2 * depth + 2) * 4
    return Rates(8 * rows * rows / PROCESSES * depth / measured[HALF], sent / measured[MOVED], 5e-5, 4)


def modelled(rates: Rates, rows: int, depth: int) -> Iterator[tuple[int, float, float]]:
    """(ranks, seconds with "gather", with "ring") for ranks of so many rows."""
    for ranks in RANKS:
        yield ranks, rates.gather(ranks, rows, depth), rates.ring(ranks, rows, depth)


# ---------------------------------------------------------------------------------------------
# The command


def _row(op: str, case: str, shapes: str, provider: str, kind: str, rounds: int, seconds: float) -> results.Row:
    return {
        "op": op, "case": case, "shapes": shapes, "dtype": "fp32", "provider": provider, "kind": kind,
        "version": provenance.version("open_clip_torch" if kind == "peer" else "contrastive_ops"), "status": "ok",
        "rounds": str(rounds), "min_ms": f"{1e3 * seconds:.4g}",
    }  # fmt: skip


def print_measured(found: dict[str, float]) -> float:
    """The table, and the ratio that has a target."""
    ours = found["contrastive_ops gather"]
    for name, seconds in found.items():
        print(f"{name:45s}{1e3 * seconds:10.1f} ms{seconds / ours:8.2f}")
    ratio = (ours - found[MOVED]) / found[HALF]
    print(f"without the bytes moved, over half of one process: {ratio:.3f} (target {TARGET})")
    return ratio


def print_modelled(rates: Rates, rows: int, depth: int) -> None:
    """The table of ranks."""
    print(
        f"{LABEL}\n{rates.operations:.3g} operations/s, {rates.bandwidth:.3g} bytes/s, {rates.latency:.3g} s a message"
    )
    print(f"{rows} rows a rank, {depth} dimensions, {rates.width} bytes a number")
    print(
        f"{'ranks':>6s}{'rows of all':>13s}{'gather [ms]':>13s}{'ring [ms]':>13s}{'GiB gather':>12s}{'GiB ring':>10s}"
    )
    for ranks, gather, ring in modelled(rates, rows, depth):
        held = ranks * rows * depth * (3 * rates.width) / 2**30, rows * depth * (2 * rates.width + 8) / 2**30
        cells = (1e3 * gather, 1e3 * ring, *held)
        print(f"{ranks:13d}{ranks * rows:13d}" + "".join(f"{cell:13.4g}" for cell in cells))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="pairs of all processes (default: 4096)")
    parser.add_argument("--depth", type=int, default=768, help="dimensions (default: 768)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each provider (default: 5)")
    parser.add_argument("--model", action="store_true", help="also model 1 to 1,024 ranks")
    parser.add_argument("--rate", type=float, help="operations per second, with --bandwidth and --latency: model alone")
    parser.add_argument("--bandwidth", type=float, help="bytes per second")
    parser.add_argument("--latency", type=float, help="seconds of a message")
    parser.add_argument("--dtype-bytes", type=int, default=4, help="of a number of the rows, with --rate (default: 4)")
    parser.add_argument("--save", action="store_true", help="append to results/<machine>-processes.csv")
    args = parser.parse_args(arguments)
    if args.rate:
        given = Rates(args.rate, args.bandwidth or math.inf, args.latency or 0.0, args.dtype_bytes)
        print_modelled(given, args.rows // PROCESSES, args.depth)
        return 0
    path = stored_in() if args.save else None
    compare(args.rows, args.depth, args.rounds, model=args.model, csv=path)
    return 0


def stored_in() -> Path:
    return results.file_of(f"{provenance.machine_kind()}-processes")


def run(*, rounds: int, quick: bool = False, csv: Path | None = None) -> int:
    """As a part of the suite: at two shapes, stored like its other parts; returns the exit status."""
    if csv is None and not quick:
        csv = stored_in()
    began = provenance.now()
    for rows, depth in ((256, 64),) if quick else ((4096, 768), (8192, 512)):
        compare(rows, depth, rounds, csv=csv, began=began)
    return 0


def compare(
    rows: int, depth: int, rounds: int, *, model: bool = False, csv: Path | None = None, began: str | None = None
) -> None:
    """Measures, prints, and appends to a file if there is one."""
    print(f"{provenance.device_name()}: {PROCESSES} processes of one thread, {rows} x {depth}, float32", flush=True)
    found = measure(rows, depth, rounds)
    print_measured(found)
    local, rates = rows // PROCESSES, rates_of(found, rows, depth)
    if model:
        print_modelled(rates, local, depth)
    if csv is None:
        return
    name, shapes = "distributed.clip", f"{rows} x {depth}"
    lines = [_row(name, f"{name}-fp32", shapes, *each, rounds, found[each[0]]) for each in kinds(found)]
    for ranks, gather, ring in modelled(rates, local, depth) if model else ():
        for schedule, seconds in (("gather", gather), ("ring", ring)):
            case, shape = f"{name}-modelled", f"{local} x {depth} a rank"
            lines.append(_row(name, case, shape, f"{schedule}, {ranks} ranks", "modelled", 0, seconds))
    stamp = {"run": began or provenance.now(), **provenance.gather(), "threads": "1"}
    results.append(csv, [{**row, **stamp} for row in lines])


def kinds(found: dict[str, float]) -> Iterator[tuple[str, str]]:
    """(provider, kind) of what was measured."""
    for name in found:
        ours = name.startswith("contrastive_ops")
        yield name, "ours" if ours else "floor" if name in (HALF, MOVED) else "peer"


if __name__ == "__main__":
    sys.exit(main())
