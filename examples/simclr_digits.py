"""SimCLR and supervised contrastive learning on scikit-learn's digits, and what a linear probe makes of the features.

The same small convolutional encoder is trained twice from the same weights: with `nt_xent`, which sees no label, and
with `sup_con`, which sees all of the training set's. Then a logistic regression on the frozen features is fitted to few
labels and to all of them, beside one on the pixels and one on the features of the untrained encoder.

    python examples/simclr_digits.py
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _digits import Digits, load, progress
from torch import Tensor, nn

from contrastive_ops import nt_xent, sup_con

HELD_OUT = 397
SHOTS = 10  # labels of each class in the probe with few of them


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another view of each image (N, 8, 8): rotated, scaled, moved, lighter or darker, noisy, a patch erased."""
    rows = len(images)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, generator=generator)

    angle, zoom = draw(-0.35, 0.35), draw(0.85, 1.2)
    turn = torch.stack([angle.cos(), -angle.sin(), draw(-0.2, 0.2), angle.sin(), angle.cos(), draw(-0.2, 0.2)], 1)
    turn = turn.view(rows, 2, 3) * torch.stack([zoom, zoom, torch.ones(rows)], 1)[:, None]
    grid = F.affine_grid(turn, [rows, 1, 8, 8], align_corners=False)
    views = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0] * draw(0.6, 1.4)[:, None, None]
    views = views + 0.05 * torch.randn(views.shape, generator=generator)
    # A 2 x 2 patch at a random place is set to the background.
    corner = torch.randint(7, (2, rows), generator=generator)
    place = torch.arange(8)
    inside = [(place >= c[:, None]) & (place < c[:, None] + 2) for c in corner]
    return views.masked_fill(inside[0][:, :, None] & inside[1][:, None, :], 0.0)


class Encoder(nn.Module):
    """Features (N, 128) of images, and their projection (N, 64), in which the loss compares."""

    def __init__(self) -> None:
        super().__init__()

        def conv(channels: int, out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        layers = [*conv(1, 32, 1), *conv(32, 64, 2), *conv(64, 128, 2)]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def features(self, images: Tensor) -> Tensor:
        """What is used afterwards."""
        return self.trunk((images[:, None] - 0.3) / 0.37)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


# What each training makes of the projections of two views (N, D) and the labels.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda z0, z1, labels: nt_xent(z0, z1, temperature=0.2),
    "sup_con": lambda z0, z1, labels: sup_con(torch.cat([z0, z1]), labels.repeat(2), temperature=0.1),
}


def pretrain(encoder: Encoder, train: Digits, loss_of: Any, args: argparse.Namespace, label: str) -> list[float]:
    """Train in place; returns the loss at every step."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    losses = []
    for step in progress(range(args.steps), label):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 + math.cos(math.pi * step / args.steps)) / 2
        rows = torch.randperm(len(train), generator=generator)[: args.batch]
        views = [augment(train.images[rows], generator) for _ in range(2)]
        # One pass for both views, so that batch normalisation sees them together.
        z0, z1 = encoder(torch.cat(views)).chunk(2)
        loss = loss_of(z0, z1, train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def probe(features: Callable[[Tensor], Tensor], train: Digits, test: Digits, rows: Tensor) -> float:
    """Held-out accuracy of a logistic regression on the features, fitted to the labels of some rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(features(train.images[rows]).numpy(), train.labels[rows].numpy())
    return float(model.score(features(test.images).numpy(), test.labels.numpy()))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train with both losses and probe."""
    train, test = load(HELD_OUT, args.seed)
    torch.manual_seed(args.seed)
    untrained = Encoder()
    encoders = {name: copy.deepcopy(untrained) for name in LOSSES}
    losses = {name: pretrain(encoders[name], train, LOSSES[name], args, name) for name in LOSSES}

    everything = torch.arange(len(train))
    few = torch.cat([everything[train.labels == digit][:SHOTS] for digit in range(10)])
    sources: dict[str, Callable[[Tensor], Tensor]] = {"pixels": lambda images: images.flatten(1)}
    sources |= {name: each.eval().features for name, each in {"untrained": untrained, **encoders}.items()}
    accuracy = {
        name: {"few": probe(features, train, test, few), "all": probe(features, train, test, everything)}
        for name, features in sources.items()
    }
    return {"accuracy": accuracy, "losses": losses, "train": len(train), "test": len(test), "seed": args.seed}


def to_table(result: dict[str, Any]) -> str:
    """Aligned text."""
    lines = [f"{'linear probe on':<12} {f'{SHOTS} labels a class':>20} {'all labels':>12}"]
    lines += ["-" * len(lines[0])]
    lines += [f"{name:<12} {found['few']:>20.1%} {found['all']:>12.1%}" for name, found in result["accuracy"].items()]
    lines.append(f"{lines[1]}\naccuracy on {result['test']} held-out images; sup_con saw all labels in training")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args(argv)
    result = run(args)
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    print(to_table(result))


if __name__ == "__main__":
    main()
