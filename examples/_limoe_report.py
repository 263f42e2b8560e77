"""What a LIMoE is worth, in words; and what its balance losses do: every combination trained on the same batches.

Each finished run is written to a file of its own, so that an ablation that was interrupted goes on where it was, and
several seeds can be trained by processes side by side.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from contrastive_ops import similarity_topk

if TYPE_CHECKING:
    from train_limoe import Config

# Each with the losses of the one before; the last two without Batch Priority Routing.
VARIANTS = {
    "no balance losses": {"auxiliary": "none"},
    "importance, load, z": {"auxiliary": "classic"},
    "… + local entropy": {"auxiliary": "local"},
    "… + global entropy": {"auxiliary": "full"},
    "importance, load, z; no BPR": {"auxiliary": "classic", "priority": "position"},
    "all of them; no BPR": {"auxiliary": "full", "priority": "position"},
}
DENSE = "dense twin"
COLORS = {"image": "#0072B2", "text": "#D55E00"}  # told apart by colour-blind readers
EVERY = 5  # steps whose success rates are averaged in the results


def recall(image: Tensor, text: Tensor, keys: Tensor) -> dict[str, float]:
    """Retrieval in both directions. What says (shows) the same counts as found, as some held-out images do."""
    found = {}
    for name, x, y in (("image_to_text", image, text), ("text_to_image", text, image)):
        best = similarity_topk(x, y, 10).indices
        same = (keys[best] == keys[:, None]).all(2)
        found |= {f"{name}_at_{k}": same[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
    return found


def describe(found: dict[str, Any], held_out: int) -> str:
    """What one run reached."""
    lines = [f"zero-shot accuracy     {found['zero_shot']:.1%} of {held_out} held-out images"]
    for name in ("image_to_text", "text_to_image"):
        recall = ", ".join(f"@{k} {found[f'{name}_at_{k}']:.1%}" for k in (1, 5, 10))
        lines.append(f"{name.replace('_', ' '):<23}recall {recall}")
    for modality in COLORS if "success_image" in found else ():
        success, experts = found[f"success_{modality}"], found[f"effective_{modality}"]
        lines.append(
            f"{f'{modality} tokens':<23}{success:.1%} find room at their expert; {experts:.1f} effective experts"
        )
    return "\n".join([*lines, f"processor time         {found['cpu_seconds']:.0f} s"])


def train_variant(variant: dict[str, Any], config: Config, folder: Path) -> dict[str, Any]:
    """One run, or what is known of it already."""
    from train_limoe import Run

    config = replace(config, **variant)
    kind = "dense" if config.dense else f"{config.auxiliary}-{config.priority}"
    path = folder / f"{kind}-{config.seed}.json"
    if path.exists() and (known := json.loads(path.read_text()))["config"] == asdict(config):
        return known
    start = time.process_time()
    run = Run(config).train()
    seconds = time.process_time() - start
    parts = [run.history["success"][i : i + EVERY] for i in range(0, config.steps, EVERY)]
    layers = range(len(run.history["success"][0]))
    curve = [[[round(statistics.fmean(s[i][m] for s in part), 4) for m in (0, 1)] for i in layers] for part in parts]
    result = {
        "config": asdict(config), "cpu_seconds": seconds, "loss": statistics.fmean(run.history["loss"][-20:]),
        "parameters": sum(p.numel() for p in run.model.parameters()), **run.evaluate(), "success": curve,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    return result


def run_ablation(config: Config, seeds: list[int], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Train all variants with all seeds, draw both figures; returns the runs by variant."""
    variants = VARIANTS | {DENSE: {"dense": True}}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in seeds:
        for name, variant in variants.items():
            runs[name].append(train_variant(variant, replace(config, seed=seed), folder))
    draw_success(runs, folder / "limoe_success.png")
    draw_experts(runs, folder / "limoe_experts.png")
    return runs


COLUMNS = {
    "text kept": "success_text", "image kept": "success_image", "experts of text": "effective_text",
    "zero-shot": "zero_shot", "image to text @5": "image_to_text_at_5", "text to image @5": "text_to_image_at_5",
}  # fmt: skip


def spread(values: list[float], key: str) -> str:
    """Mean of the seeds, and least and most."""
    if not values:
        return "-"
    form = ".1f" if key.startswith("effective") else ".1%"
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})".replace("% to", " to")


def to_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Aligned text: a row for each variant."""
    lines = [f"{'':<28}" + "".join(f"{name:>23}" for name in COLUMNS)]
    for name, found in runs.items():
        cells = [spread([run[key] for run in found if key in run], key) for key in COLUMNS.values()]
        lines.append(f"{name:<28}" + "".join(f"{cell:>23}" for cell in cells))
    return "\n".join(lines)


def draw_success(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Success rates of both modalities over training, in the last sparse layer and in the mean of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, name in zip(grid.flat, VARIANTS, strict=True):
        for m, modality in enumerate(COLORS):
            curves = [[statistics.fmean(layer[m] for layer in point) for point in run["success"]] for run in runs[name]]
            steps = [EVERY * (i + 1) for i in range(len(curves[0]))]
            for curve in curves:
                axes.plot(steps, curve, color=COLORS[modality], alpha=0.3, linewidth=1)
            mean = [statistics.fmean(points) for points in zip(*curves, strict=True)]
            axes.plot(steps, mean, color=COLORS[modality], linewidth=2, label=f"{modality} tokens")
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_ylim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    grid[0, 0].legend(frameon=False, loc="lower right")
    for axes in grid[1]:
        axes.set_xlabel("training step")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of tokens not dropped")
    seeds = len(next(iter(runs.values())))
    figure.suptitle(f"Tokens that find room at their expert; mean of {seeds} seeds, and each", fontsize=12)
    figure.savefig(path, dpi=120)


def draw_experts(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """What share of the image tokens and of the text tokens each expert gets, per layer, with the first seed."""
    from matplotlib.figure import Figure

    shown = ("importance, load, z", "… + local entropy", "… + global entropy")
    layers = len(runs[shown[0]][0]["choices"])
    figure = Figure(figsize=(12, 2.6 * layers + 0.6), layout="constrained")
    grid = figure.subplots(layers, len(shown), sharey=True, squeeze=False)
    for column, name in enumerate(shown):
        run = runs[name][0]
        for layer, counts in enumerate(run["choices"]):
            axes = grid[layer, column]
            shares = [[count / sum(row) for count in row] for row in counts]
            # The more an expert serves text rather than images, the further right it stands.
            order = sorted(range(len(shares[0])), key=lambda e: shares[1][e] - shares[0][e])
            for m, modality in enumerate(COLORS):
                places = [i + 0.4 * (m - 0.5) for i in range(len(order))]
                heights = [shares[m][e] for e in order]
                axes.bar(places, heights, 0.4, color=COLORS[modality], label=f"of the {modality} tokens")
            axes.set_xticks(range(len(order)), [str(e) for e in order], fontsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{name}: layer {2 * layer + 2}", fontsize=10, loc="left")
    grid[0, 0].legend(frameon=False, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    for axes in grid[:, 0]:
        axes.set_ylabel("share")
    figure.suptitle("Which experts held-out image and text tokens choose", fontsize=12)
    figure.savefig(path, dpi=120)
