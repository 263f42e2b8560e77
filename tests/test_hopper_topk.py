"""similarity_topk by the kernel for Hopper GPUs against the reference; see hopper_cases.py.

Rows are small integers, whose inner products are exact: lists are equal, ties included.
"""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from hopper_cases import (  # noqa: F401 - fixtures
    DEVICE,
    DTYPES,
    ON_GPU,
    SCHEDULES,
    close_kernels,
    every_schedule,
    kernels,
    running,
    schedule,
)
from similarity_topk_cases import assert_selects_as_reference, integers, listed_gradients, on_device, rules_of

from contrastive_ops import Pairs, similarity_topk
from contrastive_ops.core import cuda_kernels
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.cuda import hopper_topk as launchers
from contrastive_ops.cuda import similarity_topk as of_every_gpu
from contrastive_ops.ops.similarity_topk import BACKENDS, merge, order


def rows(count, depth=64, dtype=torch.bfloat16, seed=0):
    """Small integers, mostly zeros behind the eighth: few pairs have equal scores, and many rows have some that do."""
    found = integers(count, depth, dtype, seed)
    found[:, 8:-1] *= torch.rand(count, depth - 9, generator=torch.Generator().manual_seed(seed)) < 0.3
    return found


def assert_same(x, y, k, **arguments):
    """The same lists as the reference; returns them."""
    return assert_selects_as_reference("hopper", DEVICE, x, y, k, **arguments).top


@contextlib.contextmanager
def searched_again():
    """The numbers of rows, call by call, that the kernels of every GPU get because a list had no room."""
    forward, found = of_every_gpu.forward, []

    def counted(x, *arguments):
        found.append(len(x))
        return forward(x, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_every_gpu, "forward", counted)
        yield found


@pytest.fixture
def by_tiles(monkeypatch):
    """Lists so short that columns of a few tiles have no room in them, and thresholds are found."""
    monkeypatch.setattr(launchers, "LEAST_ROOM", 40)


# ---- Shapes ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 64), (1, 1000, 64), (130, 3, 72), (5, 200, 128), (20, 1400, 64), (257, 577, 200)]


@every_schedule
@pytest.mark.parametrize("n,m,d", SHAPES)
def test_shapes(n, m, d, by_tiles):
    """Tiles at every edge, several for each block, and dimensions that end within a step.

    Here and below rows are as few as can be: the processor takes long for blocks that sort the list of one.
    """
    dtype = DTYPES[n % 2]
    with searched_again() as again:
        assert_same(rows(n, d, dtype), rows(m, d, dtype, seed=1), 5)
    assert sum(again) < n / 2 + 1


@pytest.mark.parametrize("k", [1, 2, 9, 16, 17, 19])
def test_lengths_of_lists(k, by_tiles):
    """Up to 4 there is one maximum for each tile and row, and then four."""
    cut = launchers.plan(20, 1150, k)
    assert cut.groups == (6 if k <= 4 else 24)
    with searched_again() as again:
        assert_same(rows(20), rows(1150, seed=1), k)
    assert sum(again) < 10


@pytest.mark.parametrize("k", [64, 260, 700, 9000])
def test_lists_of_all_columns(k):
    """Which have room for them: nothing is found first, and the longest are sorted by a library."""
    assert launchers.plan(10, 500, k).groups == 0
    found = assert_same(rows(10), rows(500, seed=1), k)
    assert found.counts.tolist() == [min(k, 500)] * 10


