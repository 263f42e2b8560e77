"""Steps on many cores, MODELLED, not measured: tasks are timed on one core and scheduled on virtual ones.

    python -m benchmarks.cores                           every primitive and loss, small, middle and large
    python -m benchmarks.cores --op clip --size large    some of them
    python -m benchmarks.cores --regions 64              and the regions that lose most on 64 cores
    python -m benchmarks.cores --check                   two virtual cores against two real ones
    python -m benchmarks.cores --save                    appended to results/<machine>-cores.csv

A step is forward and backward in float32; of a search and of `route` it is forward alone, and `route_and_back` is both,
with two losses. Tasks run one after another on one thread, in its CPU time without that of the clock, and each is
charged to the virtual core that is free first; a region costs REGION_SECONDS more. Where cuts do not depend on the
number of cores, tasks are timed once for all numbers, and the least of all rounds counts for each: see
benchmarks/virtual_cores.py. All that is outside of regions, torch's element-wise passes too, is counted as if one core
did it. Bandwidth, shared caches and clocks are not modelled, so that real cores will be slower.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import contrastive_ops
from benchmarks import provenance, results
from benchmarks.virtual_cores import Modelled, model
from contrastive_ops import moe, ops
from contrastive_ops.core import extension
from contrastive_ops.testing import LOSSES, leaves

CORES = (1, 2, 4, 8, 16, 32, 64, 128)
WORK_AT = 64  # where work is compared with one core's
LIMIT = 0.1  # how far two virtual cores may be from two real ones
SIZES = ("small", "middle", "large")
ROWS = (256, 1024, 4096)
LABEL = "MODELLED on virtual cores, not measured: see benchmarks/cores.py"

Step = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """Something that takes one step at a time, of one size."""

    op: str
    size: str
    shape: str
    build: Callable[[], Step]

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.op} {self.shape}"


# ---------------------------------------------------------------------------------------------
# What is run


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _backward(function: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> Step:
    """Forward, and backward from an upstream gradient that is there, so that no pass of its own makes one."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    upstream = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), wanted, upstream)


def _loss(name: str, rows: int, depth: int) -> Step:
    case = LOSSES[name]
    inputs = case.inputs(rows, depth)
    wanted = leaves(inputs)
    return lambda: torch.autograd.grad(case(inputs, backend="cpu"), wanted, allow_unused=True)


def _pair(function: Callable[..., torch.Tensor], rows: int) -> Step:
    x, y = _leaf(rows, 512), _leaf(rows, 512)
    return _backward(lambda: function(x, y), (x, y))


def _distill(rows: int) -> Step:
    teacher = torch.randn(rows, 512), torch.randn(rows, 512)
    return _pair(lambda x, y: ops.similarity_distill(x, y, *teacher), rows)


def _experts(rows: int) -> Step:
    layer, tokens = moe.SparseMoE(512, 1024, 16, 2), torch.randn(rows, 512)
    return _backward(lambda: layer(tokens)[0], [*layer.parameters()])


