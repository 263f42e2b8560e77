"""Draws the modelled speed-up against cores, from the newest rows of benchmarks.cores.

python -m benchmarks.cores --save && python -m benchmarks.cores_plot --out docs/images/cores.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.plot import save
from benchmarks.results import Row

SUFFIX = " virtual cores"
# One of each kind of sweep; the rest is in the table, where lines would hide each other.
SHOWN = (
    "clip",
    "siglip",
    "sup_con",
    "linear_cross_entropy",
    "similarity_topk",
    "maxsim",
    "gist",
    "hn_nce",
    "SparseMoE",
    "route",
)


def curves(rows: Sequence[Row], size: str = "large") -> dict[str, dict[int, Row]]:
    """By case of a size and an op of `SHOWN`, the rows of its newest run by their number of cores."""
    found: dict[str, dict[int, Row]] = {}
    modelled = [row for row in rows if row["kind"] == "modelled" and row["op"] in SHOWN]
    cases = {row["case"] for row in modelled if row["case"].endswith(f"-{size}")}
    for case in sorted(cases):
        newest = results.newest(rows, case, "min_ms", [f"1{SUFFIX}"])
        if newest is not None:
            found[case] = {int(name.removesuffix(SUFFIX)): row for name, row in newest.items() if name.endswith(SUFFIX)}
    return found


def draw(found: Mapping[str, Mapping[int, Row]], path: Path) -> None:
    """Writes the figure; the suffix of the path chooses SVG or PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    axes = figure.subplots()
    most = max(max(curve) for curve in found.values())
    axes.plot([1, most], [1, most], color="#c0c4cc", linestyle="--", linewidth=1, label="as many times as cores")
    # The fastest first, so that the legend has the order of the curves.
    for curve in sorted(found.values(), key=lambda curve: float(curve[most]["min_ms"]) / float(curve[1]["min_ms"])):
        cores = sorted(curve)
        first = curve[cores[0]]
        speed = [float(first["min_ms"]) / float(curve[count]["min_ms"]) for count in cores]
        axes.plot(cores, speed, marker="o", markersize=3, label=f"{first['op']} {first['shapes']}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks := [2**power for power in range(most.bit_length())], [str(tick) for tick in ticks])
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("virtual cores")
    axes.set_ylabel("speed-up of a step over one core, MODELLED")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    row = next(iter(next(iter(found.values())).values()))
    axes.set_title(f"modelled on one core of {row['device']}, {row['capability']}; not measured", fontsize=9)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cores_plot", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("cores.svg"), help="SVG or PNG")
    args = parser.parse_args(arguments)
    found = curves(results.read())
    if not found:
        print("nothing modelled yet; run python -m benchmarks.cores --save")
        return 1
    draw(found, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
