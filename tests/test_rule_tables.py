"""The tables of rules and folds: a new row is all that the reference, slices, mining and statistics need."""

import dataclasses
import enum
import re

import pytest
import torch

from contrastive_ops import Fold, Pairs, clip, mine_hard_negatives, similarity_reduce, similarity_topk
from contrastive_ops.core import fold_kinds, problem, rule_slices, rules
from contrastive_ops.core.rule_kinds import IdsRule, limit
from contrastive_ops.losses import _rules
from contrastive_ops.mining import TopKState

N, M, D = 7, 11, 4


# ---- A rule that the package does not have ---------------------------------------------------------------------------


class ParityRule(IdsRule):
    """(row_ids, col_ids): drop the pairs whose ids have an odd sum."""

    counted = False  # by no kernel

    def mask(self, data, places):
        return (data[self.rows[0]][places.rows] + data[self.cols[0]][places.cols]) % 2 == 1


@dataclasses.dataclass(frozen=True, eq=False)
class ParityPairs(Pairs):
    parity: tuple[torch.Tensor, torch.Tensor] | None = None


@pytest.fixture
def parity(monkeypatch):
    """A slot for each side, a row of the table, a field."""
    names = [*problem.Slot.__members__, "PARITY_ROWS", "PARITY_COLS"]
    slots = enum.IntEnum("Slot", names, start=0)
    monkeypatch.setattr(problem, "Slot", slots)
    monkeypatch.setitem(rules.RULES, "parity", ParityRule("parity", (slots.PARITY_ROWS,), (slots.PARITY_COLS,)))
    monkeypatch.setattr(Pairs, "parity", None, raising=False)
    return torch.arange(N), torch.arange(M)


def matrices(grad=False):
    return tuple(torch.randn(rows, D, dtype=torch.float64, requires_grad=grad) for rows in (N, M))


def kept(ids):
    return (ids[0][:, None] + ids[1]) % 2 == 0


