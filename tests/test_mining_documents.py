"""Search by document over chunks: each document once, at its best chunk, whatever the blocks."""

import re

import pytest
import torch

from contrastive_ops import Pairs
from contrastive_ops.mining import TopKState, collapse, mine_hard_negatives, search
from contrastive_ops.ops import Guide

N, M, D = 5, 60, 4


def drawn(kind):
    query, corpus = (torch.randint(-2, 3, (size, D)).float() for size in (N, M))  # exact, with many equal scores
    ids = torch.randint(0, 12, (M,)) ** 2 - 3  # any numbers
    ids[ids == -1] = 77
    if kind == "one large document":
        ids[:45] = 5
    return query, corpus, torch.arange(M) if kind == "a chunk each" else ids


def best(scores, ids, k):
    """The first chunk of each document in the order of the scores, one row at a time."""
    found = torch.full((len(scores), k), -1)
    for row, each in enumerate(scores):
        seen = {}
        for chunk in each.sort(descending=True, stable=True).indices.tolist():
            if each[chunk] > -torch.inf:
                seen.setdefault(int(ids[chunk]), chunk)
        chunks = torch.tensor(list(seen.values())[:k])
        found[row, : len(chunks)] = chunks
    return found


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("kind", ["chunks", "one large document", "a chunk each"])
def test_documents_at_their_best_chunk(kind, k, ruled, metric):
    query, corpus, ids = drawn(kind)
    scores = query @ corpus.T if metric == "dot" else -(query[:, None] - corpus).square().sum(2)
    bound, masked = torch.randint(-3, 4, (N,)).float(), torch.arange(M) % 7 != 2
    pairs = Pairs(below=bound, columns=masked) if ruled else None
    if ruled:
        scores = scores.masked_fill((scores > bound[:, None]) | ~masked, -torch.inf)
    wanted = best(scores, ids, k)
    for block_rows in (None, 7, 1):
        found = search(query, corpus, k, metric=metric, pairs=pairs, documents=ids, block_rows=block_rows)
        assert torch.equal(found.indices, wanted)
        assert torch.equal(found.counts, (wanted >= 0).sum(1))
        values = scores.gather(1, wanted.clamp_min(0)).masked_fill(wanted < 0, -torch.inf)
        torch.testing.assert_close(found.values, values)
    assert torch.equal(collapse(found.indices, ids), torch.where(wanted < 0, -1, ids[wanted]))


def test_states_merge_documents_in_any_order_and_go_on_from_a_file():
    query, corpus, ids = drawn("chunks")
    whole = search(query, corpus, 6, documents=ids)
    states = [TopKState(query, 6, documents=ids) for _ in range(3)]
    for begin in (40, 0, 20):
        states[begin // 20].update(corpus[begin : begin + 20], begin)
    other = TopKState(query, 6, documents=ids)
    other.load_state_dict(states[2].merge(states[0]).state_dict())
    found = states[1].merge(other).finalize()
    assert torch.equal(found.indices, whole.indices) and torch.equal(found.values, whole.values)


def test_lists_that_are_full_of_one_document_are_searched_again(monkeypatch):
    from contrastive_ops.mining import state

    widths = []

    def counted(problem, k, **options):
        widths.append((problem.x.shape[0], k))
        return select(problem, k, **options)

    select = state.select
    monkeypatch.setattr(state, "select", counted)
    query, corpus = torch.randn(N, D), torch.randn(M, D)
    ids = torch.arange(M)
    ids[(corpus @ query[1]).topk(20).indices] = 99
    search(query, corpus, 4, documents=ids)
    assert widths[0] == (N, 8) and widths[1][1] == 16 and all(rows < N for rows, _ in widths[1:])
    assert widths[-1] == (1, 32)


def test_documents_that_do_not_fit_are_refused():
    query, corpus, ids = drawn("chunks")
    with pytest.raises(ValueError, match=re.escape("search: documents must have shape (60,), got (59,)")):
        search(query, corpus, 3, documents=ids[1:])
    with pytest.raises(ValueError, match="TopKState: documents must not be -1, which stands for none"):
        TopKState(query, 3, documents=ids.clone().fill_(-1))
    with pytest.raises(TypeError, match="search: documents must"):
        search(query, corpus, 3, documents=ids.float())
    with pytest.raises(ValueError, match="TopKState.merge: both states must have the same documents"):
        TopKState(query, 3, documents=ids).merge(TopKState(query, 3, documents=ids + 7))
    with pytest.raises(ValueError, match="state must be of the same problem"):
        TopKState(query, 3, documents=ids).load_state_dict(TopKState(query, 3, rows=M).state_dict())


def test_an_empty_corpus_has_no_documents():
    found = search(torch.randn(N, D), torch.randn(0, D), 3, documents=torch.zeros(0, dtype=torch.int64))
    assert found.indices.shape == (N, 3) and (found.indices == -1).all()


def test_negatives_of_documents_and_of_several_teachers():
    """As the docstring of mine_hard_negatives says them."""
    query, corpus, ids = drawn("chunks")
    others, positives = (torch.randn(N, 6), torch.randn(M, 6)), torch.randint(M, (N,))
    second, own = others[0] @ others[1].T, ids[positives][:, None] == ids
    scores = (2 * query @ corpus.T + second).masked_fill((second > 1.0) | own, -torch.inf)
    pairs = Pairs(differ=(ids[positives], ids), guide=Guide(*others, below=1.0))
    sides = torch.cat([2 * query, others[0]], 1), torch.cat([corpus, others[1]], 1)
    mined = mine_hard_negatives(*sides, positives, M, metric="dot", pairs=pairs)
    wanted = best(scores, ids, M)
    assert torch.equal(collapse(mined.indices, ids), torch.where(wanted < 0, -1, ids[wanted]))
