"""Distil a small embedding model from a larger one: similarities of a teacher instead of labels, and beside them.

A teacher has learned from many pairs to find docstrings by signatures and the other way round. Students of a quarter of
its size start from the same weights. With labels, they learn pairs by `clip`, as the teacher did; from the teacher, by
`similarity_distillation`, to spread their similarities over a batch as it does, which takes texts and no pairs:
it is the better one to learn from where pairs are few, and where all of them are known, too.

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

from contrastive_ops import clip
from contrastive_ops.losses import similarity_distillation

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
# A loss, and for each step the texts of both sides that it sees.
Task = tuple[Loss, list[tuple[Tensor, Tensor]]]


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


def train(model: TwoTower, bags: tuple[Bags, Bags], tasks: list[Task], rate: float, label: str) -> TwoTower:
    """Train in place with the sum of some losses."""
    steps = list(zip(*(plan for _, plan in tasks), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=len(steps))
    for chosen in progress(steps, label):
        total = torch.zeros(())
        for (loss, _), (signatures, sentences) in zip(tasks, chosen, strict=True):
            batch = (bags[0][signatures], bags[1][sentences])
            total = total + loss(model, model(*batch), batch)
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
    few = rows[: args.labelled]

    def plan(of: Tensor) -> list[Tensor]:
        return [of[chosen] for chosen in batches(len(of), min(args.batch, len(of)), args.steps, generator)]

    def together(of: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [(chosen, chosen) for chosen in of]

    all_pairs, few_pairs = together(plan(rows)), together(plan(few))
    apart = list(zip(plan(rows), plan(rows), strict=True))  # signatures and docstrings that do not belong together
    torch.manual_seed(args.seed)
    start = TwoTower(args.width, args.dim)
    teacher = train(start, bags, [(labels_alone, all_pairs)], args.learning_rate, "teacher")
    student, known = TwoTower(args.student_width, args.student_dim), from_teacher(teacher)
    some = f"{len(few):,} pairs"
    students = {
        f"labels of {some}": [(labels_alone, few_pairs)],
        f"teacher, {some}": [(known, few_pairs)],
        "teacher, texts without pairs": [(known, apart)],
        f"both: labels of {some}, teacher, texts": [(labels_alone, few_pairs), (known, apart)],
        "labels of all pairs": [(labels_alone, all_pairs)],
        "teacher, all pairs": [(known, all_pairs)],
    }
    found = {"the teacher itself": teacher}
    for name, tasks in students.items():
        found[name] = train(copy.deepcopy(student), bags, tasks, args.learning_rate, name)
    return {
        "mrr": {name: mrr_at_10(model, bags, held_out) for name, model in found.items()},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in found.items()},
        "dim": {name: model.sides[0][2].out_features for name, model in found.items()},
        "pairs": len(rows), "held_out": len(held_out), "seed": args.seed,
    }  # fmt: skip


def to_table(result: dict[str, Any]) -> str:
    """Aligned text."""
    lines = [f"{'':<44} {'parameters':>10} {'dimension':>10} {'MRR@10':>8}"]
    for name, value in result["mrr"].items():
        lines.append(f"{name:<44} {result['parameters'][name]:>10,} {result['dim'][name]:>10} {value:>8.4f}")
    return "\n".join([*lines, f"{result['pairs']:,} pairs to train on, {result['held_out']:,} held out"])


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150, help="of each model")
    parser.add_argument("--width", type=int, default=128, help="of the teacher's n-grams")
    parser.add_argument("--dim", type=int, default=256, help="of the teacher's embeddings")
    parser.add_argument("--student-width", type=int, default=32)
    parser.add_argument("--student-dim", type=int, default=64)
    parser.add_argument("--labelled", type=int, default=2000, help="pairs that students know where they know few")
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
