"""Time and peak memory against each size of a problem, and the largest problem that fits a given memory.

    python -m benchmarks.run --curves                 all, appended to results/<machine>-curves.csv
    python -m benchmarks.run --curves --op threads    one of them
    python -m benchmarks.curves --plot                docs/images/curves.svg from the newest rows

Ours and plain torch take turns at each size. Peak memory is that of a process of its own for each curve and side, whose
sizes ascend, above the inputs and the answer. Plain torch stops where its matrices would take more than 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases_scaling, measure, memory, provenance, results
from benchmarks.plot import COLOURS, save
from benchmarks.registry import OURS, Case, Provider, Step, all_cases

PLAIN = "plain torch"
DENSE_BYTES = 2**31
PICTURE = memory.ROOT / "docs" / "images" / "curves.svg"
# Of the search for the largest problem: bytes above inputs and gradients, and seconds that one step may take.
LIMIT_MIB, LIMIT_SECONDS = 256, 20.0
LARGEST_DEPTH, LARGEST_FIRST = 64, 1024


@dataclass(frozen=True)
class Curve:
    """A size that changes while the others stay.

    Attributes:
        letter: what changes: a shape of the case, or "threads".
        like: the case whose providers and inputs are taken.
        shapes: of the case, without the letter.
        sizes: ascending.
        ours, plain: providers of the case.
        dense: of the shapes, the bytes of a plain step.
    """

    letter: str
    like: Case
    shapes: Mapping[str, int]
    sizes: tuple[int, ...]
    plain: Provider
    dense: Callable[[Mapping[str, int]], float]

    def case(self, size: int) -> Case:
        """The case of a size."""
        shapes = dict(self.shapes) if self.letter == "threads" else {**self.shapes, self.letter: size}
        return replace(self.like, shapes={name: shapes[name] for name in self.like.shapes}, copies=1)

    def sides(self, size: int) -> dict[str, Provider]:
        """Who computes it."""
        sides = {OURS: self.like.provider(OURS)}
        if self.dense(self.case(size).shapes) <= DENSE_BYTES:
            sides[PLAIN] = self.plain
        return sides


def curves(quick: bool = False) -> dict[str, Curve]:
    """All, by the letter."""
    clip = all_cases()["clip-scaling-fp32-N1024-D512"]
    plain = clip.provider(cases_scaling.PLAIN)
    topk = next(case for case in all_cases().values() if case.op == "topk")
    mm_topk = topk.provider("torch mm + topk")
    route = next(case for case in all_cases().values() if case.op == "route-without-noise" and case.device == "cpu")
    dense_router = next(each for each in route.providers if each.kind == "torch" and not each.optional)

    def of_clip(shapes: Mapping[str, int]) -> float:
        return 16.0 * shapes["N"] ** 2  # logits, two softmaxes, a gradient

    def of_search(shapes: Mapping[str, int]) -> float:
        return 4.0 * min(256, shapes["N"]) * shapes["M"]

    def of_route(shapes: Mapping[str, int]) -> float:
        return 40.0 * shapes["T"] * shapes["E"]

    found = {
        "N": Curve("N", clip, {"D": 512}, (8, 32, 128, 512, 2048, 4096, 8192), plain, of_clip),
        "D": Curve("D", clip, {"N": 1024}, (16, 64, 256, 1024, 2048), plain, of_clip),
        "threads": Curve("threads", clip, {"N": 2048, "D": 512}, _threads(), plain, of_clip),
        "M": Curve(
            "M", topk, {"N": 256, "D": 128, "k": 100}, (1000, 4000, 16_000, 64_000, 256_000), mm_topk, of_search
        ),
        "k": Curve("k", topk, {"N": 256, "D": 128, "M": 50_000}, (1, 10, 100, 1000), mm_topk, of_search),
        "E": Curve("E", route, {"T": 16_384, "k": 2}, (8, 32, 128, 512), dense_router, of_route),
    }
    if not quick:
        return found
    return {name: _shrunk(curve) for name, curve in found.items()}


def _threads() -> tuple[int, ...]:
    most = torch.get_num_threads()
    return tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n < most) + (most,)


def _shrunk(curve: Curve) -> Curve:
    few = {"N": 64, "M": 256, "T": 64, "D": 16, "k": 2}
    return replace(
        curve, shapes={name: min(size, few[name]) for name, size in curve.shapes.items()}, sizes=curve.sizes[:2]
    )


def _step(case: Case, provider: Provider) -> Step:
    return provider.build(case.make_inputs(case))


def timed(curve: Curve, size: int, rounds: int) -> dict[str, measure.Timing]:
    """Times of both sides in turns at a size."""
    before = torch.get_num_threads()
    if curve.letter == "threads":
        torch.set_num_threads(size)
    try:
        case = curve.case(size)
        inputs = case.make_inputs(case)
        steps = {name: provider.build(inputs) for name, provider in curve.sides(size).items()}
        return measure.interleave(steps, rounds=rounds)
    finally:
        torch.set_num_threads(before)


def peaks(name: str, side: str, quick: bool) -> dict[int, float]:
    """Peak extra MiB by size, of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.curves", "--child", name, side, *(["--quick"] if quick else [])]
    path = os.pathsep.join(filter(None, [str(memory.ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=memory.ROOT, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"memory of {name}, {side}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return {int(size): mib for size, mib in json.loads(done.stdout.strip().splitlines()[-1]).items()}


def peaks_here(name: str, side: str, quick: bool) -> dict[int, float]:
    """The same in this process, smallest size first."""
    if name == "largest":
        return largest_here(side, quick)
    curve, found = curves(quick)[name], {}
    for size in curve.sizes:
        provider = curve.sides(size).get(side)
        if provider is None:
            break
        if curve.letter == "threads":
            torch.set_num_threads(size)
        case = curve.case(size)
        step = _step(case, provider)
        if not found:
            step()  # starts the threads, loads the code
        found[size] = memory.extra_bytes(step, "cpu")[0] / memory.MIB
    return found


def largest_here(side: str, quick: bool) -> dict[int, float]:
    """Doubles the batch of CLIP's loss until a step takes too much: memory of each, the first too large included."""
    curve = curves()["N"]
    provider = curve.like.provider(OURS if side == OURS else cases_scaling.PLAIN)
    size, found = (64 if quick else LARGEST_FIRST), {}
    while True:
        case = _largest_case(curve.like, size)
        step = _step(case, provider)
        if not found:
            step()
        began = time.perf_counter()
        found[size] = memory.extra_bytes(step, "cpu")[0] / memory.MIB
        seconds = time.perf_counter() - began
        if found[size] > LIMIT_MIB or 4 * seconds > LIMIT_SECONDS or (quick and size >= 128):
            return found
        size *= 2


def _largest_case(like: Case, size: int) -> Case:
    return replace(like, shapes={"N": size, "D": LARGEST_DEPTH}, copies=1)


def _row(name: str, shapes: str, side: str, timing: measure.Timing | None, mib: float | None) -> results.Row:
    package = "contrastive_ops" if side == OURS else "torch"
    row = {"op": f"curve-{name}", "shapes": shapes, "dtype": "fp32", "provider": side, "status": "ok"}
    row |= {"kind": "ours" if side == OURS else "torch", "version": provenance.version(package)}
    if timing is not None:
        seconds = {"min": timing.minimum, "median": timing.median, "p20": timing.p20, "p80": timing.p80}
        row |= {f"{key}_ms": f"{1e3 * value:.4g}" for key, value in seconds.items()}
        row["rounds"] = str(timing.samples)
    if mib is not None:
        row["peak_extra_mib"] = f"{mib:.1f}"
    return row


def rows_of(name: str, rounds: int, quick: bool) -> Iterator[results.Row]:
    """The rows of a curve, or of the largest problem."""
    if name == "largest":
        for side in (OURS, PLAIN):
            for size, mib in peaks(name, side, quick).items():
                row = _row(name, f"N={size} D={LARGEST_DEPTH}", side, None, mib)
                yield {**row, "case": f"curve-largest-{size}"}
        return
    curve = curves(quick)[name]
    bytes_of = {side: peaks(name, side, quick) for side in (OURS, PLAIN)}
    for size in curve.sizes:
        for side, timing in timed(curve, size, rounds).items():
            row = _row(name, curve.case(size).shape_text, side, timing, bytes_of[side].get(size))
            row |= {"case": f"curve-{name}-{size}"} | ({"threads": str(size)} if name == "threads" else {})
            yield row


def run(op: str | None, *, rounds: int, quick: bool = False, csv: Path | None = None) -> int:
    """The command; returns the exit status."""
    names = [name for name in (*curves(quick), "largest") if op in (None, name)]
    if not names:
        print(f"no curve op={op!r}; there are {', '.join((*curves(quick), 'largest'))}", file=sys.stderr)
        return 2
    stamp = {"run": provenance.now(), **provenance.gather()}
    if csv is None and not quick:
        csv = results.file_of(f"{provenance.machine_kind()}-curves")
    for name in names:
        for row in rows_of(name, rounds, quick):
            row = {**stamp, **row}
            print(f"{row['case']:22s} {row['shapes']:28s} {row['provider']:16s} ", end="")
            print(f"{row.get('min_ms', ''):>9s} ms {row.get('peak_extra_mib', ''):>9s} MiB", flush=True)
            if csv is not None:
                results.append(csv, [row])
    return 0


# ---- What is stored, as a picture and as tables

LABELS = {
    "N": "pairs (CLIP, D = 512)",
    "D": "dimension (CLIP, 1,024 pairs)",
    "threads": "threads (CLIP, 2,048 pairs, D = 512)",
    "M": "rows searched (256 queries, D = 128, k = 100)",
    "k": "columns found (256 queries, 50,000 rows, D = 128)",
    "E": "experts (route, 16,384 tokens, k = 2)",
}


def points(rows: Sequence[results.Row], name: str) -> dict[str, dict[int, results.Row]]:
    """By provider and size, the rows of the newest run that has the curve."""
    mine = [row for row in rows if row["op"] == f"curve-{name}" and row["status"] == "ok"]
    last = max((row["run"] for row in mine), default=None)
    found: dict[str, dict[int, results.Row]] = {OURS: {}, PLAIN: {}}
    for row in mine:
        if row["run"] == last:
            found[row["provider"]][int(row["case"].rpartition("-")[2])] = row
    return found


def draw(rows: Sequence[results.Row], path: Path) -> bool:
    """Writes the picture: a column for each size that was measured, time above, memory below; False if none was."""
    from matplotlib.figure import Figure

    measured = [name for name in LABELS if points(rows, name)[OURS]]
    if not measured:
        return False
    figure = Figure(figsize=(3.1 * len(measured), 5.2), layout="constrained")
    grid = figure.subplots(2, len(measured), squeeze=False)
    for at, name in enumerate(measured):
        found = points(rows, name)
        for line, (column, label) in enumerate((("min_ms", "ms"), ("peak_extra_mib", "extra MiB"))):
            _panel(grid[line][at], found, column)
            grid[line][at].set_ylabel(label if at == 0 else "", fontsize=8)
        grid[1][at].set_xlabel(LABELS[name], fontsize=7)
    grid[0][0].legend(fontsize=7, frameon=False)
    row = next(iter(points(rows, measured[0])[OURS].values()))
    figure.suptitle(f"{row['device']}, torch {row['torch']}, float32", fontsize=8)
    save(figure, path)
    return True


def _panel(axes: Any, found: Mapping[str, Mapping[int, results.Row]], column: str) -> None:
    for side, kind in ((OURS, "ours"), (PLAIN, "torch")):
        line = [(size, max(float(row[column]), 0.1)) for size, row in sorted(found[side].items()) if row[column]]
        if line:
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, color=COLOURS[kind], label=side)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.tick_params(which="both", labelsize=7)  # minor ones, too, which speak where a curve spans less than a decade
    axes.spines[["top", "right"]].set_visible(False)


def largest_table(rows: Sequence[results.Row]) -> tuple[list[str], list[list[str]], list[results.Row]]:
    """The largest batch of each side whose step fits, and the first that does not."""
    lines, used = [], []
    for side, found in points(rows, "largest").items():
        fits = {size: row for size, row in found.items() if float(row["peak_extra_mib"]) <= LIMIT_MIB}
        if not fits:
            continue
        most, over = max(fits), [size for size in found if size not in fits]
        lines.append([side, f"{'' if over else 'at least '}{most:,}", fits[most]["peak_extra_mib"]])
        used.append(fits[most])
    header = ["CLIP's loss, D=64, float32", f"largest batch in {LIMIT_MIB} MiB", "extra MiB of it"]
    return header, lines, used


def main(arguments: Sequence[str] | None = None) -> int:
    """The child's entry, and that of the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("CURVE", "SIDE"), help="peak memory by size, as JSON")
    parser.add_argument("--quick", action="store_true", help="two small sizes of each")
    parser.add_argument("--plot", action="store_true", help="draw the newest rows")
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(peaks_here(*args.child, args.quick)))
        return 0
    if not draw(results.read(), args.out):
        print("nothing measured yet; run python -m benchmarks.run --curves")
        return 1
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
