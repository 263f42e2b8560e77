"""Search by document over chunks: each document once, at its best chunk, whatever the blocks."""

import re

import pytest
import torch

from contrastive_ops import Pairs
from contrastive_ops.mining import NegativeRules, Sampling, TopKState, collapse, mine_hard_negatives, search
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


@pytest.mark.parametrize("strategy", ["top", "uniform"])
@pytest.mark.parametrize("basis", ["surviving", "raw"])
@pytest.mark.parametrize("kind", ["chunks", "one large document", "a chunk each"])
def test_negatives_are_of_different_documents(kind, basis, strategy):
    """One query at a time: no chunk of a positive's document, then each document at its best chunk, then a window."""
    query, corpus, ids = drawn(kind)
    scores, positives = query @ corpus.T, torch.randint(-1, M, (N, 2))
    positives[:, 0] = torch.randint(M, (N,))
    masked = torch.arange(M) % 7 != 2
    rules = NegativeRules(absolute_margin=1.0, rank_window=(1, 6), rank_basis=basis)
    for block_rows in (None, 9):
        mined = mine_hard_negatives(
            query, corpus, positives, 3, rules=rules, metric="dot", pairs=Pairs(columns=masked), documents=ids,
            sampling=Sampling(strategy, seed=3), block_rows=block_rows,
        )  # fmt: skip
        for i, own in enumerate(positives.tolist()):
            own = [j for j in own if j >= 0]
            bound = min(float(scores[i, j]) for j in own) - 1
            others = [j for j in range(M) if ids[j] not in ids[own]]
            ranked = [j for j in others if masked[j] and (basis == "raw" or scores[i, j] <= bound)]
            seen = {}
            for j in sorted(ranked, key=lambda j: (-float(scores[i, j]), j)):
                seen.setdefault(int(ids[j]), j)
            window = [j for j in list(seen.values())[1:6] if scores[i, j] <= bound]
            found = [j for j in mined.indices[i].tolist() if j >= 0]
            assert found == window[:3] if strategy == "top" else set(found) <= set(window)
            assert len(found) == min(3, len(window)) == mined.counts[i]
            kept = sum(bool(masked[j]) and float(scores[i, j]) <= bound for j in others)
            assert mined.statistics["eligible"][i] == kept
            assert mined.statistics["same"][i] == sum(not masked[j] for j in others)
            assert mined.statistics["positives"][i] == len(set(own))
            higher = sum(float(scores[i, j]) > bound + 1 for j in others)
            assert mined.statistics["positive_rank"][i] == higher


def test_documents_are_searched_again_where_near_duplicates_are_skipped():
    query, corpus, ids = torch.randn(3, D), torch.randn(M, D), torch.arange(M) // 3
    rules = NegativeRules(near_duplicate=0.5)
    mined = mine_hard_negatives(query, corpus, None, 4, rules=rules, documents=ids)
    rows = torch.nn.functional.normalize(corpus)
    for i, cosines in enumerate(torch.nn.functional.normalize(query) @ rows.T):
        taken = []
        for j in best(cosines[None], ids, M)[0].tolist():
            if j >= 0 and len(taken) < 4 and all(float(rows[j] @ rows[o]) <= 0.5 for o in taken):
                taken.append(j)
        assert mined.indices[i].tolist() == taken + [-1] * (4 - len(taken))


def test_a_window_that_is_a_share_is_one_of_documents():
    query, corpus, ids = torch.randn(3, D), torch.randn(M, D), torch.arange(M) // 6
    rules = NegativeRules(rank_window=(0.2, 0.5))
    mined = mine_hard_negatives(query, corpus, None, 9, rules=rules, metric="dot", documents=ids)
    assert torch.equal(mined.indices[:, :3], best(query @ corpus.T, ids, 10)[:, 2:5])
    assert (mined.indices[:, 3:] == -1).all()


def test_a_checkpoint_of_other_documents_is_refused(tmp_path):
    query, corpus, ids = drawn("chunks")
    options = {"metric": "dot", "checkpoint": tmp_path / "mined"}
    first = mine_hard_negatives(query, corpus, None, 3, documents=ids, **options)
    again = mine_hard_negatives(query, corpus, None, 3, documents=ids, **options)
    assert torch.equal(first.indices, again.indices)
    with pytest.raises(ValueError, match="mine_hard_negatives: state must be of the same problem"):
        mine_hard_negatives(query, corpus, None, 3, documents=ids + 100, **options)
    with pytest.raises(ValueError, match=re.escape("mine_hard_negatives: documents must have shape (60,), got (59,)")):
        mine_hard_negatives(query, corpus, None, 3, documents=ids[1:])
    with pytest.raises(ValueError, match="mine_hard_negatives: documents must not be -1"):
        mine_hard_negatives(query, corpus, None, 3, documents=torch.full_like(ids, -1))


def test_negatives_by_several_teachers():
    """As the docstring of mine_hard_negatives says them."""
    query, corpus, ids = drawn("chunks")
    others, positives = (torch.randn(N, 6), torch.randn(M, 6)), torch.randint(M, (N,))
    second, own = others[0] @ others[1].T, ids[positives][:, None] == ids
    scores = (2 * query @ corpus.T + second).masked_fill((second > 1.0) | own, -torch.inf)
    sides = torch.cat([2 * query, others[0]], 1), torch.cat([corpus, others[1]], 1)
    pairs = Pairs(guide=Guide(*others, below=1.0))
    mined = mine_hard_negatives(*sides, positives, M, metric="dot", pairs=pairs, documents=ids)
    assert torch.equal(mined.indices, best(scores, ids, M))