@pytest.mark.parametrize("n,m", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_and_no_columns(n, m):
    assert_same(torch.ones(n, 64, dtype=torch.bfloat16), torch.ones(m, 64, dtype=torch.bfloat16), 3)


def test_random_numbers_are_ordered_by_their_scores(by_tiles):
    x, y = (torch.randn(size, 72, device=DEVICE).to(torch.bfloat16) for size in (20, 900))
    found = similarity_topk(x, y, 7, backend="hopper")
    expected = similarity_topk(x.double(), y.double(), 7, backend="reference")
    torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close((x.float() @ y.float().T).gather(1, found.indices), found.values, rtol=1e-6, atol=1e-5)


def test_bands_of_rows(monkeypatch, by_tiles):
    monkeypatch.setattr(launchers, "BYTES", 1)
    n, m = 270, 450
    assert launchers.plan(n, m, 5).rows == 256
    options = {"scale": torch.rand(n) - 0.5, "row_bias": torch.randint(-4, 4, (n,)).float()}
    options["scale"] = options["scale"].sign() * 2.0 ** (8 * options["scale"]).round()
    options["floor"] = torch.where(torch.arange(n) % 3 == 0, 20.0, torch.nan)
    assert_same(rows(n), rows(m, seed=1), 5, pairs=rules_of(n, m, ("diagonal", "differ", "below"), 3), **options)


@every_schedule
def test_a_list_is_the_same_in_every_run(by_tiles):
    x, y = torch.randn(20, 64).to(torch.bfloat16).to(DEVICE), torch.randn(800, 64).to(torch.bfloat16).to(DEVICE)
    found = []
    for name in SCHEDULES:
        with running(name):
            found.append(similarity_topk(x, y, 6, backend="hopper"))
    for other in found[1:]:
        assert torch.equal(found[0].values, other.values) and torch.equal(found[0].indices, other.indices)


# ---- Thresholds ------------------------------------------------------------------------------------------------------


def listed(x, y, k, groups, capacity, **arguments):
    """What the kernel leaves: (maxima, thresholds, counts, columns of each list)."""
    x, y = on_device((x, y), DEVICE)
    n, m = len(x), len(y)
    made = {"device": DEVICE}
    maxima, thresholds = torch.full((n, groups), torch.nan, **made), torch.full((n,), torch.nan, **made)
    keys = torch.zeros((n, capacity), dtype=torch.int64, **made)
    counts = torch.zeros(n, dtype=torch.int32, **made)
    _, spec = Layout((LogitSet(),), ()).encode()
    vectors = (), spec, torch.ones(1, **made), None, None
    cuda_kernels.kernels().cuda_hopper_topk(
        x, y, x.shape[1], 0, n, *vectors, n, m, k, arguments.get("floor"), groups, maxima, thresholds, keys, counts,
        capacity,
    )  # fmt: skip
    columns = [set((~keys[i, : min(int(counts[i]), capacity)] & 0xFFFFFFFF).tolist()) for i in range(n)]
    return maxima, thresholds, counts, columns


@every_schedule
@pytest.mark.parametrize("of_tile", [1, 4])
@pytest.mark.parametrize("k", [1, 3])
def test_the_threshold_is_a_score_that_k_columns_reach(k, of_tile):
    """And what is listed are the columns that reach it, all of them."""
    x, y = rows(135), rows(1000, seed=1)
    maxima, thresholds, counts, columns = listed(x, y, k, 6 * of_tile, 1000)
    scores = (x.float() @ y.float().T).to(DEVICE)
    padded = torch.nn.functional.pad(scores, (0, 152), value=-torch.inf).view(135, 6, 192)
    if of_tile == 1:
        expected = padded.amax(2)
    else:
        # A thread has two of each eight columns.
        expected = padded.view(135, 6, 24, 4, 2).amax((2, 4)).view(135, 24)
    assert torch.equal(maxima, expected)
    reach = scores >= thresholds[:, None]
    assert (reach.sum(1) >= k).all() and torch.equal(counts.long(), reach.sum(1))
    best = maxima.sort(1, descending=True).values
    assert (thresholds <= best[:, k - 1]).all() and (thresholds > best[:, k]).logical_or(
        best[:, k - 1] == best[:, k]
    ).all()
    assert columns == [set(each.nonzero().squeeze(1).tolist()) for each in reach]


def test_rows_of_which_fewer_than_k_groups_have_a_pair():
    """They list all that they have."""
    x, y = rows(3), rows(1000, seed=1)
    y[300:] = torch.nan
    _, thresholds, counts, columns = listed(x, y, 5, 6, 1000)
    assert thresholds.tolist() == [-torch.inf] * 3
    assert counts.tolist() == [300] * 3 and columns == [set(range(300))] * 3


def test_a_list_that_has_no_room_counts_on():
    x, y = torch.ones(2, 64), torch.ones(1000, 64)
    x[1] = 0
    _, _, counts, columns = listed(x.bfloat16(), y.bfloat16(), 2, 6, 30)
    assert counts.tolist() == [1000, 1000]
    assert all(len(each) == 30 for each in columns)


def test_what_the_kernel_refuses():
    x, y = rows(3), rows(1000, seed=1)
    for groups in (1, 5, 12, 48):
        with pytest.raises((ValueError, RuntimeError), match="groups: there must be 0, or more than k"):
            listed(x, y, 3, groups, 100)
    with pytest.raises((ValueError, RuntimeError), match="groups: there must be 0, or more than k"):
        listed(x, y, 6, 6, 100)
    for k, capacity in ((0, 100), (3, 0), (3, 1001)):
        with pytest.raises((ValueError, RuntimeError), match="k and capacity"):
            listed(x, y, k, 6, capacity)
    with pytest.raises((ValueError, RuntimeError), match="x: it must be of 16 bits"):
        listed(x.float(), y.float(), 3, 6, 100)


# ---- Order -----------------------------------------------------------------------------------------------------------


@every_schedule
def test_many_ties(by_tiles):
    """Of two dimensions: each score has dozens of columns."""
    x, y = torch.zeros(30, 64).bfloat16(), torch.zeros(800, 64).bfloat16()
    x[:, :2], y[:, :2] = integers(30, 2), integers(800, 2, seed=1)
    with searched_again() as again:
        assert_same(x, y, 9)
    assert again and 0 < again[0] <= 30


@every_schedule
def test_duplicates_that_have_no_room(by_tiles):
    """Only rows whose best columns they are pass to the other kernels, with all that belongs to these rows."""
    n, m = 40, 900
    x, y = rows(n), rows(m, seed=1)
    y[100:400] = 3.0 * x[7].sign()
    x[[7, 20, 39]] = 3.0 * x[7].sign()
    options = {
        "scale": 2.0 ** torch.randint(-2, 3, (n,)).float(),
        "row_bias": torch.randint(-9, 9, (n,)).float(),
        "col_bias": (torch.arange(m) < 50).float(),
        "pairs": Pairs(diagonal=293, differ=rules_of(n, m, ("differ",), 5).differ, above=-500.0 * torch.ones(n)),
        "floor": torch.where(torch.arange(n) == 20, torch.nan, -30.0),
    }
    with searched_again() as again:
        found = assert_same(x, y, 9, **options)
    assert again and 3 <= again[0] < n
    assert not (found.indices[7] == 300).any() and (found.indices[7] >= 100).all()


def test_the_best_of_all_are_side_by_side():
    """As in a corpus that is sorted by its classes: the threshold is that of other classes."""
    classes = torch.eye(64)[:4] * 3
    x, y = classes.bfloat16(), classes.repeat_interleave(400, 0).bfloat16()
    with searched_again() as again:
        found = assert_same(x, y, 9)
    assert again == [4]
    assert found.indices[:, 0].tolist() == [0, 400, 800, 1200]


# ---- Rules, scales and biases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules", [("diagonal",), ("differ",), ("same",), ("below",), ("above",), ("diagonal", "differ", "below", "above")]
)
@pytest.mark.parametrize("k", [2, 9])
def test_rules(rules, k, by_tiles):
    """They apply before a maximum counts: a threshold of a dropped pair would be one that fewer columns reach."""
    with searched_again() as again:
        assert_same(rows(30, seed=3), rows(800, seed=4), k, pairs=rules_of(30, 800, rules, 5))
    assert sum(again) < 15


