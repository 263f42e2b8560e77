"""One embedding model for many domains: experts that are enforced by domain.

A docstring's domain is the package that it is from. A small two-tower encoder is trained on all domains; then it is
tuned in four ways on the same batches, and searched within each domain:

- one dense model for all domains;
- one dense model for each domain, which costs as many models;
- a mixture of experts that start as copies of the dense layer, each text with the expert of its domain;
- the same mixture with a learned router.

    python examples/moe_embeddings.py              # a few minutes
    python examples/moe_embeddings.py --stdlib     # domains are packages of the standard library: less

After Hallee et al., Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _pairs import STDLIB_NAMES, Pair, collect_pairs
from docstring_search import BUCKETS, Bags, make_bags, progress
from torch import Tensor, nn

from contrastive_ops import Pairs, info_nce, similarity_topk
from contrastive_ops.moe import SparseMoE

DIM = 128
HELD_OUT = 200  # of each domain
TEMPERATURE = 0.07


class Encoder(nn.Module):
    """A bag of n-grams, one feed-forward layer that is a mixture of experts (or of one), a projection for each side."""

    def __init__(self, experts: int = 1, enforced: bool = False) -> None:
        super().__init__()
        self.enforced = enforced
        self.table = nn.EmbeddingBag(BUCKETS, DIM, mode="mean", include_last_offset=True)
        self.norm = nn.LayerNorm(DIM)
        router = {} if enforced or experts == 1 else {"losses": ["importance"]}
        self.mlp = SparseMoE(DIM, 2 * DIM, experts, bias=True, router=router)
        self.last = nn.ModuleDict({side: nn.Linear(DIM, DIM, bias=False) for side in ("signature", "sentence")})

    def forward(self, side: str, texts: Bags, domain: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows, and the router's loss. One expert works on the whole of a text."""
        x = self.norm(self.table(*texts))
        # Where a text may choose one expert alone, its gate is 1: the router has no say.
        allowed = F.one_hot(domain, len(self.mlp.gate.weight)).bool() if self.enforced else None
        out, routing = self.mlp(x, allowed=allowed)
        return F.normalize(self.last[side](x + out), dim=1), routing.loss

    def mixture(self, experts: int, enforced: bool) -> Encoder:
        """The same model with copies of its only expert."""
        model = Encoder(experts, enforced)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("mlp.")}
        state |= {
            k: v.repeat_interleave(experts, 0) for k, v in self.mlp.experts.state_dict(prefix="mlp.experts.").items()
        }
        state["mlp.gate.weight"] = model.mlp.gate.weight.detach().clone()
        model.load_state_dict(state)
        return model


