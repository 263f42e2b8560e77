"""Lists whose offsets or entries cannot be: an error that names the argument, from every function that takes lists."""

import pytest
import torch

from contrastive_ops import Pairs, losses, metrics, ops, similarity_reduce, similarity_topk
from contrastive_ops.mining import TopKState, mine_hard_negatives

ROWS, COLUMNS = 3, 5
GOOD = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 4, 1, 3])
HUGE = 1 << 62
# What is wrong, and which part the message must name.
BAD = {
    "falls": (torch.tensor([0, 3, 2, 4]), GOOD[1], "indptr"),
    "begins later": (torch.tensor([1, 2, 2, 4]), GOOD[1], "indptr"),
    "begins below 0": (torch.tensor([-1, 2, 2, 4]), GOOD[1], "indptr"),
    "ends behind the entries": (torch.tensor([0, 2, 2, 5]), GOOD[1], "indptr"),
    "ends before the entries": (torch.tensor([0, 2, 2, 3]), GOOD[1], "indptr"),
    "is huge in the middle": (torch.tensor([0, HUGE, 2, 4]), GOOD[1], "indptr"),
    "is huge and negative": (torch.tensor([0, 2, -HUGE, 4]), GOOD[1], "indptr"),
    "is too short": (GOOD[0][:-1], GOOD[1], "indptr"),
    "has two dimensions": (GOOD[0][None], GOOD[1], "indptr"),
    "is empty": (GOOD[0][:0], GOOD[1][:0], "indptr"),
    "has no whole numbers": (GOOD[0].float(), GOOD[1], ""),
    "an entry behind the columns": (GOOD[0], torch.tensor([0, COLUMNS, 1, 3]), ""),
    "an entry below 0": (GOOD[0], torch.tensor([0, 4, -2, 3]), ""),
    "a huge entry": (GOOD[0], torch.tensor([0, 4, HUGE, 3]), ""),
}


def matrices():
    return torch.randn(ROWS, 4, requires_grad=True), torch.randn(COLUMNS, 4)


CALLS = {
    "exclude of a fold": lambda x, y, lists, b: similarity_reduce(x, y, pairs=Pairs(exclude=lists), backend=b),
    "linear": lambda x, y, lists, b: similarity_reduce(x, y, linear=lists, backend=b),
    "linear with weights": lambda x, y, lists, b: similarity_reduce(
        x, y, linear=(*lists, torch.ones(len(lists[1]))), backend=b
    ),
    "exclude of a search": lambda x, y, lists, b: similarity_topk(x, y, 2, pairs=Pairs(exclude=lists), backend=b),
    "exclude of a state": lambda x, y, lists, b: TopKState(
        x.detach(), 2, pairs=Pairs(exclude=lists), rows=COLUMNS, backend=b
    ),
    "exclude of sums": lambda x, y, lists, b: ops.similarity_values(x, y, y, pairs=Pairs(exclude=lists), backend=b),
    "exclude of a divergence": lambda x, y, lists, b: ops.similarity_distill(
        x, y, x.detach(), y, pairs=Pairs(exclude=lists), backend=b
    ),
    "positives of a search": lambda x, y, lists, b: mine_hard_negatives(x.detach(), y, lists, 2, backend=b),
    "soft_info_nce": lambda x, y, lists, b: losses.soft_info_nce(
        x, y, (*lists, torch.full((len(lists[1]),), 0.5)), backend=b
    ),
    "bixse": lambda x, y, lists, b: losses.bixse(
        x, y, torch.full((len(lists[1]),), 0.5), target=lists[1], indptr=lists[0], backend=b
    ),
    "bixse with weights": lambda x, y, lists, b: losses.bixse(
        x, y, torch.full((len(lists[1]),), 0.5), target=lists[1], indptr=lists[0], weight=torch.rand(ROWS), backend=b
    ),
    "exclude of a loss": lambda x, y, lists, b: losses.info_nce(
        x, y, target=torch.tensor([0, 1, 2]), pairs=Pairs(exclude=lists), backend=b
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_lists_that_can_be_are_taken(call, backend):
    x, y = matrices()
    CALLS[call](x, y, GOOD, backend)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", CALLS)
def test_lists_that_cannot_be_are_refused_by_name(call, bad, backend):
    x, y = matrices()
    indptr, indices, part = BAD[bad]
    with pytest.raises((ValueError, TypeError), match=rf"^\w+: .*{part}.* (must|got) "):
        CALLS[call](x, y, (indptr, indices), backend)


@pytest.mark.parametrize("bad", [name for name, (*_, part) in BAD.items() if part or "whole" in name])
def test_judgements_that_cannot_be_are_refused_by_name(bad):
    """Ids of documents may be any number; offsets may not."""
    found = torch.zeros(ROWS, 2, dtype=torch.int64)
    assert metrics.retrieval_metrics(found, GOOD)
    with pytest.raises((ValueError, TypeError), match=r"^retrieval_metrics: .*(must|got) "):
        metrics.retrieval_metrics(found, BAD[bad][:2])