@every_schedule
def test_rules_that_drop_the_best(by_tiles):
    """All columns above a bound, which would be the maxima of every group."""
    x, y = rows(30), rows(800, seed=1)
    scores = x.float() @ y.float().T
    bound = scores.sort(1, descending=True).values[:, 120].contiguous()
    found = assert_same(x, y, 4, pairs=Pairs(below=bound))
    assert (found.values <= bound.to(DEVICE)[:, None]).all() and (found.counts == 4).all()


def test_rows_without_a_pair():
    ids = torch.zeros(10, dtype=torch.int64), torch.zeros(900, dtype=torch.int64)
    ids[0][5] = -1
    found = assert_same(rows(10), rows(900, seed=1), 5, pairs=Pairs(differ=ids))
    assert found.counts.tolist() == [5 * (i == 5) for i in range(10)]


@every_schedule
@pytest.mark.parametrize("of_rows", [False, True])
def test_scales_and_biases(of_rows, by_tiles):
    """Scales may be negative, and biases infinite."""
    n, m = 30, 790
    scale = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0]).repeat(n // 5) if of_rows else -0.5
    row_bias, col_bias = torch.randint(-9, 9, (n,)).float(), torch.randint(-9, 9, (m,)).float()
    row_bias[3], col_bias[200], col_bias[789] = -torch.inf, -torch.inf, torch.inf
    found = assert_same(rows(n), rows(m, seed=1), 5, scale=scale, row_bias=row_bias, col_bias=col_bias)
    assert found.counts[3] == 0 and not (found.indices == 200).any()
    assert (found.indices[4] == 789).any()


def test_floor_is_exclusive(by_tiles):
    x, y = rows(6), rows(800, seed=1)
    floor = (x.float() @ y.float().T).sort(dim=1, descending=True).values[:, 20].clone()
    floor[3], floor[4], floor[5] = -torch.inf, torch.nan, torch.inf
    assert_same(x, y, 9, floor=floor)
    assert assert_same(x, y, 3, floor=floor).counts.tolist() == [3, 3, 3, 3, 3, 0]
    assert_same(x, y[:40], 30, floor=floor)


def test_a_matrix_that_is_compared_with_itself(by_tiles):
    x = rows(280).to(DEVICE)
    found = similarity_topk(x, k=4, pairs=Pairs(diagonal=0), backend="hopper")
    expected = similarity_topk(x, k=4, pairs=Pairs(diagonal=0), backend="reference")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


# ---- Extreme values --------------------------------------------------------------------------------------------------


@every_schedule
def test_nan_never_displaces_a_number(by_tiles):
    x, y = rows(20), rows(800, seed=1)
    y[torch.randperm(800)[:500]] = torch.nan
    x[2] = torch.nan
    found = assert_same(x, y, 5)
    assert found.counts.tolist() == [5 * (i != 2) for i in range(20)]


def test_infinite_scores_and_zeros_of_both_signs(by_tiles):
    x, y = torch.zeros(2, 64).bfloat16(), torch.zeros(800, 64).bfloat16()
    x[0, 0], x[1, 0] = 1, -1
    y[1::5, 0], y[2::5, 0], y[3::5, 0], y[4::5, 0] = torch.inf, -torch.inf, 2, -0.0
    found = assert_same(x, y, 4)
    assert found.indices.tolist() == [[1, 6, 11, 16], [2, 7, 12, 17]]


# ---- Other functions -------------------------------------------------------------------------------------------------


def test_gradients_of_a_selection():
    x, y = rows(20).to(DEVICE).requires_grad_(), rows(500, seed=1).to(DEVICE).requires_grad_()
    values = similarity_topk(x, y, 5, backend="hopper").values
    expected = similarity_topk(x, y, 5, backend="reference").values
    got, truth = (torch.autograd.grad(each.sum(), (x, y)) for each in (values, expected))
    assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))


