"""The memory bank against a list that is kept entry by entry; the refresh schedule; which lists survive a drift."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contrastive_ops import Pairs, info_nce, similarity_topk
from contrastive_ops.losses import moco
from contrastive_ops.mining.bank import MemoryBank
from contrastive_ops.mining.refresh import RefreshSchedule, still_exact
from contrastive_ops.ops import TopK
from contrastive_ops.testing.compare import check, leaf

FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def numbered(first, count, dim=3):
    """Rows that say which they are."""
    return (torch.arange(count, dtype=torch.float32) + first)[:, None].expand(count, dim)


# ---- The ring ------------------------------------------------------------------------------------------------------


@FUZZ
@given(capacity=st.integers(1, 7), sizes=st.lists(st.integers(0, 17), max_size=8))
def test_enqueue_is_one_row_after_the_other(capacity, sizes):
    bank, slots, pointer, total = MemoryBank(capacity, 2), {}, 0, 0
    for step, size in enumerate(sizes, 1):
        ids, labels = torch.arange(size) + total, torch.arange(size) % 2
        bank.enqueue(numbered(total, size, 2), *((ids, labels) if step % 3 else (None, None)))
        for row in range(size):
            slots[pointer] = (total + row, *((total + row, row % 2) if step % 3 else (-1, -1)), step)
            pointer = (pointer + 1) % capacity
        total += size
        expected = [slots[slot] for slot in sorted(slots)]
        entries = bank.entries()
        assert len(bank) == len(expected) and int(bank.pointer) == pointer and int(bank.step) == step
        got = zip(entries.rows[:, 0].tolist(), entries.ids.tolist(), entries.labels.tolist(), strict=True)
        assert [*got] == [each[:3] for each in expected]
        assert entries.ages.tolist() == bank.ages.tolist() == [step - each[3] for each in expected]


def test_rows_that_do_not_fit_at_the_end_go_to_the_begin():
    """lightly's memory bank dropped the rows beyond its end, and started the next batch at 0."""
    bank = MemoryBank(5, 3)
    bank.enqueue(numbered(0, 4))
    bank.enqueue(numbered(4, 3))
    assert bank.rows[:, 0].tolist() == [5, 6, 2, 3, 4] and int(bank.pointer) == 2
    bank.enqueue(numbered(7, 2))
    assert bank.rows[:, 0].tolist() == [5, 6, 7, 8, 4]
    assert bank.ages.tolist() == [1, 1, 0, 0, 1]


def test_a_batch_larger_than_the_bank_keeps_its_last_rows():
    bank = MemoryBank(4, 3)
    bank.enqueue(numbered(0, 1))
    bank.enqueue(numbered(10, 11), torch.arange(11), torch.arange(11) + 100)
    assert sorted(bank.rows[:, 0].tolist()) == [17, 18, 19, 20]
    assert torch.equal(bank.ids + 10, bank.rows[:, 0].long()) and torch.equal(bank.labels, bank.ids + 100)
    bank.enqueue(numbered(30, 1))
    assert sorted(bank.rows[:, 0].tolist()) == [18, 19, 20, 30]  # the oldest is replaced


def test_rows_are_detached_and_rounded():
    bank, rows = MemoryBank(4, 3, dtype=torch.bfloat16), torch.randn(2, 3, requires_grad=True)
    bank.enqueue(rows)
    stored = bank.entries().rows
    assert torch.equal(stored, rows.detach().bfloat16()) and not stored.requires_grad
    with torch.no_grad():
        rows.zero_()
    assert stored.abs().sum() > 0
    assert not [*bank.parameters()]


@pytest.mark.parametrize("again", ["state", "pickle", "copy"])
def test_a_run_that_is_resumed_goes_on_alike(again):
    bank = MemoryBank(5, 3)
    bank.enqueue(numbered(0, 4), torch.arange(4))
    bank.enqueue(numbered(4, 3), torch.arange(3))
    if again == "state":
        other = MemoryBank(5, 3)
        other.load_state_dict(bank.state_dict())
    else:
        other = pickle.loads(pickle.dumps(bank)) if again == "pickle" else copy.deepcopy(bank)
    for each in (bank, other):
        each.enqueue(numbered(7, 2), labels=torch.arange(2))
    assert set(bank.state_dict()) == {"rows", "ids", "labels", "born", "pointer", "filled", "step"}
    for name, buffer in bank.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name]), name