def _groups(rows: int) -> Step:
    a, b, offsets = _leaf(rows, 512), _leaf(16, 512, 1024), torch.arange(17) * (rows // 16)
    return _backward(lambda: ops.grouped_matmul(a, b, offsets), (a, b))


def _head(rows: int) -> Step:
    x, head, labels = _leaf(rows, 256), _leaf(32_000, 256), torch.randint(0, 32_000, (rows,))
    return lambda: torch.autograd.grad(contrastive_ops.linear_cross_entropy(x, head, labels), (x, head))


def _search(rows: int) -> Step:
    query, corpus = torch.randn(rows, 128), torch.randn(100_000, 128)
    return lambda: ops.similarity_topk(query, corpus, 100)


def _route(tokens: int) -> Step:
    logits = _leaf(tokens, 32)
    return lambda: ops.route(logits, 2)


def _route_and_back(tokens: int) -> Step:
    logits, upstream, one = _leaf(tokens, 32), torch.randn(tokens, 2), torch.ones(())

    def step() -> object:
        routing = ops.route(logits, 2, losses=("switch", "z"))
        return torch.autograd.grad((routing.gates, routing.loss), logits, (upstream, one))

    return step


def _router(rows: int) -> Step:
    router, tokens = moe.Router(512, 32, 2), _leaf(rows, 512)
    return _backward(lambda: router(tokens).gates, (tokens, router.weight))


def _interact(queries: int) -> Step:
    x, y = _leaf(queries, 32, 128), _leaf(8 * queries, 128, 128)
    return _backward(lambda: ops.maxsim(x, y), (x, y))


# By name: rows of each size, the shape as it is printed, a step of so many rows.
PRIMITIVES: dict[str, tuple[tuple[int, ...], str, Callable[[int], Step]]] = {
    "similarity_reduce": (ROWS, "{}x512", lambda rows: _pair(ops.similarity_reduce, rows)),
    "similarity_values": (ROWS, "{}x512", lambda rows: _pair(ops.similarity_values, rows)),
    "similarity_distill": (ROWS, "{}x512", _distill),
    "similarity_topk": ((16, 1000, 10_000), "{}x100k d=128 k=100", _search),
    "route": ((1024, 8192, 65_536), "{}x32", _route),
    "route_and_back": ((1024, 8192, 65_536), "{}x32", _route_and_back),
    "Router": (ROWS, "{}x512 e=32", _router),
    "grouped_matmul": (ROWS, "{}x512 e=16", _groups),
    "SparseMoE": (ROWS, "{}x512 e=16", _experts),
    "maxsim": ((8, 32, 64), "{}x8*{}", _interact),
    "linear_cross_entropy": ((128, 512, 2048), "{}x32000", _head),
}


def works() -> list[Work]:
    """Every primitive, and every loss that has a sweep once."""
    found = [
        Work(name, size, shape.format(rows, rows), partial(build, rows))
        for name, (sizes, shape, build) in PRIMITIVES.items()
        for size, rows in zip(SIZES, sizes, strict=True)
    ]
    losses = [name for name, case in LOSSES.items() if name == case.function.__name__ and case.takes_backend]
    for name in losses:
        for size, rows in zip(SIZES, () if name in PRIMITIVES else ROWS, strict=False):
            depth = 768 if rows == ROWS[-1] else 512
            found.append(Work(name, size, f"{rows}x{depth}", partial(_loss, name, rows, depth)))
    return found


# ---------------------------------------------------------------------------------------------
# What is printed


def line(work: Work, found: Sequence[Modelled]) -> str:
    """One line of the table."""
    one = found[0]
    speed = " ".join(f"{one.seconds / each.seconds:6.2f}" for each in found[1:])
    at = next((each for each in found if each.cores == WORK_AT), found[-1])
    tasks = sum(len(region.seconds) for region in at.regions)
    outside = f"{1e3 * at.outside:8.2f} ({at.outside / one.seconds:4.0%})"
    grown = at.work / one.work if one.work else float("nan")
    return f"{work.name:40s}{1e3 * one.seconds:9.2f} {speed}{grown:7.2f}{len(at.regions):8d}{tasks:8d} {outside}"


def lost_lines(found: Modelled, most: int = 4) -> Iterator[str]:
    """The regions that lose most."""
    for lost, count, tasks, work, longest in found.lost()[:most]:
        yield (
            f"    {count} regions of {tasks} tasks lose {1e3 * lost:.2f} ms on {found.cores} cores: "
            f"work {1e3 * work:.2f} ms, longest task {1e3 * longest:.3f} ms"
        )


def rows_of(work: Work, found: Sequence[Modelled], rounds: int) -> Iterator[results.Row]:
    """CSV rows: a number of cores is a provider."""
    for each in found:
        yield {
            "op": work.op, "case": f"cores-{work.op}-fp32-{work.size}", "shapes": work.shape, "dtype": "fp32",
            "provider": f"{each.cores} virtual cores", "kind": "modelled",
            "version": provenance.version("contrastive_ops"), "status": "ok",
            "rounds": str(rounds), "min_ms": f"{1e3 * each.seconds:.4g}",
        }  # fmt: skip


def check(work: Work, rounds: int) -> tuple[float, float]:
    """Seconds on two virtual and on two real cores, in turns."""
    step, modelled, real = work.build(), [], []
    before = torch.get_num_threads()
    try:
        for _ in range(rounds):
            modelled.append(model(step, [2], 1)[0].seconds)
            torch.set_num_threads(2)
            step()
            begin = time.perf_counter()
            step()
            real.append(time.perf_counter() - begin)
            torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)
    return min(modelled), min(real)


# ---------------------------------------------------------------------------------------------
# The command


def _run_check(chosen: Sequence[Work], rounds: int) -> int:
    print("two virtual cores against two real ones; both must be idle\nms: modelled, measured, measured / modelled")
    far = 0
    for work in chosen:
        modelled, real = check(work, rounds)
        off = abs(real / modelled - 1) > LIMIT
        far += off
        mark = f"  more than {LIMIT:.0%} apart" if off else ""
        print(f"{work.name:40s}{1e3 * modelled:9.2f}{1e3 * real:9.2f}{real / modelled:7.2f}{mark}", flush=True)
    return int(far > 0)


def run(chosen: Sequence[Work], rounds: int, regions: int | None, save: bool) -> None:
    """Prints the table, line by line."""
    print(f"{LABEL}\n{provenance.device_name()}, {provenance.capability()}, one thread; speed-up over one core")
    heads = " ".join(f"{cores:6d}" for cores in CORES[1:])
    print(f"{'cores':40s}{'1 [ms]':>9s} {heads}{'work':>7s}{'regions':>8s}{'tasks':>8s} outside [ms]")
    stamp = {"run": provenance.now(), **provenance.gather()}
    for work in chosen:
        step = work.build()
        found = model(step, CORES, rounds)
        print(line(work, found), flush=True)
        if regions:
            print("\n".join(lost_lines(model(step, [regions], rounds)[0])), flush=True)
        if save:
            path = results.file_of(f"{provenance.machine_kind()}-cores")
            results.append(path, [{**row, **stamp} for row in rows_of(work, found, rounds)])
        del step
        gc.collect()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cores", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--size", choices=SIZES, help="only this size")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each number of cores (default: 3)")
    parser.add_argument("--regions", type=int, metavar="CORES", help="also the regions that lose most on so many cores")
    parser.add_argument("--check", action="store_true", help="compare two virtual cores with two real ones")
    parser.add_argument("--save", action="store_true", help="append to results/<machine>-cores.csv")
    args = parser.parse_args(arguments)
    if extension.load() is None:
        print(f"cores are modelled in the C++ extension: {extension.why_missing()}", file=sys.stderr)
        return 1
    chosen = [work for work in works() if args.op in (None, []) or work.op in args.op]
    chosen = [work for work in chosen if args.size in (None, work.size)]
    if not chosen:
        print(f"no work matches op={args.op} size={args.size}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if args.check:
        return _run_check(chosen, args.rounds)
    run(chosen, args.rounds, args.regions, args.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
