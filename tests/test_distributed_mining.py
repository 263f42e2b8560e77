"""Mining in a corpus that is spread over processes finds what one process finds in the whole of it, to the bit."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import ranks

from contrastive_ops import Pairs, distributed
from contrastive_ops.losses import moco
from contrastive_ops.mining import MemoryBank, NegativeRules, Sampling, TopKState, mine_hard_negatives
from contrastive_ops.ops import Guide, similarity_topk

ROWS = {1: (60,), 2: (37, 23), 3: (20, 0, 40), 4: (1, 30, 12, 17)}


def problem():
    """Queries, a corpus with many equal scores, positives."""
    torch.manual_seed(3)
    corpus = torch.randn(30, 8).round().repeat(2, 1)
    query = corpus[:9] + torch.randint(0, 2, (9, 8))
    positives = torch.tensor([[0, 40], [1, -1], [2, 2], [3, 59], [4, -1], [5, -1], [6, 36], [7, -1], [8, -1]])
    return query, corpus, positives


def options():
    ids, guide = torch.arange(9) % 4, torch.randn(60, 4)
    rules = Pairs(differ=(ids, torch.arange(60) % 7), guide=Guide(guide[:9], guide, below=2.0), exclude=EXCLUDED)
    return {
        "plain": {"metric": "dot"},
        "rules": {"rules": NegativeRules(relative_margin=0.1, max_score=0.95), "pairs": rules},
        "drawn": {
            "sampling": Sampling("softmax", seed=5, temperature=0.3),
            "rules": NegativeRules(rank_window=(2, 20)),
        },
        "distinct": {"rules": NegativeRules(near_duplicate=0.9), "metric": "sqeuclidean"},
        "raw": {"rules": NegativeRules(absolute_margin=0.05, rank_basis="raw", positive_score="mean")},
        "documents": {"documents": torch.arange(60) // 4 % 11, "rules": NegativeRules(relative_margin=0.1)},
    }


EXCLUDED = (torch.arange(10), torch.arange(9) + 12)


def same(found, truth):
    for name in ("indices", "scores", "counts", "positive_scores"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert all(torch.equal(found.statistics[name], each) for name, each in truth.statistics.items())


def mined(rank, size, folder):
    """Shards in the order of ranks, files in any order; both as one process finds them."""
    query, corpus, positives = problem()
    parts = corpus.split(ROWS[size])
    begins = np.cumsum((0, *ROWS[size])).tolist()
    halves = [(begins[rank] + at, part.numpy()) for at, part in ((5, parts[rank][5:]), (0, parts[rank][:5]))]
    for given in options().values():
        truth = mine_hard_negatives(query, corpus, positives, 4, **given)
        for part in (parts[rank], halves):
            found = mine_hard_negatives(query, part, positives, 4, block_rows=7, group=dist.group.WORLD, **given)
            same(found, truth)
    files = [(begin, part) for begin, part in zip(begins, parts, strict=False)][::-1]
    same(mine_hard_negatives(query, files, positives, 4), mine_hard_negatives(query, corpus, positives, 4))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_lists_are_those_of_one_process(size, tmp_path):
    ranks(size).run(mined, str(tmp_path))


class Interrupt(Exception):
    pass


def interrupted(rank, size, path):
    """A pass that ends in the middle, on one rank only."""
    query, corpus, positives = problem()

    def stop(done, rows):
        if rank == 0 and done >= 12:
            raise Interrupt

    with pytest.raises((Interrupt, ValueError), match="rank 0 raised Interrupt" if rank else ""):
        part = corpus.split(ROWS[size])[rank]
        mine_hard_negatives(
            query, part, positives, 4, block_rows=6, checkpoint=path, progress=stop, group=dist.group.WORLD
        )


def resumed(rank, size, path, begin):
    """It goes on, on as many ranks as there are now, and reads what was not read."""
    query, corpus, positives = problem()
    read = []
    found = mine_hard_negatives(
        query,
        corpus.split(ROWS[size])[rank],
        positives,
        4,
        block_rows=6,
        checkpoint=path,
        progress=lambda done, rows: read.append(done),
        group=dist.group.WORLD,
    )
    same(found, mine_hard_negatives(query, corpus, positives, 4))
    return min(read, default=60) > begin


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_search_goes_on_where_it_ended(size, tmp_path):
    path = str(tmp_path / "mined")
    ranks(3).run(interrupted, path)
    assert all(ranks(size).run(resumed, path, 12 + 36))
    assert {each.name for each in tmp_path.iterdir()} <= {"mined", "mined.1", "mined.2"} - {f"mined.{size}"}
    assert all(ranks(2).run(resumed, path, 59))


def refused(rank, size):
    """What differs, or is wrong on one rank, is an error on all."""
    query, corpus, positives = problem()
    part = corpus.split(30)[rank]

    def short(*_):
        raise OSError("cut short")

    for arguments, given, words in (
        ((query + rank, part, positives), {}, "rank 0 .*rank 1"),
        ((query, part[:, : 8 - rank], positives), {}, "rank 1 raised|corpus must have the same last dimension"),
        ((query, part.double() if rank else part, positives), {}, "rank 1 raised|corpus must have the same dtype"),
        ((query, [(0, part)], positives), {}, "rows 0 to 30 in two, before the part of rank"),
        ((query, [(31 * rank, part)], positives), {}, "rows 30 to 31 in none"),
        ((query, part, positives), {"metric": "dot" if rank else "cosine"}, "cosine.*dot"),
        ((query, part, positives), {"documents": torch.arange(60) + rank}, "rank 0 .*rank 1"),
        ((query, part, positives), {"progress": short if rank else False}, "rank 1 raised OSError|cut short"),
    ):
        with pytest.raises((ValueError, TypeError, OSError), match=words):
            mine_hard_negatives(*arguments, 4, group=dist.group.WORLD, **given)
        dist.all_reduce(torch.ones(()))
    state = TopKState(query, 3)
    state.update(part, 0)
    with pytest.raises(ValueError, match="rows 0 to 30 came twice"):
        state.all_merge()
    with pytest.raises(ValueError, match="differ in k"):
        TopKState(query, 3 + rank).all_merge()


def test_what_one_rank_refuses_all_refuse():
    ranks(2).run(refused)


def merged(rank, size):
    query, corpus, _ = problem()
    state = TopKState(query, 5, metric="cosine", rows=60, count_above=torch.full((9,), 0.5))
    begin = sum(ROWS[size][:rank])
    state.update(corpus[begin : begin + ROWS[size][rank]], begin)
    truth = TopKState(query, 5, metric="cosine", count_above=torch.full((9,), 0.5))
    truth.update(corpus, 0)
    top = state.all_merge().finalize()
    for found, expected in zip(top[:3], similarity_topk(query, corpus, 5, metric="cosine")[:3], strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(state.statistics[name], each) for name, each in truth.statistics.items())
    return state.covered


def merged_by_document(rank, size):
    """Chunks of one document lie on several ranks."""
    query, corpus, _ = problem()
    ids = torch.arange(60) * 7 % 13
    state = TopKState(query, 5, documents=ids)
    begin = sum(ROWS[size][:rank])
    state.update(corpus[begin : begin + ROWS[size][rank]], begin)
    top = state.all_merge().finalize()
    whole = TopKState(query, 5, documents=ids)
    whole.update(corpus, 0)
    assert all(torch.equal(found, expected) for found, expected in zip(top[:3], whole.finalize()[:3], strict=True))
    best = torch.stack([(query @ corpus.T)[:, ids == each].amax(1) for each in range(13)], 1).topk(5)
    torch.testing.assert_close(top.values, best.values)
    assert all(len(set(each)) == 5 for each in ids[top.indices].tolist())
    with pytest.raises(ValueError, match="differ in documents"):
        TopKState(query, 5, documents=ids + rank).all_merge()


def test_states_merge():
    ranks(4).run(merged_by_document)
    assert ranks(4).run(merged) == [[(0, 60)]] * 4


def banks(rank, size):
    """Shared banks are equal on all ranks, and MoCo with them is that of one process; a local bank is gathered."""
    shared, local, single = (MemoryBank(16, 8) for _ in range(3))
    for step in range(4):
        rows = (3, 0, 2 + step)
        query, key = torch.randn(sum(rows), 8), torch.randn(sum(rows), 8)
        ids = torch.cat([torch.arange(count) * 3 + owner for owner, count in enumerate(rows)])
        here = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        own = distributed.unique_ids(torch.arange(rows[rank]))
        assert torch.equal(own, ids[here])
        if step:
            queue = single.entries()
            whole = query.clone().requires_grad_()
            truth = moco(whole, key, queue.rows, labels=ids, queue_labels=queue.ids)
            (expected,) = torch.autograd.grad(truth, whole)
            for bank, is_shared in ((shared, True), (local, False)):
                part, queue = query[here].clone().requires_grad_(), bank.entries()
                given = {"labels": own, "queue_labels": queue.ids, "shared_queue": is_shared}
                value = distributed.moco(part, key[here], queue.rows, **given)
                (gradient,) = torch.autograd.grad(value, part)
                dist.all_reduce(value := value.detach().clone())
                if is_shared or step == 1:  # later on, a bank of each rank holds more than one bank of all
                    torch.testing.assert_close(value / size, truth.detach())
                    torch.testing.assert_close(gradient / size, expected[here])
        shared.enqueue(key[here], own, group=dist.group.WORLD)
        local.enqueue(key[here], own)
        single.enqueue(key, ids)
        for name, value in single.state_dict().items():
            assert torch.equal(shared.state_dict()[name], value), name
    with pytest.raises((ValueError, TypeError), match="rank 1 raised TypeError|ids must be"):
        shared.enqueue(torch.randn(2, 8), torch.ones(2) if rank == 1 else torch.arange(2), group=dist.group.WORLD)
    dist.all_reduce(torch.ones(()))


def test_banks():
    ranks(3).run(banks)