def test_listed_logits_and_their_gradients():
    x, y = torch.randn(4, 64).bfloat16(), torch.randn(13, 64).bfloat16()
    indices = torch.randint(-1, 13, (4, 19))
    problem = (x, y, torch.tensor(1.5), torch.randn(4), torch.randn(13), torch.randn(4, 19), indices, torch.randn(2, 2))
    problem = on_device(problem, DEVICE)
    values, gradients = listed_gradients(torch.bfloat16, "hopper", *problem)
    others, expected = listed_gradients(torch.bfloat16, "cuda", *problem)
    assert torch.equal(values, others)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_lists_are_merged_and_ordered():
    values = torch.randint(-3, 3, (9, 20), device=DEVICE).float()
    indices = torch.stack([torch.randperm(60, device=DEVICE)[:20] for _ in range(9)])
    found, expected = (order(values, indices, 7, backend) for backend in ("hopper", "reference"))
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(merge(found, found, "hopper").indices, merge(expected, expected, "reference").indices)


@pytest.mark.skipif(ON_GPU, reason="counts launches on the processor")
def test_a_search_is_two_sweeps_of_one_kernel():
    """Two sweeps, the thresholds between them and a selection; lists of all columns take one sweep."""
    x, y = rows(10), rows(900, seed=1)
    counted = []
    for k in (3, 200):
        before = kernels(SCHEDULES[-1]).launches
        similarity_topk(x, y, k, backend="hopper")
        counted.append(kernels(SCHEDULES[-1]).launches - before)
    assert counted == [4, 2]


