"""The demo's second stage: hard negatives for the trained encoder, and whether they are worth it.

The encoder that `docstring_search.py` trained with contrastive_ops is trained on, twice from the same weights, on the
same batches and with the same settings: once with the negatives of its batch alone, once with mined ones as well. They
are mined again now and then, because they are hard for an encoder that moves on.

The settings were chosen on a part of the training pairs; the held-out pairs are read for the table alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contrastive_ops import info_nce
from contrastive_ops.losses import mined_info_nce
from contrastive_ops.mining import HardNegatives, NegativeRules, RefreshSchedule, mine_hard_negatives

if TYPE_CHECKING:
    from _pairs import Pair
    from docstring_search import Bags, TwoTower

IN_BATCH, MINED = "in_batch", "mined"
LABELS = {IN_BATCH: "negatives of the batch alone", MINED: "mined negatives as well"}
LEARNING_RATE = 1.5e-2
NUM_NEGATIVES = 4
REFRESHES = 4
# A signature that scores within 5% of the right one may well be another right one.
RULES = NegativeRules(relative_margin=0.05)


@dataclass
class Mining:
    """What the stage measured; the dictionaries are keyed by what was trained with."""

    steps: int
    batch: int
    num_negatives: int
    refreshes: int
    corpus: int  # training signatures, among which each sentence's negatives were mined
    mrr_before: float
    mrr: dict[str, float]
    seconds: dict[str, float]  # mining included
    mining_seconds: float  # all refreshes together, embedding included
    margin_dropped: float  # signatures a sentence that scored too close to the right one
    starved: int  # sentences with fewer negatives than asked for and eligible
    example: list[str]  # a sentence, its signature, and those that were mined for it


class Negatives:
    """Every training sentence's hardest signatures, mined again where that is due."""

    def __init__(self, bags: tuple[Bags, Bags], rows: Tensor, steps: int) -> None:
        self.bags, self.rows = bags, rows
        self.schedule = RefreshSchedule(every=-(-steps // REFRESHES))
        self.found: list[HardNegatives] = []
        self.seconds = 0.0

    @torch.no_grad()
    def refresh(self, model: TwoTower) -> None:
        """Mine for the model as it is."""
        start = time.perf_counter()
        parts = self.rows.split(4096)
        signatures = torch.cat([model.signatures(self.bags[0][part]) for part in parts])
        sentences = torch.cat([model.sentences(self.bags[1][part]) for part in parts])
        own = torch.arange(len(self.rows))
        self.found.append(mine_hard_negatives(sentences, signatures, own, NUM_NEGATIVES, rules=RULES))
        self.seconds += time.perf_counter() - start

    def of(self, model: TwoTower, step: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs whose signatures a batch needs, each once, and every sentence's places among them."""
        if self.schedule.due(step):
            self.refresh(model)
            self.schedule.done(step)
        lists = self.found[-1].indices[chosen]
        unique, places = lists[lists >= 0].unique(return_inverse=True)
        return self.rows[unique], torch.full_like(lists, -1).masked_scatter_(lists >= 0, places)


def train_on(
    model: TwoTower, bags: tuple[Bags, Bags], rows: Tensor, plan: list[Tensor], negatives: Negatives | None
) -> float:
    """Train the model; returns seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(plan))
    start = time.perf_counter()
    for step, chosen in enumerate(plan):
        scale = model.logit_scale.exp()
        sentences = model.sentences(bags[1][rows[chosen]])
        if negatives is None:
            loss = info_nce(sentences, model.signatures(bags[0][rows[chosen]]), scale=scale)
        else:
            more, indices = negatives.of(model, step, chosen)
            signatures = model.signatures(bags[0][torch.cat([rows[chosen], more])])
            own, corpus = signatures.split([len(chosen), len(more)])
            loss = mined_info_nce(sentences, own, corpus, indices=indices, scale=scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return time.perf_counter() - start


def run_stage(
    model: TwoTower,
    pairs: list[Pair],
    bags: tuple[Bags, Bags],
    rows: Tensor,
    plan: list[Tensor],
    score: Callable[[TwoTower], float],
) -> Mining:
    """Train two copies of the model on the pairs in `rows`; `plan` holds batches of places in these."""
    negatives = Negatives(bags, rows, len(plan))
    mrr, seconds = {}, {}
    for name, used in ((IN_BATCH, None), (MINED, negatives)):
        trained = copy.deepcopy(model)
        seconds[name] = train_on(trained, bags, rows, plan, used)
        mrr[name] = score(trained)
    first = negatives.found[0]
    wanted = first.statistics["eligible"].clamp_max(NUM_NEGATIVES)
    return Mining(
        steps=len(plan),
        batch=len(plan[0]),
        num_negatives=NUM_NEGATIVES,
        refreshes=len(negatives.found),
        corpus=len(rows),
        mrr_before=score(model),
        mrr=mrr,
        seconds=seconds,
        mining_seconds=negatives.seconds,
        margin_dropped=first.statistics["below"].double().mean().item(),
        starved=int((first.counts < wanted).sum()),
        example=hardest(first, pairs, rows),
    )


def hardest(found: HardNegatives, pairs: list[Pair], rows: Tensor) -> list[str]:
    """The sentence whose negatives come closest to its signature, of those that the encoder gets right."""
    usable = (found.statistics["positive_rank"] == 0) & (found.counts == NUM_NEGATIVES)
    gap = (found.positive_scores - found.scores[:, -1]).masked_fill(~usable, torch.inf)
    query = int(gap.argmin())
    shown = [query, *found.indices[query][: int(found.counts[query])].tolist()]
    return [pairs[int(rows[query])].sentence, *(pairs[int(rows[place])].signature for place in shown)]


def to_table(mining: Mining) -> str:
    """Aligned text: what the encoder was worth before and after, what mining took, and what it found."""
    heading = f"{mining.steps} more steps, batch {mining.batch:,}"
    lines = [f"{heading:<32} {'MRR@10':>8} {'seconds':>9}", "-" * 51, f"{'before':<32} {mining.mrr_before:>8.4f}"]
    lines += [f"{label:<32} {mining.mrr[name]:>8.4f} {mining.seconds[name]:>9.1f}" for name, label in LABELS.items()]
    sentence, right, *mined = mining.example
    lines += [
        lines[1],
        f"{mining.num_negatives} negatives for each of {mining.corpus:,} sentences, mined among as many signatures "
        f"{mining.refreshes} times in {mining.mining_seconds:.1f} s",
        f"too close to the right signature to be negatives: {mining.margin_dropped:.1f} a sentence; sentences with "
        f"fewer negatives than there are: {mining.starved}",
        f'\n"{sentence}"',
        f"    is   {right}",
        *(f"    not  {signature}" for signature in mined),
    ]
    return "\n".join(lines)