def test_the_module_moves_with_its_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), MemoryBank(5, 3)).to(torch.bfloat16)
    bank = model[1]
    assert bank.rows.dtype == torch.bfloat16 and bank.ids.dtype == bank.pointer.dtype == torch.int64
    bank.enqueue(torch.randn(2, 3))
    assert "filled=2" in repr(bank) and "bfloat16" in repr(bank)
    assert {each.device.type for each in bank.to("meta").state_dict().values()} == {"meta"}


def test_clear():
    bank, new = MemoryBank(5, 3), MemoryBank(5, 3)
    bank.enqueue(numbered(0, 4), torch.arange(4), torch.arange(4))
    bank.clear()
    assert len(bank) == 0 and bank.entries().rows.shape == (0, 3)
    for name, buffer in new.state_dict().items():
        assert torch.equal(buffer, bank.state_dict()[name]), name


# ---- Entries -------------------------------------------------------------------------------------------------------


def test_entries_are_views():
    bank = MemoryBank(6, 3)
    for first in range(0, 8, 2):  # the fourth batch is at the begin
        bank.enqueue(numbered(first, 2))
    for max_age, slots in ((None, slice(0, 6)), (9, slice(0, 6)), (0, slice(0, 2))):
        entries = bank.entries(max_age)
        assert entries.rows.data_ptr() == bank.rows[slots].data_ptr()
        assert torch.equal(entries.rows, bank.rows[slots]) and torch.equal(entries.ages, bank.ages[slots])
    split = bank.entries(1)
    assert split.rows[:, 0].tolist() == [6, 7, 4, 5] and split.ages.tolist() == [0, 0, 1, 1]
    bank.enqueue(numbered(0, 0))
    assert bank.entries(0).rows.shape == (0, 3) and bank.entries(1).ages.tolist() == [1, 1]


def test_entries_are_the_queue_of_moco_and_the_negatives_of_info_nce(backend):
    bank = MemoryBank(8, 4, dtype=torch.float64)
    seen = []
    for step in range(3):
        query, key, ids = leaf(5, 4), leaf(5, 4), torch.arange(5) + 4 * step
        queue = bank.entries()
        value = moco(query, key, queue.rows, labels=ids, queue_labels=queue.ids, backend=backend)
        kept = seen[-8:]
        theirs = torch.stack([row for row, _ in kept]) if kept else key[:0]
        their_ids = torch.tensor([number for _, number in kept], dtype=torch.int64)
        check(value, moco(query, key, theirs, labels=ids, queue_labels=their_ids, backend=backend), [query, key])
        more = info_nce(query, key, bank.entries().rows, normalize=True, backend=backend)
        check(more, info_nce(query, key, theirs, normalize=True, backend=backend), [query, key])
        bank.enqueue(key, ids)
        seen += [*zip(key.detach(), ids.tolist(), strict=True)]


def test_training_steps_may_be_compiled_around_it():
    bank = MemoryBank(16, 4)
    bank.enqueue(torch.randn(16, 4))
    compiled = torch.compile(lambda query, key, queue: moco(query, key, queue), fullgraph=True, backend="eager")
    for _ in range(3):
        query, key = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
        queue = bank.entries().rows
        value, expected = compiled(query, key, queue), moco(query, key, queue)
        check(value, expected, [query], 1e-5)
        bank.enqueue(key)
    assert len(bank) == 16 and torch.equal(bank.rows[10:15], key)


