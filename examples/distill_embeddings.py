"""Distil a small embedding model from a larger one: similarities of a teacher instead of labels, and beside them.

A teacher learns to find docstrings by signatures and the other way round. Then students of an eighth of its size are
trained from the same weights on the same batches: with `clip`, as the teacher was; with `similarity_distillation`, to
spread their similarities over the batch as the teacher does; and with both.

    python examples/distill_embeddings.py             # a few minutes
    python examples/distill_embeddings.py --stdlib    # the standard library alone: less
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
from _pairs import collect_pairs
from docstring_search import BUCKETS, Bags, batches, make_bags, mrr_at_10, progress
from torch import Tensor, nn

from contrastive_ops import clip, similarity_distillation

HELD_OUT = 1000
TEACHER_SCALE = 20.0  # softer than the teacher's own, so that more than the best match is told


class TwoTower(nn.Module):
    """A bag of n-grams, a hidden layer, a projection for each side."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, width, mode="mean", include_last_offset=True)
        self.norm = nn.LayerNorm(width)
        self.sides = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, signatures: Bags, sentences: Bags) -> tuple[Tensor, Tensor]:
        """Unit rows of both sides."""
        texts = zip(self.sides, (signatures, sentences), strict=True)
        signature, sentence = (F.normalize(side(self.norm(self.table(*text))), dim=1) for side, text in texts)
        return signature, sentence


Loss = Callable[[TwoTower, tuple[Tensor, Tensor], tuple[Bags, Bags]], Tensor]


def labels_alone(model: TwoTower, rows: tuple[Tensor, Tensor], bags: tuple[Bags, Bags]) -> Tensor:
    """A signature belongs to its own docstring and to no other."""
    return clip(*rows, scale=model.logit_scale.exp().clamp(max=100))


def from_teacher(teacher: TwoTower) -> Loss:
    """Every signature is to be as close to each docstring of the batch as the teacher has it, and vice versa."""

    def loss(model: TwoTower, rows: tuple[Tensor, Tensor], bags: tuple[Bags, Bags]) -> Tensor:
        with torch.no_grad():
            known = teacher(*bags)
        scale = model.logit_scale.exp().clamp(max=100)
        return similarity_distillation(*rows, *known, symmetric=True, scale=scale, teacher_scale=TEACHER_SCALE)

    return loss


def train(
    model: TwoTower, bags: tuple[Bags, Bags], plan: list[Tensor], losses: list[Loss], rate: float, label: str
) -> TwoTower:
    """Train in place with the sum of some losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=len(plan))
    for chosen in progress(plan, label):
        batch = (bags[0][chosen], bags[1][chosen])
        rows = model(*batch)
        total = sum(loss(model, rows, batch) for loss in losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        decay.step()
    return model


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the teacher and the students, and search."""
    pairs = collect_pairs(stdlib_only=args.stdlib, progress=progress)
    bags = (make_bags([pair.signature for pair in pairs]), make_bags([pair.sentence for pair in pairs]))
    generator = torch.Generator().manual_seed(args.seed)
    held_out, rows = torch.randperm(len(pairs), generator=generator).tensor_split([HELD_OUT])
    plan = [rows[chosen] for chosen in batches(len(rows), args.batch, args.steps, generator)]

    torch.manual_seed(args.seed)
    teacher = train(TwoTower(args.width, args.dim), bags, plan, [labels_alone], args.learning_rate, "teacher")
    found = {"teacher": teacher}
    student = TwoTower(args.student_width, args.student_dim)
    students = {
        "student, labels": [labels_alone],
        "student, teacher": [from_teacher(teacher)],
        "student, both": [labels_alone, from_teacher(teacher)],
    }
    for name, losses in students.items():
        found[name] = train(copy.deepcopy(student), bags, plan, losses, args.learning_rate, name)
    return {
        "mrr": {name: mrr_at_10(model, bags, held_out) for name, model in found.items()},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in found.items()},
        "dim": {name: model.sides[0][2].out_features for name, model in found.items()},
        "pairs": len(rows), "held_out": len(held_out), "seed": args.seed,
    }  # fmt: skip


def to_table(result: dict[str, Any]) -> str:
    """Aligned text."""
    lines = [f"{'':<20} {'parameters':>10} {'dimension':>10} {'MRR@10':>8}"]
    for name, value in result["mrr"].items():
        lines.append(f"{name:<20} {result['parameters'][name]:>10,} {result['dim'][name]:>10} {value:>8.4f}")
    return "\n".join([*lines, f"{result['pairs']:,} pairs to train on, {result['held_out']:,} held out"])


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150, help="of each model")
    parser.add_argument("--width", type=int, default=128, help="of the teacher's n-grams")
    parser.add_argument("--dim", type=int, default=256, help="of the teacher's embeddings")
    parser.add_argument("--student-width", type=int, default=16)
    parser.add_argument("--student-dim", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", action="store_true", help="the standard library alone")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args(argv)
    result = run(args)
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    print(to_table(result))


if __name__ == "__main__":
    main()
