"""Train a docstring search engine twice: once with PyTorch's loss, once with contrastive_ops.

A (signature, docstring) pair is collected for every documented function that is installed, a
two-tower encoder learns to bring the two sides together, and the only difference between the two
trainings is the line that computes the loss. The end is a table of what that line cost, and a plot. Then the encoder
mines hard negatives for its own training pairs and is trained on with them; see `_mining_stage.py`.

    python examples/docstring_search.py            # a few minutes on two cores
    python examples/docstring_search.py --quick    # seconds, to see that it works
    python examples/docstring_search.py --ask      # and then answers your questions
    python examples/docstring_search.py --chunk 512 --batch 16384   # the towers see 512 texts at a time
    python examples/docstring_search.py --dims 32 64 128 256 512    # embeddings that may be cut off
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _loss_meter import LAYERS, MEASURED, MIB, Largest, LossLayer, Trial, largest_batch, measure
from _mining_stage import run_stage
from _mining_stage import to_table as mining_table
from _pairs import Pair, collect_pairs, split_identifier
from _report import Result, draw, takeaway, to_json, to_table
from torch import Tensor, nn

import contrastive_ops

BUCKETS = 1 << 15
BAG_WIDTH = 128
HELD_OUT = 2000
LEARNING_RATE = 3e-3
QUERIES = (
    "remove an edge from a graph",
    "the inverse of a square matrix",
    "read the bytes of a compressed file",
)


def progress(items: Iterable, label: str) -> Iterable:
    """A progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, mininterval=0.5, dynamic_ncols=True)


def say(text: str) -> None:
    """Progress in words goes to stderr, so that stdout is the table alone."""
    print(text, file=sys.stderr, flush=True)


# --- text to n-gram ids --------------------------------------------------------------------------


class Bags(NamedTuple):
    """Ragged lists of n-gram ids: text i owns ids[offsets[i]:offsets[i + 1]]."""

    ids: Tensor
    offsets: Tensor

    def __getitem__(self, texts: Tensor) -> Bags:
        starts, ends = self.offsets[texts], self.offsets[texts + 1]
        offsets = F.pad((ends - starts).cumsum(0), (1, 0))
        shift = torch.repeat_interleave(starts - offsets[:-1], ends - starts)
        return Bags(self.ids[torch.arange(int(offsets[-1])) + shift], offsets)


def ngram_ids(word: str) -> list[int]:
    """Ids of a word and its 3- to 5-grams; crc32, because Python's hash changes between runs."""
    marked = f"<{word}>"
    grams = [marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)]
    return [zlib.crc32(gram.encode()) % BUCKETS for gram in [word, *grams]]


def make_bags(texts: list[str]) -> Bags:
    """Distinct n-gram ids of every text, computed once for all of training."""
    known: dict[str, list[int]] = {}
    ids: list[int] = []
    offsets = [0]
    for text in texts:
        bag = {0}  # never empty, so that every text has an embedding
        for word in map(str.lower, split_identifier(text)):
            if word not in known:
                known[word] = ngram_ids(word)
            bag.update(known[word])
        ids.extend(sorted(bag))
        offsets.append(len(ids))
    return Bags(torch.tensor(ids), torch.tensor(offsets))


# --- the model, trained twice --------------------------------------------------------------------