class Corpus:
    """Pairs by domain, as bags of n-grams, with the rows that are held out."""

    def __init__(self, pairs: list[Pair], domains: int, stdlib: bool, generator: torch.Generator) -> None:
        of_domain: dict[str, list[Pair]] = defaultdict(list)
        for pair in pairs:
            package = pair.name.split(".")[0]
            of_domain["standard library" if package in STDLIB_NAMES and not stdlib else package].append(pair)
        self.names = sorted(of_domain, key=lambda name: -len(of_domain[name]))[:domains]
        chosen = [pair for name in self.names for pair in of_domain[name]]
        self.sides = {side: make_bags([getattr(pair, side) for pair in chosen]) for side in ("signature", "sentence")}
        starts = torch.tensor([0, *(len(of_domain[name]) for name in self.names)]).cumsum(0)
        self.test: list[Tensor] = []
        self.train: list[Tensor] = []
        for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            order = first + torch.randperm(end - first, generator=generator)
            held_out = min(HELD_OUT, len(order) // 4)
            self.test.append(order[:held_out])
            self.train.append(order[held_out:])

    def batches(self, steps: int, of_each: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """As many rows of every domain."""
        for _ in range(steps):
            yield [rows[torch.randperm(len(rows), generator=generator)[:of_each]] for rows in self.train]


def loss_of(model: Encoder, corpus: Corpus, rows: list[Tensor], numbers: list[int]) -> Tensor:
    """InfoNCE of sentences among the signatures of their own domain."""
    domain = torch.cat([torch.full((len(part),), number) for part, number in zip(rows, numbers, strict=True)])
    every = torch.cat(rows)
    (sentence, first), (signature, second) = (
        model(side, corpus.sides[side][every], domain) for side in ("sentence", "signature")
    )
    loss = info_nce(sentence, signature, temperature=TEMPERATURE, pairs=Pairs(same=(domain, domain)))
    return loss + 0.01 * (first + second)


def tune(models: list[Encoder], corpus: Corpus, args: argparse.Namespace, label: str, steps: int, seed: int) -> None:
    """Train in place: one model on all domains, or one on each."""
    optimizers = [torch.optim.Adam(model.parameters(), lr=args.learning_rate) for model in models]
    everything = list(range(len(corpus.names)))
    generator = torch.Generator().manual_seed(seed)
    for batch in progress(list(corpus.batches(steps, args.of_each, generator)), label):
        parts = [everything] if len(models) == 1 else [[number] for number in everything]
        for model, optimizer, numbers in zip(models, optimizers, parts, strict=True):
            optimizer.zero_grad()
            loss_of(model, corpus, [batch[number] for number in numbers], numbers).backward()
            optimizer.step()


@torch.no_grad()
def mrr_at_10(model: Encoder, corpus: Corpus, number: int) -> float:
    """Mean reciprocal rank of the right signature among the held-out ones of its domain, 0 beyond rank 10."""
    rows = corpus.test[number]
    domain = torch.full((len(rows),), number)
    sentence, signature = (model(side, corpus.sides[side][rows], domain)[0] for side in ("sentence", "signature"))
    found = similarity_topk(sentence, signature, min(10, len(rows))).indices == torch.arange(len(rows))[:, None]
    return (found / torch.arange(1, found.shape[1] + 1)).sum(1).mean().item()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, tune in four ways, search."""
    generator = torch.Generator().manual_seed(args.seed)
    pairs = collect_pairs(stdlib_only=args.stdlib, progress=progress)
    corpus = Corpus(pairs, args.domains, args.stdlib, generator)
    count = len(corpus.names)
    torch.manual_seed(args.seed)
    base = Encoder()
    tune([base], corpus, args, "all domains", args.steps, args.seed)
    ways = {
        "before": [base],
        "one dense model": [copy.deepcopy(base)],
        "one dense model a domain": [copy.deepcopy(base) for _ in range(count)],
        "experts, by domain": [base.mixture(count, enforced=True)],
        "experts, by a router": [base.mixture(count, enforced=False)],
    }
    result: dict[str, Any] = {
        "domains": dict(zip(corpus.names, map(len, corpus.train), strict=True)),
        "seed": args.seed,
    }
    result |= {"held_out": list(map(len, corpus.test)), "mrr": {}, "parameters": {}}
    for name, models in ways.items():
        if name != "before":
            tune(models, corpus, args, name, args.steps, args.seed + 1)
        spread = models if len(models) == count else models * count
        result["mrr"][name] = [mrr_at_10(model, corpus, number) for number, model in enumerate(spread)]
        result["parameters"][name] = sum(p.numel() for model in models for p in model.parameters())
    return result


def to_table(result: dict[str, Any]) -> str:
    """Aligned text: a column for each domain."""
    names = list(result["domains"])
    widths = [max(9, len(name)) for name in names]
    lines = [
        f"{'MRR@10':<26}"
        + "  ".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True))
        + "     mean  parameters"
    ]
    for way, found in result["mrr"].items():
        cells = "  ".join(f"{value:>{w}.3f}" for value, w in zip(found, widths, strict=True))
        lines.append(f"{way:<26}{cells}  {sum(found) / len(found):>7.3f}  {result['parameters'][way] / 1e6:>9.1f}M")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=int, default=6, help="the largest ones")
    parser.add_argument("--of-each", type=int, default=64, help="pairs of each domain in a batch")
    parser.add_argument("--steps", type=int, default=150, help="before, and again of each way to tune")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", action="store_true", help="the standard library alone, its packages as domains")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args(argv)
    result = run(args)
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    print(to_table(result))


if __name__ == "__main__":
    main()
