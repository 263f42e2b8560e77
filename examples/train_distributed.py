"""Train the docstring search on several processes, with the loss of all their texts: the curve is that of one process.

Each step draws one batch, of which every process encodes its part; `distributed.clip` compares all parts with each
other, and DistributedDataParallel averages gradients. The number of processes changes how long a step takes; the losses
are the same to the digits that rounding leaves.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 1 examples/train_distributed.py                     # the same curve
    torchrun --nproc-per-node 2 examples/train_distributed.py --schedule ring --chunk 256
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from _pairs import collect_pairs
from docstring_search import HELD_OUT, LEARNING_RATE, Bags, TwoTower, batches, make_bags, mrr_at_10
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_ops import distributed


class Encoder(nn.Module):
    """Both towers for rows of the two tables of texts."""

    def __init__(self, towers: TwoTower, bags: tuple[Bags, Bags]) -> None:
        super().__init__()
        self.towers, self.bags = towers, bags

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.towers(*(side[rows] for side in self.bags))


def train(bags: tuple[Bags, Bags], args: argparse.Namespace) -> tuple[list[float], float]:
    """The loss of each step and the MRR@10 of held-out texts, the same on every process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(args.seed)
    count = len(bags[0].offsets) - 1
    held_out, rows = torch.randperm(count, generator=generator).tensor_split([min(HELD_OUT, count // 4)])
    torch.manual_seed(args.seed)
    towers = TwoTower(args.dim).requires_grad_()
    towers.logit_scale.requires_grad_(False)  # that of the loss is trained
    encoder = DistributedDataParallel(Encoder(towers, bags))
    loss = DistributedDataParallel(distributed.CLIPLoss(schedule=args.schedule, normalize=False))
    optimizer = torch.optim.Adam([*towers.parameters(), *loss.parameters()], lr=LEARNING_RATE)
    values = []
    for chosen in batches(len(rows), args.batch, args.steps, generator):
        part = rows[chosen].tensor_split(size)[rank]  # of any size: the last ones may be smaller
        optimizer.zero_grad()
        value = distributed.cached_step(encoder, part, loss, chunk=args.chunk or args.batch)
        optimizer.step()
        dist.all_reduce(value)  # ranks return their parts of the loss: the mean is the loss of the batch
        values.append(value.item() / size)
        if rank == 0:
            print(f"step {len(values):>3}  loss {values[-1]:.5f}", flush=True)
    return values, mrr_at_10(towers, bags, held_out)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2048, help="of all processes together")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--schedule", choices=("auto", "gather", "ring"), default="auto")
    parser.add_argument("--chunk", type=int, help="texts that a process encodes at a time, twice (GradCache)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Start as one of the processes of torchrun."""
    args = parse_arguments(argv)
    dist.init_process_group("gloo")
    pairs = collect_pairs(stdlib_only=True)
    bags = make_bags([pair.signature for pair in pairs]), make_bags([pair.sentence for pair in pairs])
    values, mrr = train(bags, args)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {len(pairs):,} pairs: MRR@10 of held-out texts {mrr:.4f}")
        if args.json:
            args.json.write_text(json.dumps({"losses": values, "mrr": mrr}))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