class TwoTower(nn.Module):
    """One table of n-gram vectors, a projection for each side, a learnable logit scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, BAG_WIDTH, mode="mean", include_last_offset=True)
        self.signature = nn.Linear(BAG_WIDTH, dim, bias=False)
        self.sentence = nn.Linear(BAG_WIDTH, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def signatures(self, texts: Bags) -> Tensor:
        """Unit rows of one side."""
        return F.normalize(self.signature(F.normalize(self.table(*texts), dim=1)), dim=1)

    def sentences(self, texts: Bags) -> Tensor:
        """Unit rows of the other."""
        return F.normalize(self.sentence(F.normalize(self.table(*texts), dim=1)), dim=1)

    def forward(self, signatures: Bags, sentences: Bags) -> tuple[Tensor, Tensor]:
        return self.signatures(signatures), self.sentences(sentences)


class Training:
    """A model with its optimiser and loss layer, and what happened to it."""

    def __init__(self, model: TwoTower, layer: LossLayer, chunk: int | None = None) -> None:
        self.model, self.layer, self.chunk = model, layer, chunk
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, signatures: Bags, sentences: Bags) -> None:
        """One training step; the loss layer is cut out of the graph so that it is timed alone.

        With `chunk`, texts are encoded twice (Gao et al., GradCache): all without a graph, for the loss and its
        gradients, then chunk by chunk with one, so that the towers need memory for one chunk and the loss has all.
        """
        count = len(signatures.offsets) - 1
        rows = torch.arange(count).split(self.chunk or count)
        with torch.set_grad_enabled(len(rows) == 1):
            parts = [self.model(signatures[r], sentences[r]) for r in rows]
        scale = self.model.logit_scale.exp()
        inputs = [x.detach().requires_grad_() for x in (*map(torch.cat, zip(*parts, strict=True)), scale)]
        start = time.perf_counter()
        loss = self.layer(*inputs)
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        scale.backward(inputs[2].grad)
        for r, part in zip(rows, parts, strict=True):
            outputs = part if len(rows) == 1 else self.model(signatures[r], sentences[r])
            torch.autograd.backward(outputs, [x.grad[r] for x in inputs[:2]])
        self.optimizer.step()


def batches(count: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Batches of row numbers: no repeats inside an epoch, so no pair is its own negative."""
    chosen: list[Tensor] = []
    while len(chosen) < steps:
        order = torch.randperm(count, generator=generator)
        chosen.extend(order[: count // batch * batch].split(batch))
    return chosen[:steps]


def train_both(
    bags: tuple[Bags, Bags], rows: Tensor, args: argparse.Namespace, generator: torch.Generator
) -> dict[str, Training]:
    """Two trainings from the same weights on the same batches.

    They advance together, taking turns to go first, so that whatever else the machine does
    slows both loss layers down alike.
    """
    torch.manual_seed(args.seed)
    model = TwoTower(args.dim)
    runs = {name: Training(copy.deepcopy(model), layer, args.chunk) for name, layer in LAYERS.items()}
    plan = batches(len(rows), args.batch, args.steps, generator)
    for number, chosen in enumerate(progress(plan, "training both")):
        signatures, sentences = (side[rows[chosen]] for side in bags)
        order = list(runs.values())[:: 1 if number % 2 else -1]
        for run in order:
            run.step(signatures, sentences)
    return runs


# --- what was learnt -----------------------------------------------------------------------------


@torch.no_grad()
def mrr_at_10(model: TwoTower, bags: tuple[Bags, Bags], rows: Tensor, dim: int | None = None) -> float:
    """Mean reciprocal rank of the right signature for a held-out sentence, 0 beyond rank 10; by `dim` numbers alone."""
    signatures, sentences = (F.normalize(x[:, :dim], dim=1) for x in model(bags[0][rows], bags[1][rows]))
    scores = sentences @ signatures.T
    # Ties count against the model: a rank is the number of signatures scored at least as high.
    rank = (scores >= scores.diagonal()[:, None]).sum(1)
    return (1 / rank).where(rank <= 10, 0).mean().item()


@torch.no_grad()
def search(model: TwoTower, pairs: list[Pair], signatures: Bags, query: str) -> list[str]:
    """The three best signatures for a query in words."""
    everything = torch.arange(len(pairs))
    keys, words = model(signatures[everything], make_bags([query]))
    best = (words @ keys.T)[0].topk(3).indices.tolist()
    return [pairs[i].signature for i in best]


def truncated(
    model: TwoTower, bags: tuple[Bags, Bags], rows: Tensor, held_out: Tensor, args: argparse.Namespace
) -> str:
    """MRR@10 of embeddings that are cut off, of the model and of one trained for that (Matryoshka)."""

    def layer(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return contrastive_ops.losses.matryoshka_clip(a, b, dims=args.dims, scale=scale)

    torch.manual_seed(args.seed)
    run = Training(TwoTower(args.dim), layer, args.chunk)
    plan = batches(len(rows), args.batch, args.steps, torch.Generator().manual_seed(args.seed))
    for chosen in progress(plan, "training Matryoshka"):
        run.step(*(side[rows[chosen]] for side in bags))
    lines = [f"{'numbers':>12}  {'clip':>8}  {'matryoshka_clip':>16}"]
    for dim in args.dims:
        found = [mrr_at_10(each, bags, held_out, dim) for each in (model, run.model)]
        lines.append(f"{dim:>12}  {found[0]:>8.4f}  {found[1]:>16.4f}")
    return "\n".join(lines)


def find_largest(name: str, first: Trial, args: argparse.Namespace) -> Largest:
    """Search for the largest batch within the memory limit, telling how it goes."""

    def run(batch: int, timeout: float) -> Trial | None:
        trial = measure(name, batch, args.dim, timeout)
        cost = f"{trial.extra_bytes / MIB:,.0f} MiB" if trial else "time is up"
        say(f"  {name}, batch {batch:,}: {cost}")
        return trial

    return largest_batch(first, run, limit=args.limit_mib * MIB, seconds=args.search_seconds)


def ask(find: Callable[[str], list[str]]) -> None:
    """Answer queries from the terminal until there is none."""
    while True:
        try:
            query = input("\nwhat should it do? ").strip()
        except EOFError:
            return
        if not query:
            return
        print("".join(f"    {hit}\n" for hit in find(query)), end="")


def run_demo(args: argparse.Namespace) -> tuple[Result, Callable[[str], list[str]]]:
    """Collect, train, measure; the result and the search with the encoder that contrastive_ops trained."""
    say("collecting the documented functions that are installed")
    pairs = collect_pairs(stdlib_only=args.quick, progress=progress)
    bags = (make_bags([p.signature for p in pairs]), make_bags([p.sentence for p in pairs]))
    generator = torch.Generator().manual_seed(args.seed)
    held_out, rows = torch.randperm(len(pairs), generator=generator).tensor_split([HELD_OUT])
    if len(rows) < args.batch:
        raise SystemExit(f"--batch must be at most {len(rows)}, the number of training pairs")
    say(f"{len(pairs):,} pairs, {len(rows):,} to train on and {len(held_out):,} held out")
    runs = train_both(bags, rows, args, generator)

    say("measuring memory, each trial in a process of its own")
    measured = LAYERS if args.quick else MEASURED
    with ThreadPoolExecutor(2) as pool:  # side by side: memory is counted by process
        done = pool.map(lambda name: measure(name, args.batch, args.dim), measured)
        trials = dict(zip(measured, done, strict=True))
    largest = {name: find_largest(name, trials[name], args) for name in LAYERS}
    say("mining hard negatives and training on, with and without them")
    model = runs["contrastive_ops"].model
    plan = batches(len(rows), args.mining_batch, args.mining_steps, generator)
    mining = run_stage(model, pairs, bags, rows, plan, lambda trained: mrr_at_10(trained, bags, held_out))
    if args.dims:
        print("\nMRR@10 by the first numbers of each embedding alone:\n")
        print(truncated(model, bags, rows, held_out, args))
    result = Result(
        pairs=len(pairs),
        held_out=len(held_out),
        batch=args.batch,
        dim=args.dim,
        limit_mib=args.limit_mib,
        losses={name: run.losses for name, run in runs.items()},
        ms_min={name: 1e3 * min(run.seconds) for name, run in runs.items()},
        ms_median={name: 1e3 * statistics.median(run.seconds) for name, run in runs.items()},
        extra_mib={name: trial.extra_bytes / MIB for name, trial in trials.items()},
        mrr={name: mrr_at_10(run.model, bags, held_out) for name, run in runs.items()},
        mrr_chance=sum(1 / rank for rank in range(1, 11)) / len(held_out),
        largest=largest,
        mining=mining,
    )
    return result, lambda query: search(model, pairs, bags[0], query)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Options; --quick replaces the defaults, not what is asked for explicitly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512, help="output dimension of the towers")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--mining-batch", type=int, default=512, help="of the training with mined negatives")
    parser.add_argument("--mining-steps", type=int, default=120)
    parser.add_argument("--chunk", type=int, help="texts that the towers encode at a time, twice (GradCache)")
    parser.add_argument("--dims", type=int, nargs="+", help="also train for embeddings cut off there (Matryoshka)")
    parser.add_argument("--ask", action="store_true", help="then answer queries from the terminal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the plot")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--limit-mib", type=int, default=2048, help="for the largest batch")
    parser.add_argument("--search-seconds", type=float, default=50, help="time cap of the search, for each layer")
    parser.add_argument("--quick", action="store_true", help="standard library only, a few steps")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(batch=512, dim=256, steps=6, limit_mib=64, search_seconds=0, mining_steps=8)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; fails where the two trainings do not agree."""
    start = time.monotonic()
    args = parse_arguments(argv)
    result, find = run_demo(args)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "docstring_search.png"
    draw(result, picture)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(to_json(result), indent=2) + "\n")
    print(to_table(result))
    print("\nWhat the encoder trained with contrastive_ops finds:\n")
    for query in QUERIES:
        print(f'"{query}"\n' + "".join(f"    {hit}\n" for hit in find(query)))
    print(takeaway(result))
    print("\nThen it mines hard negatives for its own training pairs:\n")
    print(mining_table(result.mining))
    say(f"\nwrote {picture} after {time.monotonic() - start:.0f} s")
    if args.ask:
        ask(find)
    return 0 if result.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