# ---- What cannot run -------------------------------------------------------------------------------------------------


def test_rows_that_are_not_aligned_are_copied():
    memory = torch.empty(40 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)
    shifted = memory[1:].view(40, 64).copy_(rows(40))
    assert shifted.data_ptr() % 16
    assert_same(shifted, rows(60, seed=1), 4)
    assert_same(rows(60), shifted, 4)
    assert_same(rows(60, 128)[:, ::2], rows(80, 128)[::2, :64], 4)


@pytest.mark.parametrize(
    ("dtype", "d", "reason"),
    [
        (torch.float32, 64, r"dtype=torch.float32 \(supported: bfloat16, float16\)"),
        (torch.bfloat16, 68, r"D=68 \(supported: 64 to 2048, a multiple of 8\)"),
        (torch.bfloat16, 56, r"D=56 \(supported"),
    ],
)
def test_what_rows_must_be(dtype, d, reason):
    x = torch.zeros(3, d, dtype=dtype, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"backend 'hopper' cannot run these inputs:(.|\n)*{reason}"):
        similarity_topk(x, x, 2, backend="hopper")


@pytest.mark.parametrize("rule", ["exclude", "guide", "log_weight"])
def test_what_rules_must_be(rule):
    x, y = on_device((rows(20), rows(30, seed=1)), DEVICE)
    pairs = on_device(rules_of(20, 30, (rule,), 3), DEVICE)
    with pytest.raises(NotImplementedError, match="supported: a diagonal, ids, and bounds without a guide"):
        similarity_topk(x, y, 3, pairs=pairs, backend="hopper")


def test_what_lists_must_be():
    """As short as groups of columns allow, or as long as all that is listed."""
    x, y = on_device((rows(2), rows(1000, seed=1)), DEVICE)
    with pytest.raises(NotImplementedError, match=r"k=20 of M=1000 columns \(supported: up to 19, and 186 or more\)"):
        similarity_topk(x, y, 20, backend="hopper")
    for k in (19, 186):
        assert_same(x, y, k)
    with pytest.raises(NotImplementedError, match=r"statistics of all columns \(supported: lists\)"):
        assert_same(x, y, 3, count_above=torch.zeros(2))
    layout = Layout((LogitSet(ScaleOf.COLUMNS),), ())
    assert "a scale of columns" in launchers.no_room(launchers.Asked(layout, 9, 2, False))[0]


@pytest.mark.parametrize("k", [1, 100, 1000, 9000])
@pytest.mark.parametrize("columns", [1, 191, 5000, 100_000, 10_000_000])
def test_plans_have_more_groups_than_columns_are_wanted(columns, k):
    layout = Layout((LogitSet(),), ())
    cut = launchers.plan(70_000, columns, k)
    assert 0 < cut.rows <= 70_000 and (cut.rows % 256 == 0 or cut.rows == 70_000)
    assert cut.rows == 256 or cut.rows * (4 * cut.groups + 8 * cut.capacity) <= launchers.BYTES
    assert cut.capacity <= columns and (cut.groups == 0) == (cut.capacity == columns)
    if not launchers.no_room(launchers.Asked(layout, columns, k, False)):
        assert cut.groups == 0 or 5 * k <= 4 * cut.groups


def test_nothing_is_searched_while_a_graph_is_recorded(monkeypatch):
    """Rows that are searched again are found by their numbers."""
    recorded = type("OnGpu", (), {"is_cuda": True})()
    monkeypatch.setattr(launchers.hopper, "unsupported", lambda x: [])
    for recording in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
        assert ["a CUDA graph is recorded" in why for why in launchers.unsupported(recorded)] == [True] * recording


def test_it_is_taken_by_name_only():
    assert BACKENDS["hopper"].by_name is not None


def test_constants_are_those_of_the_kernel():
    source = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "hopper" / "topk.cu"
    if not source.exists():
        pytest.skip("needs the source checkout")
    constants = {name: int(value) for name, value in re.findall(r"(k\w+) = (\d+)", source.read_text())}
    assert (constants["kCols"], constants["kQuarters"]) == (launchers.COLUMNS, launchers.QUARTERS)