# ---- Mining --------------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
def test_topk_is_that_of_the_entries_to_keep(backend, data):
    """Small integers: exact in any order, with many ties."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    bank = MemoryBank(draw(st.integers(1, 20)), 4)
    for size in draw(st.lists(st.integers(0, 12), max_size=4)):
        numbers = torch.randint(-1, 4, (2, size))
        bank.enqueue(torch.randint(-2, 3, (size, 4)).float(), numbers[0], numbers[1])
    count, n, k = len(bank), draw(st.integers(1, 6)), draw(st.integers(1, 8))
    query = torch.randint(-2, 3, (n, 4)).float()
    keep = torch.ones(n, count, dtype=torch.bool)
    options, rules = {}, {}
    for name, stored in (("ids", bank.ids), ("labels", bank.labels)):
        if draw(st.booleans()):
            options[name] = torch.randint(-1, 4, (n,))
            keep &= (options[name][:, None] != stored[:count]) | (options[name][:, None] < 0)
    if draw(st.booleans()):
        options["max_age"] = draw(st.integers(0, 3))
        keep &= bank.ages <= options["max_age"]
    if draw(st.booleans()):
        rules["differ"] = torch.randint(-1, 3, (n,)), torch.randint(-1, 3, (count,))
        keep &= (rules["differ"][0][:, None] != rules["differ"][1]) | (rules["differ"][0][:, None] < 0)
    if draw(st.booleans()):
        dropped = torch.rand(n, count) < 0.3
        rules["exclude"] = F.pad(dropped.sum(1).cumsum(0), (1, 0)), dropped.nonzero()[:, 1].flip(0)
        row = torch.repeat_interleave(dropped.sum(1))
        keep[row, rules["exclude"][1]] = False
    top = bank.topk(query, k, metric="dot", pairs=Pairs(**rules) if rules else None, backend=backend, **options)
    scores = (query @ bank.rows[:count].T).masked_fill(~keep, -torch.inf)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    order = order.masked_fill(values == -torch.inf, -1)
    fill = max(0, k - count)
    assert torch.equal(top.indices, F.pad(order, (0, fill), value=-1)[:, :k])
    assert torch.equal(top.values, F.pad(values, (0, fill), value=-torch.inf)[:, :k])
    assert torch.equal(top.counts, keep.sum(1).clamp_max(k))


@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
def test_topk_is_differentiable_in_the_query(backend, metric):
    bank, query = MemoryBank(20, 4, dtype=torch.float64), leaf(3, 4)
    bank.enqueue(torch.randn(20, 4))
    top = bank.topk(query, 5, metric=metric, backend=backend)
    expected = similarity_topk(query, bank.rows, 5, metric=metric, backend=backend)
    assert torch.equal(top.indices, expected.indices)
    check(top.values, expected.values, [query])
    if metric == "cosine":
        cosines = F.normalize(query) @ F.normalize(bank.rows).T
        torch.testing.assert_close(top.values, cosines.sort(dim=1, descending=True).values[:, :5])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e39])
def test_rows_that_are_not_finite_are_not_stored(value):
    bank, truth, number = MemoryBank(6, 3), MemoryBank(6, 3), 0
    for size in (5, 1, 4, 0, 9, 2):
        rows = torch.rand(size, 3, dtype=torch.float64)
        good = torch.rand(size) < 0.6
        rows[~good, 1] = value
        ids = number + torch.arange(size)
        bank.enqueue(rows, ids, ids + 1)
        truth.enqueue(rows[good], ids[good], ids[good] + 1)
        number += size
        for name, stored in truth.state_dict().items():
            assert torch.equal(bank.state_dict()[name], stored), name


def test_topk_follows_autocast(backend):
    bank, query = MemoryBank(6, 8), torch.randn(3, 8).bfloat16()
    bank.enqueue(torch.randn(6, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bank.topk(query, 2, metric="dot", backend=backend)
    expected = similarity_topk(query, bank.rows.bfloat16(), 2, backend=backend)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


# ---- When to mine again --------------------------------------------------------------------------------------------


def test_a_refresh_is_due_at_start_and_then_every_so_many_steps():
    schedule, due = RefreshSchedule(10, start=5), []
    for step in range(40):
        if schedule.due(step):
            due.append(step)
            schedule.done(step)
    assert due == [5, 15, 25, 35]


def test_a_refresh_stays_due_until_it_is_done():
    schedule = RefreshSchedule(10)
    schedule.done(0)
    assert not schedule.due(9)
    assert schedule.due(13) and schedule.due(29)  # nobody looked at step 10
    schedule.done(34)  # mining took a while; what was due meanwhile is done too
    assert not schedule.due(39) and schedule.due(40)
    with pytest.raises(ValueError, match="^RefreshSchedule.done: step must be one at which a refresh is due, got 34"):
        schedule.done(34)


@given(count=st.integers(0, 50), parts=st.integers(1, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_parts_cover_every_row_once(count, parts):
    schedule, rows = RefreshSchedule(3, parts=parts), torch.arange(count)
    for _ in range(2):
        taken = []
        for _ in range(parts):
            taken.append(rows[schedule.rows(count)])
            schedule.done(schedule.state_dict()["next"])
        assert torch.equal(torch.cat(taken), rows)
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_a_schedule_is_resumed():
    schedule, other = RefreshSchedule(10, start=2, parts=3), RefreshSchedule(10, start=2, parts=3)
    schedule.done(2)
    other.load_state_dict(schedule.state_dict())
    for each in (schedule, other):
        assert not each.due(11) and each.due(12) and each.rows(30) == slice(10, 20)
    assert repr(other) == repr(schedule) == "RefreshSchedule(every=10, start=2, parts=3): part 1 at step 12"
    with pytest.raises(ValueError, match=r"load_state_dict: state must be one of a schedule with parts=2, got dict"):
        RefreshSchedule(10, parts=2).load_state_dict(schedule.state_dict())


# ---- Which lists survive a drift -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 4])
def test_lists_that_are_still_exact_are(backend, dtype, k):
    exact = changed = 0
    for seed, drift in enumerate((1e-4, 1e-3, 5e-3, 2e-2)):
        torch.manual_seed(seed)
        corpus, query = F.normalize(torch.randn(60, 6)).to(dtype), torch.randn(50, 6).to(dtype)
        top = similarity_topk(query, corpus, k + 1, backend=backend)
        new_query = query + drift * torch.rand(50, 1).to(dtype) * F.normalize(torch.randn(50, 6)).to(dtype)
        shift = drift / 3 * F.normalize(torch.randn(60, 6)).to(dtype)
        new = similarity_topk(new_query, corpus + shift, k, backend=backend)
        bounds = {"corpus_shift": 1.001 * drift / 3, "corpus_length": 1.001}
        still = still_exact(top, query, new_query, **bounds)
        same = (top.indices[:, :k].sort(1).values == new.indices.sort(1).values).all(1)
        assert same[still].all()
        exact, changed = exact + int(still.sum()), changed + int((~same).sum())
    assert exact > 60 and changed > 0  # neither is asked of nobody


def test_the_bound_of_still_exact_is_attained():
    """Two documents at scores 1 and 0.5: one more step towards the second, and the list is another."""
    corpus, query = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    top = similarity_topk(query, corpus, 2)
    for drift, expected in ((0.17, True), (0.18, False)):
        new_query = query + drift * torch.tensor([[-1.0, 1.0]], dtype=torch.float64)  # sqrt(2) * drift long
        assert still_exact(top, query, new_query).tolist() == [expected]
    assert still_exact(top, query, query, corpus_shift=0.22).tolist() == [True]
    assert still_exact(top, query, query, corpus_shift=0.23).tolist() == [False]


def test_a_list_that_was_not_full_stays(backend):
    query, corpus = torch.randn(3, 4), torch.randn(3, 4)
    top = similarity_topk(query, corpus, 4, backend=backend)
    assert still_exact(top, query, query + 100.0, corpus_length=100.0).all()
    assert not still_exact(top, query, query + torch.nan, corpus_length=100.0).any()


# ---- Bad input -----------------------------------------------------------------------------------------------------


def bank(*rows):
    made = MemoryBank(6, 3)
    for each in rows:
        made.enqueue(each)
    return made


X = torch.randn(4, 3)
TOP = TopK(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64), torch.full((4,), 2))
BAD = [
    (lambda: MemoryBank(0, 3), ValueError, "MemoryBank: capacity must be at least 1, got 0"),
    (lambda: MemoryBank(3, 2.0), TypeError, "MemoryBank: dim must be an int, got float"),
    (lambda: MemoryBank(3, 2, dtype=torch.int8), ValueError, "MemoryBank: dtype must be one of torch.float32, "),
    (lambda: bank().enqueue(X[0]), ValueError, "MemoryBank.enqueue: rows must have two dimensions (rows, D), got (3,)"),
    (
        lambda: bank().enqueue(X[:, :2]),
        ValueError,
        "MemoryBank.enqueue: rows must have the bank's dimension 3, got (4, 2)",
    ),
    (lambda: bank().enqueue(X.long()), TypeError, "MemoryBank.enqueue: rows must be float32, float64, bfloat16 or"),
    (
        lambda: bank().enqueue(X.to("meta")),
        ValueError,
        "MemoryBank.enqueue: rows must be on the same device as the bank, got the bank on cpu and rows on meta",
    ),
    (
        lambda: bank().enqueue(X, torch.arange(3)),
        ValueError,
        "MemoryBank.enqueue: ids must have shape (4,), got (3,)",
    ),
    (
        lambda: bank().enqueue(X, labels=torch.ones(4)),
        TypeError,
        "MemoryBank.enqueue: labels must be int64, got torch.float32",
    ),
    (lambda: bank(X).entries(-1), ValueError, "MemoryBank: max_age must be at least 0, got -1"),
    (lambda: bank(X).topk(X, 2, max_age=1.5), TypeError, "MemoryBank: max_age must be an int, got float"),
    (
        lambda: bank(X).topk(X[:, :2], 2),
        ValueError,
        "MemoryBank.topk: bank must have the same last dimension as query, got query (4, 2) and bank (4, 3)",
    ),
    (
        lambda: bank(X).topk(X.bfloat16(), 2),
        TypeError,
        "MemoryBank.topk: bank must have the same dtype as query, got query torch.bfloat16 and bank torch.float32",
    ),
    (
        lambda: bank(X).topk(X, 2, ids=torch.arange(3)),
        ValueError,
        "MemoryBank.topk: ids must have shape (4,), got (3,)",
    ),
    (
        lambda: bank(X).topk(X, 2, ids=IDS, labels=IDS, pairs=Pairs(exclude=(IDS, IDS))),
        ValueError,
        "MemoryBank.topk: exclude indptr must have shape (5,), got (4,)",
    ),
    (lambda: RefreshSchedule(0), ValueError, "RefreshSchedule: every must be at least 1, got 0"),
    (lambda: RefreshSchedule(2, start=-1), ValueError, "RefreshSchedule: start must be at least 0, got -1"),
    (lambda: RefreshSchedule(2, parts=1.5), TypeError, "RefreshSchedule: parts must be an int, got float"),
    (lambda: RefreshSchedule(2).due("1"), TypeError, "RefreshSchedule: step must be an int, got str"),
    (
        lambda: still_exact(TOP, X, X[:3]),
        ValueError,
        "still_exact: new_query must have the same shape as query, got query (4, 3) and new_query (3, 3)",
    ),
    (
        lambda: still_exact(TopK(TOP.values[:, :1], TOP.indices, TOP.counts), X, X),
        ValueError,
        "still_exact: top must have values of shape (4, k + 1) with k >= 1, got (4, 1)",
    ),
    (
        lambda: still_exact(TOP, X, X, corpus_shift=-1.0),
        ValueError,
        "still_exact: corpus_shift must be in [0, inf), got -1.0",
    ),
    (lambda: still_exact(TOP, X, X, corpus_length="1"), TypeError, "still_exact: corpus_length must be a number, got"),
]
IDS = torch.arange(4)


@pytest.mark.parametrize("call,error,message", BAD, ids=[m[:60] for *_, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
