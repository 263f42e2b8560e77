"""Streaming top-k: any blocks, any order, any merges, any kind of corpus and any interruption give one result."""

import io
import os
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint as recomputed

from contrastive_ops import Pairs, similarity_topk
from contrastive_ops.mining import TopKState, search, streaming
from contrastive_ops.mining._fingerprint import fingerprint
from contrastive_ops.mining.corpus import Corpus, as_corpus, read_ahead
from contrastive_ops.mining.state import missing
from contrastive_ops.ops import Guide
from contrastive_ops.testing import dense_keep, reset_peak, resident_bytes

FUZZ = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def integers(*shape, most=2):
    """Inner products are exact in any order, and many are equal."""
    return torch.randint(-most, most + 1, shape).float()


def lists(rows, columns, each=3):
    """Repeated and unsorted columns."""
    lengths = torch.randint(0, each + 1, (rows,))
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return indptr, torch.randint(0, columns, (int(indptr[-1]),))


def ids(count):
    return torch.randint(-1, 4, (count,))


RULES = {
    "none": lambda n, m: None,
    "diagonal": lambda n, m: Pairs(diagonal=2),
    "exclude": lambda n, m: Pairs(exclude=lists(n, m)),
    "differ": lambda n, m: Pairs(differ=(ids(n), ids(m))),
    "same": lambda n, m: Pairs(same=(ids(n), ids(m))),
    "bounds": lambda n, m: Pairs(below=(integers(n, most=9), integers(1, m, most=9)), above=integers(n, 1, most=9) - 6),
    "column bounds": lambda n, m: Pairs(below=9.0, above=integers(1, m, most=9) - 4),
    "guide": lambda n, m: Pairs(guide=Guide(integers(n, 3), integers(m, 3), integers(1, m))),
    "log_weight": lambda n, m: Pairs(log_weight=(integers(4, 4), ids(n), ids(m))),
    "all": lambda n, m: Pairs(
        diagonal=-1,
        exclude=lists(n, m),
        differ=(ids(n), ids(m)),
        below=(12.0, integers(n, most=9) + 6, integers(1, m, most=9) + 6),
        guide=Guide(integers(n, 3), integers(m, 3), 3.0),
    ),
}


def squared_distances(query, corpus):
    return (query[:, None] - corpus).square().sum(2)