def test_a_new_rule_drops_pairs_of_folds(parity):
    x, y = matrices(grad=True)
    found = similarity_reduce(x, y, pairs=ParityPairs(parity=parity), backend="reference")
    truth = (x @ y.T).masked_fill(~kept(parity), -torch.inf).logsumexp(1)
    torch.testing.assert_close(found, truth)
    for got, expected in zip(*(torch.autograd.grad(v.square().sum(), (x, y)) for v in (found, truth)), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_new_rule_goes_with_rows_and_with_columns(parity):
    x, y = matrices()
    pairs, rows = ParityPairs(parity=parity, diagonal=2), torch.tensor([5, 0, 2])
    whole = similarity_reduce(x, y, pairs=pairs, backend="reference")
    some = similarity_reduce(x[rows], y, pairs=rule_slices.rows_of(pairs, rows, M), backend="reference")
    torch.testing.assert_close(some, whole[rows])
    halves = [
        similarity_reduce(x, y[part], pairs=rule_slices.columns_of(pairs, part.start, part.stop), backend="reference")
        for part in (slice(0, 4), slice(4, M))
    ]
    torch.testing.assert_close(torch.logaddexp(*halves), whole)
    assert rule_slices.columns_named(ParityPairs(parity=parity)) == M


def test_a_new_rule_selects_and_streams(parity):
    x, y = matrices()
    pairs = ParityPairs(parity=parity)
    truth = (x @ y.T).masked_fill(~kept(parity), -torch.inf).topk(3)
    for metric, scores in (("dot", truth.values), ("sqeuclidean", None)):
        top = similarity_topk(x, y, 3, pairs=pairs, metric=metric, backend="reference")
        assert bool(kept(parity).gather(1, top.indices).all())
        if scores is not None:
            torch.testing.assert_close(top.values, scores)
        state = TopKState(x, 3, metric=metric, pairs=pairs, backend="reference")
        for begin in (6, 0):
            state.update(y[begin : begin + 6], begin)
        assert torch.equal(state.finalize().indices, top.indices)
    mined = mine_hard_negatives(x, y, torch.arange(N), 2, pairs=pairs, metric="dot", backend="reference")
    assert bool(kept(parity).gather(1, mined.indices).all())
    own = torch.zeros(N, M, dtype=torch.bool).index_put((torch.arange(N), torch.arange(N)), torch.tensor(True))
    assert torch.equal(mined.statistics["eligible"], (kept(parity) & ~own).sum(1))


def test_rows_that_a_new_rule_leaves_out_reach_no_gradient(parity):
    x, y = (torch.randn(rows, D, dtype=torch.float64) for rows in (N, M))
    ids = parity[0].clone().mul_(2), parity[1].clone().mul_(2)
    ids[0][3] = 1  # odd with every column
    x[3] = torch.nan
    x.requires_grad_(), y.requires_grad_()
    found = similarity_reduce(x, y, pairs=ParityPairs(parity=ids), backend="reference")
    rest = torch.arange(N) != 3
    dx, dy = torch.autograd.grad(found[rest].sum(), (x, y))
    assert bool(dy.isfinite().all()) and not bool(dx[3].any()) and bool(dx[rest].all())


# ---- Masks, which are written into the ids of another rule -----------------------------------------------------------


@pytest.mark.parametrize("also", [{}, {"same": (torch.arange(N) % 2, torch.arange(M) % 2)}])
def test_masks_drop_rows_and_columns_whatever_they_hold(also):
    x, y = matrices()
    rows, columns = torch.arange(N) != 2, torch.arange(M) % 4 != 1
    keep = rows[:, None] & columns
    keep &= (also["same"][0][:, None] == also["same"][1]) if also else True
    x[2], y[1] = torch.nan, torch.inf
    x.requires_grad_(), y.requires_grad_()
    masked = [side.detach().clone().nan_to_num(0.0, posinf=0.0).requires_grad_() for side in (x, y)]
    pairs = Pairs(rows=rows, columns=columns, **also)
    for backend in ("reference", "auto"):
        found = similarity_reduce(x, y, pairs=pairs, backend=backend)
        truth = (masked[0] @ masked[1].T).masked_fill(~keep, -torch.inf).logsumexp(1)
        torch.testing.assert_close(found, truth)
        got = torch.autograd.grad(found[rows].sum(), (x, y))
        for each, expected in zip(got, torch.autograd.grad(truth[rows].sum(), masked), strict=True):
            torch.testing.assert_close(each, expected)
    top = similarity_topk(x, y, 3, pairs=pairs)
    assert bool(keep.gather(1, top.indices.clamp_min(0))[top.indices >= 0].all())
    assert top.counts.tolist() == keep.sum(1).clamp_max(3).tolist()
    mined = mine_hard_negatives(masked[0].detach(), y.detach().nan_to_num(posinf=50.0), torch.arange(N), 2, pairs=pairs)
    assert bool(keep.gather(1, mined.indices.clamp_min(0))[mined.indices >= 0].all())


def test_masks_go_with_rows_columns_and_padding():
    pairs = Pairs(rows=torch.arange(N) > 1, columns=torch.arange(M) > 2)
    some = rule_slices.rows_of(pairs, torch.tensor([5, 0]), M)
    assert some.rows.tolist() == [True, False] and torch.equal(some.columns, pairs.columns)
    assert rule_slices.columns_of(pairs, 2, 4).columns.tolist() == [False, True]
    more = _rules.padded(pairs, 1, 2)
    assert more.columns.tolist() == [True, *pairs.columns.tolist(), True, True] and torch.equal(more.rows, pairs.rows)
    assert _rules.passes_padding(Pairs(columns=pairs.columns)) and not _rules.passes_padding(pairs)


def test_masks_that_do_not_fit_are_refused():
    x, y = matrices()
    mask = torch.ones(M, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"similarity_reduce: pairs.rows must have shape \(7,\), got \(11,\)"):
        similarity_reduce(x, y, pairs=Pairs(rows=mask))
    with pytest.raises(TypeError, match="Pairs: columns must be a vector of bool, .* got .* of torch.int64"):
        Pairs(columns=mask.long())
    with pytest.raises(ValueError, match="Pairs: rows and columns must be None with fill"):
        Pairs(columns=mask, fill=0.0)


def test_masks_leave_padding_out_of_clip():
    x, y = (torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    real = torch.arange(N) < 5
    found = clip(x, y, scale=3.0, pairs=Pairs(rows=real, columns=real), weight=real.double())
    truth = clip(x[:5], y[:5], scale=3.0)
    torch.testing.assert_close(found, truth)
    for each, expected in zip(*(torch.autograd.grad(v, (x, y)) for v in (found, truth)), strict=True):
        torch.testing.assert_close(each, expected)


# ---- A fold that the package does not have ---------------------------------------------------------------------------


def squares(logits):
    return torch.where(logits == -torch.inf, 0.0, logits).square()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_new_fold_is_folded_and_differentiated(dim, monkeypatch):
    kind = fold_kinds.FoldKind(
        0.0,
        lambda z, dim: squares(z).sum(dim),
        torch.add,
        lambda z, _: 2 * torch.where(z == -torch.inf, 0.0, z),
    )
    monkeypatch.setitem(fold_kinds.FOLDS, "sum_squares", kind)
    monkeypatch.setattr("contrastive_ops.reference.similarity_reduce.CHUNK_ELEMENTS", 2 * M)
    x, y = matrices(grad=True)
    pairs = Pairs(diagonal=0)
    found = similarity_reduce(x, y, reduce=Fold("sum_squares"), dim=dim, pairs=pairs, backend="reference")
    truth = ((x @ y.T) * (1 - torch.eye(N, M, dtype=x.dtype))).square().sum(dim)
    torch.testing.assert_close(found, truth)
    for got, expected in zip(*(torch.autograd.grad(v.sin().sum(), (x, y)) for v in (found, truth)), strict=True):
        torch.testing.assert_close(got, expected)


# ---- The rows of the tables agree with what is said about them -------------------------------------------------------


@pytest.mark.parametrize("name", fold_kinds.FOLDS)
def test_rows_of_folds_agree_with_themselves(name):
    kind = fold_kinds.FOLDS[name]
    logits = torch.randn(5, 9, dtype=torch.float64)
    logits[1, 2:6] = -torch.inf
    logits.requires_grad_()
    whole = kind.chunk(logits, 1)
    torch.testing.assert_close(kind.merge(kind.chunk(logits[:, :4], 1), kind.chunk(logits[:, 4:], 1)), whole)
    nothing = torch.full_like(whole, kind.empty)
    torch.testing.assert_close(kind.merge(nothing, whole), whole)
    torch.testing.assert_close(kind.chunk(torch.full((5, 3), -torch.inf, dtype=torch.float64), 1), nothing)
    if kind.slope is not None:
        (expected,) = torch.autograd.grad(whole.sum(), logits)
        torch.testing.assert_close(kind.slope(logits, whole[:, None]), expected)


def test_the_documentation_of_folds_is_the_table():
    rows = re.findall(r"^ {12}(\w+) {2,}.* {2,}(\S+)(?:, -1)?$", Fold.__doc__, re.MULTILINE)
    assert [(name, float(empty.rstrip(","))) for name, empty in rows if name != "name"] == [
        (name, kind.empty) for name, kind in fold_kinds.FOLDS.items()
    ]


def test_every_rule_is_a_field_with_slots_of_its_own():
    fields = [field.name for field in rules.Pairs.__dataclass_fields__.values()]
    assert list(rules.RULES) == fields
    slots = [slot for rule in rules.RULES.values() for slot in rule.slots]
    assert len(slots) == len(set(slots))
    for rule in rules.RULES.values():
        assert all(slot.name.endswith(("_ROWS", "_X")) for slot in rule.rows)
        assert all(slot.name.endswith(("_COLS", "_Y")) for slot in rule.cols)


@pytest.mark.parametrize(
    ("bound", "per", "shape"),
    [
        (torch.zeros(()), "pair", ()),
        (torch.zeros(1, 1), "pair", ()),
        (torch.zeros(3), "row", (3,)),
        (torch.zeros(3, 1), "row", (3,)),
        (torch.zeros(1, 3), "column", (3,)),
        (torch.zeros(0), "row", (0,)),
        (torch.zeros(1, 0), "column", (0,)),
    ],
)
def test_bounds_have_one_form(bound, per, shape):
    found, values = limit(bound)
    assert (found, tuple(values.shape)) == (per, shape)


def test_a_bound_of_another_shape_is_refused_before_a_first_pass_uses_it():
    x, y = torch.randn(N, D), torch.randn(M, D)
    with pytest.raises(ValueError, match=r"pairs.below must be one number or have shape \(7,\), .* got \(3, 4\)"):
        similarity_topk(x, y, 2, coarse=torch.bfloat16, pairs=Pairs(below=torch.zeros(3, 4)))