def similarities(query, corpus, metric):
    if metric == "sqeuclidean":  # some rows at a time: the fuzzer has a thousand of each
        parts = query.split(max(1, 2**23 // max(corpus.numel(), 1)))
        return -torch.cat([recomputed(squared_distances, part, corpus, use_reentrant=False) for part in parts])
    return query @ corpus.T


def dense(query, corpus, k, pairs=None, metric="dot"):
    """(values, indices, counts) by a stable sort."""
    scores = similarities(query.double(), corpus.double(), metric)
    # A matrix and the identity have the similarities as inner products, which is what the bounds are about.
    keep = dense_keep(pairs, scores, torch.eye(len(corpus), dtype=torch.float64))
    if pairs is not None and pairs.log_weight is not None:
        table, row, column = pairs.log_weight
        weight = table.double()[row.clamp_min(0)][:, column.clamp_min(0)]
        scores = scores + weight.masked_fill((row < 0)[:, None] | (column < 0), 0.0)
    scores = torch.cat([scores.masked_fill(~keep, -torch.inf), scores.new_full((len(query), k), -torch.inf)], 1)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k].to(query.dtype), indices[:, :k]
    indices = indices.masked_fill(values == -torch.inf, -1)
    return values, indices, (indices >= 0).sum(1)


def check_same(found, expected):
    for got, want in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(got, want)


def cut(draw, columns):
    """The ranges of a random partition, some of them empty."""
    ends = sorted(draw(st.lists(st.integers(0, columns), max_size=6)))
    return list(zip([0, *ends], [*ends, columns], strict=True))


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("rule", RULES)
def test_any_partition_any_order_any_merges(backend, rule, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, m, depth, k = (draw(st.integers(1, most)) for most in (7, 40, 4, 50))
    metric = draw(st.sampled_from(["dot", "sqeuclidean"]))
    query, corpus = integers(n, depth), integers(m, depth)
    if draw(st.booleans()):
        corpus[m // 2 :] = corpus[: m - m // 2].clone()
    pairs = RULES[rule](n, m)
    options = {"metric": metric, "pairs": pairs, "rows": m, "backend": backend}
    blocks = draw(st.permutations(cut(draw, m)))
    states = []
    for begin, end in blocks:
        if not states or draw(st.booleans()):
            states.append(TopKState(query, k, **options))
        draw(st.sampled_from(states)).update(corpus[begin:end], begin)
    while len(states) > 1:
        into = states.pop(draw(st.integers(0, len(states) - 1)))
        other = states.pop(draw(st.integers(0, len(states) - 1)))
        states.append(into.merge(other))
    (state,) = states
    expected = dense(query, corpus, k, pairs, metric)
    check_same(state.finalize(), expected)
    check_same(similarity_topk(query, corpus, k, metric=metric, pairs=pairs, backend=backend), expected)
    assert state.covered == [(0, m)]


@pytest.mark.parametrize("size", [2.0**-60, 1.0, 2.0**60])
@pytest.mark.parametrize("order", ["rising", "falling", "mixed", "between"])
def test_ties_go_to_the_smaller_index_whatever_comes_first(backend, order, size):
    """All scores are equal: a block with smaller indices must displace those that were kept, however large they are."""
    query, corpus = torch.full((3, 4), size), torch.ones(30, 4)
    begins = {"rising": (0, 10, 20), "falling": (20, 10, 0), "mixed": (10, 20, 0), "between": (0, 20, 10)}[order]
    state = TopKState(query, 15, backend=backend)
    for begin in begins:
        state.update(corpus[begin : begin + 10], begin)
    assert torch.equal(state.finalize().indices, torch.arange(15).expand(3, 15))


def test_equal_scores_that_are_infinite_or_zero(backend):
    corpus = torch.tensor([[torch.inf], [0.0], [-0.0], [torch.inf], [-torch.inf], [torch.nan], [1.0]])
    for begins in (range(7), reversed(range(7))):
        state = TopKState(torch.ones(1, 1), 7, backend=backend)
        for begin in begins:
            state.update(corpus[begin : begin + 1], begin)
        top = state.finalize()
        assert top.indices.tolist() == [[0, 3, 6, 1, 2, -1, -1]] and int(top.counts) == 5


def test_all_columns_excluded(backend):
    query, corpus = integers(3, 4), integers(20, 4)
    every = (torch.arange(4) * 20, torch.arange(20).repeat(3))
    for pairs in (Pairs(exclude=every), Pairs(below=-1e9), Pairs(same=(torch.full((3,), -1), torch.arange(20)))):
        top = search(query, corpus, 5, pairs=pairs, block_rows=6, backend=backend)
        assert torch.equal(top.indices, torch.full((3, 5), -1)) and bool((top.values == -torch.inf).all())
        assert torch.equal(top.counts, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", ["dot", "cosine", "sqeuclidean"])
def test_every_metric_in_every_dtype(backend, metric, dtype):
    """Signs times powers of 2, of which 16 have a length without rounding."""
    query, signs = (torch.randint(0, 2, (n, 16)) * 2.0 - 1 for n in (5, 70))
    corpus = signs * 2.0 ** torch.randint(-2, 3, (70, 1))
    found = search(query.to(dtype), corpus.to(dtype), 9, metric=metric, block_rows=16, backend=backend)
    unit = (query / 4, signs / 4) if metric == "cosine" else (query, corpus)
    values, indices, counts = dense(*unit, 9, metric=metric)
    check_same(found, (values.to(torch.float64 if dtype == torch.float64 else torch.float32), indices, counts))


def test_finalize_may_be_called_on_the_way(backend):
    query, corpus = integers(4, 3), integers(30, 3)
    state = TopKState(query, 6, backend=backend)
    check_same(state.finalize(), dense(query, corpus[:0], 6))
    for begin in (0, 10, 20):
        state.update(corpus[begin : begin + 10], begin)
        for _ in range(2):
            check_same(state.finalize(), dense(query, corpus[: begin + 10], 6))


def test_no_queries_and_no_rows(backend):
    assert search(torch.ones(0, 3), torch.ones(9, 3), 2, backend=backend).values.shape == (0, 2)
    assert search(torch.ones(2, 3), torch.ones(0, 3), 2, backend=backend).indices.tolist() == [[-1, -1]] * 2
    assert search(torch.ones(2, 3), [], 2, backend=backend).indices.tolist() == [[-1, -1]] * 2


def test_no_gradients_and_no_autocast(backend):
    query, corpus = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    plain = search(query, corpus, 5, metric="sqeuclidean", block_rows=7, backend=backend)
    assert not plain.values.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_same(search(query, corpus, 5, metric="sqeuclidean", block_rows=7, backend=backend), plain)


@pytest.mark.parametrize("rule", ["none", "all"])
def test_statistics_are_those_of_the_whole_corpus(backend, rule):
    query, corpus = integers(5, 4), integers(33, 4)
    pairs = RULES[rule](5, 33)
    above = integers(5)
    states = [TopKState(query, 3, pairs=pairs, count_above=above, backend=backend) for _ in range(2)]
    for turn, begin in enumerate((22, 0, 11)):
        states[turn % 2].update(corpus[begin : begin + 11], begin)
    counted = states[0].merge(states[1]).statistics
    assert torch.equal(counted["eligible"], dense_keep(pairs, query, corpus).sum(1))
    assert torch.equal(counted["higher"], (query @ corpus.T > above[:, None]).sum(1))
    for name in ("differ", "below", "guide"):
        alone = None if pairs is None else Pairs(**{name: getattr(pairs, name)})
        assert torch.equal(counted[name], (~dense_keep(alone, query, corpus)).sum(1))
    assert TopKState(query, 3).statistics == {}


def test_statistics_under_other_rules(backend):
    query, corpus = integers(5, 4), integers(33, 4)
    count_pairs = Pairs(exclude=lists(5, 33), diagonal=3)
    options = {"pairs": Pairs(below=2.0), "count_above": integers(5), "count_pairs": count_pairs}
    state = TopKState(query, 3, **options, backend=backend)
    for begin in (20, 0, 10, 30):
        state.update(corpus[begin : begin + 10], begin)
    check_same(state.finalize(), dense(query, corpus, 3, Pairs(below=2.0)))
    assert torch.equal(state.statistics["eligible"], dense_keep(count_pairs, query, corpus).sum(1))


# ---- Saved states --------------------------------------------------------------------------------------------------


def test_a_saved_state_goes_on(backend):
    query, corpus = integers(4, 3), integers(40, 3)
    pairs = RULES["all"](4, 40)
    options = {"pairs": pairs, "rows": 40, "count_above": integers(4), "backend": backend}
    whole, state = TopKState(query, 6, **options), TopKState(query, 6, **options)
    whole.update(corpus, 0)
    for begin in (30, 0, 10, 20):
        state.update(corpus[begin : begin + 10], begin)
        file = io.BytesIO()
        torch.save(state.state_dict(), file)
        file.seek(0)
        state = TopKState(query, 6, **options)
        state.load_state_dict(torch.load(file, weights_only=True))
        with pytest.raises(ValueError, match="came twice"):
            state.update(corpus[begin : begin + 1], begin)
    check_same(state.finalize(), whole.finalize())
    assert all(torch.equal(state.statistics[name], each) for name, each in whole.statistics.items())


QUERY = integers(3, 4)
OTHERS = {
    "queries": lambda: TopKState(QUERY[:2], 5),
    "depth": lambda: TopKState(QUERY[:, :3], 5),
    "dtype": lambda: TopKState(QUERY.double(), 5),
    "k": lambda: TopKState(QUERY, 4),
    "metric": lambda: TopKState(QUERY, 5, metric="cosine"),
    "corpus rows": lambda: TopKState(QUERY, 5, rows=9),
    "query": lambda: TopKState(QUERY + 1, 5),
    "rules": lambda: TopKState(QUERY, 5, pairs=Pairs(exclude=(torch.tensor([0, 1, 1, 1]), torch.tensor([2])))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_problem_is_refused(name):
    saved = TopKState(QUERY, 5).state_dict()
    with pytest.raises(ValueError, match=f"got one that differs in .*{name}: "):
        OTHERS[name]().load_state_dict(saved)


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("corpus rows", "rules")])
def test_states_of_different_problems_do_not_merge(name):
    with pytest.raises(ValueError, match="both states must"):
        TopKState(QUERY, 5).merge(OTHERS[name]())


def test_merge_takes_over_the_declared_rows():
    state = TopKState(QUERY, 5).merge(TopKState(QUERY.clone(), 5, rows=9))
    with pytest.raises(ValueError, match="rows 0 to 9 are missing"):
        state.finalize()
    past = TopKState(QUERY, 5)
    past.update(integers(4, 4), 6)
    with pytest.raises(ValueError, match="block must be of the 9 rows"):
        state.merge(past)
    with pytest.raises(ValueError, match="same rows, got 9 and 8"):
        state.merge(TopKState(QUERY, 5, rows=8))


# ---- Kinds of corpora ----------------------------------------------------------------------------------------------


class Slices:
    """What safe_open(...).get_slice(name) returns; counts what is read."""

    def __init__(self, rows, name="F32"):
        self.rows, self.name, self.read = rows, name, 0

    def get_shape(self):
        return list(self.rows.shape)

    def get_dtype(self):
        return self.name

    def __getitem__(self, part):
        found = self.rows[part]
        self.read += len(found)
        return found


def mapped(path, rows, mode="r", **options):
    """A memmap of a file with these rows."""
    array = np.memmap(path, dtype=np.float32, mode="w+", shape=tuple(rows.shape), **options)
    array[:] = rows.numpy()
    array.flush()
    return array if mode == "w+" else np.memmap(path, dtype=np.float32, mode=mode, shape=tuple(rows.shape), **options)


KINDS = {
    "tensor": lambda rows, path: rows,
    "strided": lambda rows, path: rows.T.contiguous().T,
    "numpy": lambda rows, path: rows.numpy(),
    "read-only numpy": lambda rows, path: np.frombuffer(rows.numpy().tobytes(), np.float32).reshape(rows.shape),
    "turned numpy": lambda rows, path: rows.flip(0).numpy()[::-1],
    "memmap": lambda rows, path: mapped(path, rows),
    "memmap w+": lambda rows, path: mapped(path, rows, "w+"),
    "memmap c": lambda rows, path: mapped(path, rows, "c"),
    "memmap behind a header": lambda rows, path: mapped(path, rows, offset=20),
    "part of a memmap": lambda rows, path: mapped(path, torch.cat([rows[:5] * 0, rows]))[5:],
    "slices of tensors": lambda rows, path: Slices(rows),
    "slices of arrays": lambda rows, path: Slices(rows.numpy()),
    "slices of a memmap": lambda rows, path: Slices(mapped(path, rows)),
    "corpus": lambda rows, path: Corpus(rows.numpy()),
    "generator": lambda rows, path: (block for block in rows.split(7)),
    "arrays": lambda rows, path: [block.numpy() for block in rows.split(7)],
    "shards": lambda rows, path: [mapped(path, rows[:20]), rows[20:].numpy()],
    "numbered": lambda rows, path: [(begin, rows[begin : begin + 7]) for begin in range(42, -1, -7)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_corpus(backend, tmp_path, kind):
    query, rows = integers(4, 3), integers(47, 3)
    pairs = RULES["all"](4, 47)
    corpus = KINDS[kind](rows, str(tmp_path / "rows"))
    check_same(search(query, corpus, 6, pairs=pairs, block_rows=10, backend=backend), dense(query, rows, 6, pairs))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("generator", "arrays", "shards", "numbered")])
def test_rows_are_taken_by_index(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("contrastive_ops.mining.corpus.SLAB_BYTES", 60)
    rows = torch.randn(47, 3)
    corpus = as_corpus("search", KINDS[kind](rows, str(tmp_path / "rows")), rows)
    for index in (torch.randint(0, 47, (5, 4)), torch.arange(47).flip(0), torch.tensor(46), torch.zeros(0, 2).long()):
        assert torch.equal(corpus.take(index), rows[index])
    assert (corpus.rows, corpus.depth, corpus.dtype) == (47, 3, torch.float32)
    begins, blocks = zip(*corpus.blocks(20), strict=True)
    assert begins == (0, 20, 40) and torch.equal(torch.cat(blocks), rows)
    with pytest.raises(ValueError, match=r"index of corpus rows must be in \[0, 47\), got 47"):
        corpus.take(torch.tensor([47]))


@pytest.mark.parametrize("kind", ["numpy", "memmap", "memmap w+", "slices of tensors", "slices of a memmap"])
def test_blocks_are_copies(tmp_path, kind):
    rows = integers(20, 3)
    corpus = Corpus(KINDS[kind](rows, str(tmp_path / "rows")))
    corpus.block(0, 20).fill_(9.0)
    assert torch.equal(corpus.block(0, 20), rows)


def test_what_was_written_to_a_map_is_not_lost(tmp_path):
    """Pages leave the resident set after each block, also changed ones."""
    for mode in ("w+", "c"):
        array = mapped(str(tmp_path / "rows"), torch.zeros(5000, 3), mode)
        array[:] = 7
        assert bool((Corpus(array).block(0, 5000) == 7).all()) and bool((np.asarray(array) == 7).all())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from /proc")
def test_a_mapped_corpus_does_not_stay_resident(tmp_path):
    path, shape = str(tmp_path / "rows"), (1 << 21, 16)
    with open(path, "wb") as file:
        file.truncate(4 * shape[0] * shape[1])
    corpus = np.memmap(path, dtype=np.float32, mode="r", shape=shape)
    query = torch.randn(2, 16)
    search(query, corpus[:1000], 3, block_rows=1000)
    before = reset_peak()
    search(query, corpus, 3, block_rows=1 << 15)
    assert resident_bytes("VmHWM") - before < 64 << 20  # the file has 128 MiB, a block 2


def test_a_file_that_was_cut_short(tmp_path):
    path = str(tmp_path / "rows")
    corpus = mapped(path, integers(1000, 3))
    os.truncate(path, 8000)
    expected = f"^search: corpus must be a file of at least 12000 bytes as its shape says, got 8000: {re.escape(path)}"
    with pytest.raises(ValueError, match=expected):
        search(torch.ones(1, 3), corpus, 2)


def test_an_object_with_fewer_rows_than_its_shape_says():
    short = Slices(integers(20, 3))
    short.get_shape = lambda: [25, 3]
    with pytest.raises(ValueError, match=r"corpus must have \(25, 3\) numbers as its shape says, got \(0, 3\) for the"):
        search(torch.ones(1, 3), short, 2, block_rows=10, progress=lambda done, rows: None)


def test_an_iterable_that_ends_before_the_rules(backend):
    pairs = Pairs(differ=(ids(3), ids(30)))
    with pytest.raises(ValueError, match="search: all 30 rows .* rows 20 to 30 are missing"):
        search(QUERY, integers(20, 4).split(10), 2, pairs=pairs, backend=backend)
    with pytest.raises(ValueError, match="search: block must be of the 30 rows .*, got rows 30 to 40"):
        search(QUERY, integers(40, 4).split(10), 2, pairs=pairs, backend=backend)


def test_safetensors(tmp_path):
    numpy_files = pytest.importorskip("safetensors.torch")
    safetensors = pytest.importorskip("safetensors")
    rows, query = integers(30, 4).bfloat16(), QUERY.bfloat16()
    numpy_files.save_file({"rows": rows}, tmp_path / "rows.safetensors")
    with safetensors.safe_open(tmp_path / "rows.safetensors", "pt") as file:
        found = search(query, file.get_slice("rows"), 5, block_rows=8)
    check_same(found, similarity_topk(query, rows, 5))


def test_an_error_of_the_reader_arrives_and_its_thread_ends():
    def items():
        yield 1
        raise OSError("disk")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk"):
        next(ahead)
    early = read_ahead(iter(range(9)))
    next(early)
    early.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("corpus")]


# ---- Interruption --------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(blocks):
    """A progress function that ends the search after some blocks."""
    calls = []

    def progress(done, rows):
        calls.append(done)
        if len(calls) == blocks:
            raise Stopped

    return progress


@pytest.fixture
def searched(monkeypatch):
    """The ranges of corpus rows that were searched, in order."""
    ranges, update = [], TopKState.update

    def counted(self, block, base_index):
        update(self, block, base_index)
        ranges.append((base_index, base_index + len(block)))

    monkeypatch.setattr(TopKState, "update", counted)
    return ranges


@pytest.mark.parametrize("kind", ["slices", "memmap", "generator", "numbered"])
@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["written after each block", "written at the end"])
def test_interrupted_at_every_block(backend, tmp_path, monkeypatch, searched, kind, seconds):
    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", seconds)
    query, rows = integers(4, 3), integers(47, 3)
    pairs, file = RULES["all"](4, 47), tmp_path / "search.pt"
    source = Slices(rows)
    make = {
        "slices": lambda: source,
        "memmap": lambda: mapped(str(tmp_path / "rows"), rows),
        "generator": lambda: (block for block in rows.split(10)),
        "numbered": lambda: ((begin, rows[begin : begin + 10]) for begin in (20, 0, 40, 10, 30)),
    }[kind]
    options = {"pairs": pairs, "checkpoint": file, "block_rows": 10, "backend": backend}
    for _ in range(5):
        with pytest.raises(Stopped):
            search(query, make(), 6, **options, progress=stop_after(1))
    check_same(search(query, make(), 6, **options), dense(query, rows, 6, pairs))
    assert sorted(searched) == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 47)]
    # Read but not searched: one block that the second thread was ahead, the probe of the dtype, the sample.
    assert source.read <= 47 + 5 * 10 + 6 * (1 + 47)
    assert os.listdir(tmp_path) == ["search.pt"] or kind == "memmap"


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_resumed_with_other_blocks(backend, tmp_path, searched, stop):
    query, rows, file = integers(4, 3), integers(47, 3), tmp_path / "search.pt"
    with pytest.raises(Stopped):
        search(query, rows, 6, checkpoint=file, block_rows=10, progress=stop_after(stop), backend=backend)
    done = []
    found = search(
        query, rows, 6, checkpoint=file, block_rows=8, progress=lambda *now: done.append(now), backend=backend
    )
    check_same(found, dense(query, rows, 6))
    assert sum(end - begin for begin, end in searched) == 47 and done[-1] == (47, 47)
    check_same(search(query, iter(rows.split(9)), 6), found)


def test_the_last_write_survives_a_process_that_is_killed(tmp_path, monkeypatch, searched):
    """Blocks after the last write are searched again: the file is that of a moment between two blocks."""
    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
    rows, file = integers(40, 4), tmp_path / "search.pt"
    states = []
    search(QUERY, rows, 5, checkpoint=file, block_rows=10, progress=lambda *_: states.append(file.read_bytes()))
    for at, state in enumerate(states, 1):
        file.write_bytes(state)
        searched.clear()
        check_same(search(QUERY, rows, 5, checkpoint=file, block_rows=10), dense(QUERY, rows, 5))
        assert sum(end - begin for begin, end in searched) == 40 - 10 * at


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    rows, file = integers(40, 4), tmp_path / "search.pt"
    with pytest.raises(Stopped):
        search(QUERY, rows, 5, checkpoint=file, block_rows=10, progress=stop_after(1))
    before = file.read_bytes()

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        search(QUERY, rows, 5, checkpoint=file, block_rows=10)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["search.pt"]


ROWS = integers(40, 4)
PROBLEMS = {
    "queries": lambda: (QUERY[:2], ROWS, 5, {}),
    "dtype": lambda: (QUERY.double(), ROWS.double(), 5, {}),
    "k": lambda: (QUERY, ROWS, 6, {}),
    "metric": lambda: (QUERY, ROWS, 5, {"metric": "cosine"}),
    "corpus rows": lambda: (QUERY, ROWS[:30], 5, {}),
    "query": lambda: (QUERY.flip(0) + 1, ROWS, 5, {}),
    "rules": lambda: (QUERY, ROWS, 5, {"pairs": Pairs(below=1.0)}),
    "a corpus with other rows": lambda: (QUERY, ROWS + 1, 5, {}),
    "a corpus with another last row": lambda: (QUERY, torch.cat([ROWS[:-1], ROWS[-1:] + 1]), 5, {}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_checkpoint_of_another_problem_is_refused(tmp_path, name):
    file = tmp_path / "search.pt"
    search(QUERY, ROWS, 5, checkpoint=file)
    query, rows, k, options = PROBLEMS[name]()
    reason = "other rows" if name.startswith("a corpus") else f"differs in .*{name}: "
    with pytest.raises(ValueError, match=f"search: .*{reason}.*\n  delete {re.escape(str(file))}"):
        search(query, rows, k, checkpoint=file, **options)
    file.unlink()
    search(query, rows, k, checkpoint=file, **options)


def test_fingerprints_know_dtypes_and_shapes():
    """The same sixteen bytes."""
    zeros = [torch.zeros(shape) for shape in ((4,), (2, 2), (4, 1), (1, 4))]
    zeros += [torch.zeros(2, dtype=torch.float64), torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)]
    assert len({fingerprint(Pairs(below=each)) for each in zeros[:5]} | {fingerprint(each) for each in zeros}) == 12
    assert fingerprint(zeros[0], zeros[1]) != fingerprint((zeros[0],), zeros[1])


def test_a_file_that_is_no_checkpoint(tmp_path):
    file = tmp_path / "search.pt"
    for content in (b"", b"something", b"\x80"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="search: checkpoint must be a file that search wrote"):
            search(QUERY, ROWS, 5, checkpoint=file)
        assert file.read_bytes() == content
    with pytest.raises(ValueError, match="search: checkpoint must be in a folder that exists"):
        search(QUERY, ROWS, 5, checkpoint=tmp_path / "none" / "search.pt")


def test_an_iterable_shorter_than_the_checkpoint(tmp_path):
    file = tmp_path / "search.pt"
    search(QUERY, ROWS.split(10), 5, checkpoint=file)
    with pytest.raises(ValueError, match="search: corpus must have the 40 rows that the checkpoint knows, got 30"):
        search(QUERY, ROWS[:30].split(10), 5, checkpoint=file)


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    search(QUERY, ROWS, 5, block_rows=10, progress=True)
    said = capsys.readouterr()
    assert "40.0/40.0" in said.err and said.out == ""
    search(QUERY, ROWS, 5, block_rows=10)
    assert capsys.readouterr().err == ""


def test_progress_without_tqdm(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    check_same(search(QUERY, ROWS, 5, block_rows=10, progress=True), dense(QUERY, ROWS, 5))
    assert capsys.readouterr().err == ""


def test_missing():
    assert list(missing([(2, 4), (6, 9)], 0, 12)) == [(0, 2), (4, 6), (9, 12)]
    assert list(missing([(2, 4), (6, 9)], 3, 7)) == [(4, 6)]
    assert list(missing([(0, 12)], 3, 7)) == [] and list(missing([], 0, 0)) == []
    assert list(missing([(6, 9)], 0, 3)) == [(0, 3)] and list(missing([(0, 2)], 4, 6)) == [(4, 6)]


# ---- Bad input -----------------------------------------------------------------------------------------------------


def updated(*blocks, **options):
    state = TopKState(QUERY, 5, **options)
    for begin, end in blocks:
        state.update(ROWS[begin:end], begin)
    return state


CASES = [
    (lambda: TopKState(QUERY, 0), ValueError, "TopKState: k must be at least 1, got 0"),
    (lambda: TopKState(QUERY[0], 5), ValueError, "TopKState: query must have two dimensions"),
    (lambda: TopKState(QUERY, 5, rows=-1), ValueError, "TopKState: rows must be at least 0, got -1"),
    (lambda: TopKState(QUERY, 5, rows=2.0), TypeError, "TopKState: rows must be an int, got float"),
    (lambda: TopKState(QUERY, 5, metric="l1"), ValueError, "TopKState: metric must be one of 'dot', 'cosine'"),
    (lambda: TopKState(QUERY, 5, pairs=3), TypeError, "TopKState: pairs must be Pairs or None, got int"),
    (lambda: TopKState(QUERY, 5, count_above=torch.ones(2)), ValueError, "TopKState: count_above must have shape (3,)"),
    (
        lambda: TopKState(QUERY, 5, rows=9, pairs=Pairs(differ=(ids(3), ids(8)))),
        ValueError,
        "TopKState: pairs.differ of the columns must have shape (9,), got (8,)",
    ),
    (
        lambda: TopKState(QUERY, 5, rows=9, pairs=Pairs(guide=Guide(QUERY, ROWS, 1.0))),
        ValueError,
        "TopKState: guide.gy must have 9 rows, got (40, 4)",
    ),
    (
        lambda: TopKState(QUERY, 5, rows=9, pairs=Pairs(exclude=(torch.tensor([0, 0, 1, 1]), torch.tensor([9])))),
        ValueError,
        "TopKState: exclude indices must be in [0, 9), got 9 in the list of row 1",
    ),
    (
        lambda: TopKState(QUERY, 5, pairs=Pairs(exclude=(torch.tensor([0, 0, 1, 1]), torch.tensor([-1])))),
        ValueError,
        "TopKState: exclude indices must be in [0, 1), got -1 in the list of row 1",
    ),
    (lambda: updated((0, 9), pairs=Pairs(fill=0.0)), ValueError, "TopKState: pairs.fill must be None, got 0.0"),
    (lambda: updated((0, 9), backend="gpu"), ValueError, "TopKState: backend must be one of"),
    (
        lambda: TopKState(QUERY, 5).update(ROWS.bfloat16(), 0),
        TypeError,
        "TopKState: block must have the dtype that the state was started with, torch.float32, got torch.bfloat16",
    ),
    (lambda: TopKState(QUERY, 5).update(ROWS.int(), 0), TypeError, "TopKState: block must be float32, float64"),
    (
        lambda: TopKState(QUERY, 5).update(ROWS[:, :3], 0),
        ValueError,
        "TopKState: block must have the same last dimension as query, got query (3, 4) and block (40, 3)",
    ),
    (
        lambda: TopKState(QUERY, 5).update(ROWS.to("meta"), 0),
        ValueError,
        "TopKState: block must be on the same device as query, got query on cpu and block on meta",
    ),
    (lambda: TopKState(QUERY, 5).update(ROWS, -1), ValueError, "TopKState: base_index must be at least 0, got -1"),
    (lambda: TopKState(QUERY, 5).update(ROWS, True), TypeError, "TopKState: base_index must be an int, got bool"),
    (lambda: updated((0, 9), (8, 12)), ValueError, "TopKState: each row of the corpus must be seen once, rows 8 to 9"),
    (lambda: updated((5, 9), (0, 20)), ValueError, "TopKState: each row of the corpus must be seen once, rows 5 to 9"),
    (lambda: updated((0, 9)).merge(updated((3, 5))), ValueError, "TopKState: each row of the corpus must be seen once"),
    (lambda: TopKState(QUERY, 5).merge(3), TypeError, "TopKState.merge: other must be a TopKState, got int"),
    (
        lambda: updated((30, 40), rows=35),
        ValueError,
        "TopKState: block must be of the 35 rows that the corpus was declared to have, got rows 30 to 40",
    ),
    (
        lambda: updated((20, 40), (0, 10), rows=40).finalize(),
        ValueError,
        "TopKState: all 40 rows of the corpus must be seen before the lists are final, rows 10 to 20 are missing",
    ),
    (lambda: search(QUERY, ROWS, 0), ValueError, "search: k must be at least 1, got 0"),
    (lambda: search(QUERY, ROWS, 5, block_rows=0), ValueError, "search: block_rows must be at least 1, got 0"),
    (lambda: search(QUERY, ROWS, 5, progress=3), TypeError, "search: progress must be a bool or a function, got int"),
    (
        lambda: search(QUERY, ROWS.numpy()[:, :3], 5),
        ValueError,
        "search: corpus must have the same last dimension as query, got query (3, 4) and corpus (40, 3)",
    ),
    (
        lambda: search(QUERY, ROWS.numpy().astype(np.float16), 5),
        TypeError,
        "search: corpus must have the same dtype as query, got query torch.float32 and corpus torch.float16",
    ),
    (lambda: search(QUERY, ROWS.numpy().astype(int), 5), TypeError, "search: corpus must be a torch.Tensor, a numpy"),
    (lambda: search(QUERY, ROWS.numpy().astype(">f4"), 5), TypeError, "search: corpus must be a torch.Tensor, a numpy"),
    (lambda: search(QUERY, ROWS.numpy().astype(str), 5), TypeError, "search: corpus must be a torch.Tensor, a numpy"),
    (lambda: search(QUERY, "rows.npy", 5), TypeError, "search: corpus must be a torch.Tensor, a numpy"),
    (lambda: search(QUERY, [1, 2], 5), TypeError, "search: corpus must be a torch.Tensor, a numpy"),
    (lambda: search(QUERY, None, 5), TypeError, "search: corpus must be a torch.Tensor, a numpy"),
    (lambda: search(QUERY, ROWS[0], 5), ValueError, "search: corpus must have two dimensions (M, D), got (4,)"),
    (lambda: search(QUERY, [ROWS, ROWS[0]], 5), ValueError, "search: corpus must have two dimensions (M, D), got (4,)"),
    (
        lambda: search(QUERY, [(0, ROWS), (20, ROWS)], 5),
        ValueError,
        "search: each row of the corpus must be seen once, rows 20 to 40 came twice",
    ),
    (lambda: Corpus(ROWS).take(torch.ones(2)), TypeError, "Corpus: index of corpus rows must be int64"),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
