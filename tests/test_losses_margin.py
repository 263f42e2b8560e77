"""VSE, the energy-based hinge and SimCTG against dense formulas in float64."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contrastive_ops.losses.hinge import energy_hinge, simctg, vse
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
REDUCTIONS = ("mean", "sum", "none")
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# ---- The definitions, written row by row or with whole matrices ----------------------------------------------------


def stacked(losses, x):
    return torch.stack(losses) if losses else x.sum(1)


def dense_vse(image, text, margin, hardest, labels=None, normalize=True):
    image, text = (F.normalize(image), F.normalize(text)) if normalize else (image, text)
    s = image @ text.T
    own = s.diagonal()
    drop = torch.eye(len(s), dtype=torch.bool)
    if labels is not None:
        drop = drop | ((labels[:, None] == labels) & (labels != -1))
    rows = F.relu(margin + s - own[:, None]).masked_fill(drop, 0)
    cols = F.relu(margin + s - own).masked_fill(drop, 0)
    if hardest:
        return rows.max(1).values + cols.max(0).values if len(s) else own
    return rows.sum(1) + cols.sum(0)


def dense_energy(query, key, negatives, margin, hardest, normalize=True):
    columns = torch.cat([key, negatives])
    query, columns = (F.normalize(query), F.normalize(columns)) if normalize else (query, columns)
    s = query @ columns.T
    hinge = F.relu(margin + s - s.diagonal()[:, None]).masked_fill(torch.eye(*s.shape) == 1, 0)
    if hardest:
        return hinge.max(1).values if s.numel() else s.sum(1)
    return hinge.sum(1)


def dense_simctg(x, segments, margin, normalize=True):
    """Token losses, which tokens count, and the lengths of their sequences."""
    x = F.normalize(x) if normalize else x
    losses, lengths = [], []
    for i, segment in enumerate(segments.tolist()):
        others = [j for j, other in enumerate(segments.tolist()) if other == segment and j != i]
        own = (x[i] * x[i]).sum()
        hinges = [F.relu(margin - own + (x[i] * x[j]).sum()) for j in others]
        alone = segment == -1 or not hinges
        losses.append(x[i].sum() * 0 if alone else torch.stack(hinges).mean())
        lengths.append(0 if alone else len(others) + 1)
    lengths = torch.tensor(lengths, dtype=DOUBLE)
    return stacked(losses, x), lengths > 0, lengths


@st.composite
def cases(draw):
    """Shapes, labels and options; tensors follow from the seed."""
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    rows, columns = draw(st.integers(0, 8)), draw(st.integers(0, 10))
    label = st.integers(-1, draw(st.integers(-1, 5)))
    return {
        "x": leaf(rows, 5),
        "y": leaf(columns, 5),
        "labels": torch.tensor(draw(st.lists(label, min_size=rows, max_size=rows)), dtype=torch.int64),
        "weight": torch.rand(rows, dtype=DOUBLE).requires_grad_() if draw(st.booleans()) else None,
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "margin": draw(st.sampled_from([0.1, 0.7, 3.0])),
        "flag": draw(st.booleans()),
        "other_flag": draw(st.booleans()),
        "normalize": draw(st.booleans()),
    }


def common(case):
    return {name: case[name] for name in ("weight", "reduction")}


# ---- Similarities --------------------------------------------------------------------------------------------------


@FUZZ
@given(case=cases())
def test_vse(backend, case):
    image, text, margin, hardest = case["x"], leaf(*case["x"].shape), case["margin"], case["flag"]
    labels, normalize = case["labels"] if case["other_flag"] else None, case["normalize"]
    options = {"hardest": hardest, "labels": labels, "normalize": normalize}
    value = vse(image, text, margin=margin, backend=backend, **options, **common(case))
    truth = dense_vse(image, text, margin, **options)
    check(value, reduced(truth, case["reduction"], case["weight"]), [image, text, case["weight"]])


@FUZZ
@given(case=cases())
def test_energy_hinge(backend, case):
    query, key, negatives, margin = case["x"], leaf(*case["x"].shape), case["y"], case["margin"]
    options = {"hardest": case["flag"], "normalize": case["normalize"]}
    extra = None if case["other_flag"] else negatives
    value = energy_hinge(query, key, extra, margin=margin, backend=backend, **options, **common(case))
    truth = dense_energy(query, key, negatives[: 0 if extra is None else None], margin, **options)
    leaves = [query, key, extra, case["weight"]]
    check(value, reduced(truth, case["reduction"], case["weight"]), leaves)


@FUZZ
@given(case=cases(), average=st.sampled_from(["pair", "segment"]))
def test_simctg(backend, case, average):
    x, segments, margin, normalize = case["x"], case["labels"], case["margin"], case["flag"]
    value = simctg(x, segments, margin=margin, average=average, normalize=normalize, backend=backend, **common(case))
    truth, counted, lengths = dense_simctg(x, segments, margin, normalize)
    weight = case["weight"]
    if case["reduction"] == "mean":
        share = lengths - 1 if average == "pair" else 1 / lengths.clamp(min=1)
        weight = share * counted * (1 if weight is None else weight)
    check(value, reduced(truth, case["reduction"], weight, counted), [x, case["weight"]])


def test_simctg_of_one_sequence(backend):
    """The paper's formula; with sequences of one length both averages are equal."""
    x, segments = leaf(2, 20, 6), torch.arange(2).repeat_interleave(20)
    for average in ("pair", "segment"):
        s = F.normalize(x, dim=2) @ F.normalize(x, dim=2).mT
        each = F.relu(0.5 - 1 + s).masked_fill(torch.eye(20, dtype=torch.bool), 0).sum((1, 2)) / (20 * 19)
        check(simctg(x.flatten(0, 1), segments, average=average, backend=backend), each.mean(), [x])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_more_rows_than_a_tile(backend, reduction):
    x, y, labels = leaf(300, 24), leaf(300, 24), torch.randint(0, 40, (300,))
    options = {"reduction": reduction, "backend": backend}
    for hardest in (False, True):
        truth = dense_vse(x, y, 0.2, hardest, labels)
        check(vse(x, y, hardest=hardest, labels=labels, **options), reduced(truth, reduction), [x, y])
        truth = dense_energy(x, y[:300], y[:7], 0.2, hardest)
        check(energy_hinge(x, y, y[:7], hardest=hardest, **options), reduced(truth, reduction), [x, y])
    same = labels[:, None] == labels
    pair = same & ~torch.eye(300, dtype=torch.bool)
    hinges = F.relu(0.5 - 1 + F.normalize(x) @ F.normalize(x).T) * pair
    truth = hinges.sum() / pair.sum() if reduction == "mean" else reduced(hinges.sum(1) / pair.sum(1), reduction)
    check(simctg(x, labels, **options), truth, [x])


# ---- Derivatives, precision ----------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 1, 1, 2])
MINED = {
    "vse": lambda x, y, **o: vse(x, y, margin=0.5, **o),
    "vse_hardest": lambda x, y, **o: vse(x, y, margin=0.5, hardest=True, **o),
    "energy_hinge": lambda x, y, **o: energy_hinge(x, y, y[:2], margin=0.5, **o),
    "energy_hinge_sum": lambda x, y, **o: energy_hinge(x, y, y[:2], margin=0.5, hardest=False, **o),
    "simctg": lambda x, y, **o: simctg(x + y, torch.zeros_like(LABELS), normalize=False, margin=2.0, **o),
    "simctg_unit": lambda x, y, **o: simctg(x + y, torch.zeros_like(LABELS), margin=1.0, **o),
}


@pytest.mark.parametrize("name", MINED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, name, reduction):
    def function(x, y, weight):
        return MINED[name](x, y, weight=weight, reduction=reduction, backend=backend)

    leaves = (leaf(5, 3), leaf(5, 3), torch.rand(5, dtype=DOUBLE).requires_grad_())
    check_derivatives(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_error(backend, dtype, reduction):
    x, y = leaf(48, 32, dtype=dtype), leaf(48, 32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    segments = torch.zeros(48, dtype=torch.int64)
    options = {"reduction": reduction, "backend": backend}
    cases = [
        (vse(x, y, **options), dense_vse(*exact, 0.2, False).mean()),
        (vse(x, y, hardest=True, **options), dense_vse(*exact, 0.2, True).mean()),
        (energy_hinge(x, y, y[:9], hardest=False, **options), dense_energy(*exact, exact[1][:9], 0.2, False).mean()),
        (energy_hinge(x, y, y[:9], **options), dense_energy(*exact, exact[1][:9], 0.2, True).mean()),
        (simctg(x, segments, margin=1.0, **options), dense_simctg(exact[0], segments, 1.0)[0].mean()),
        (
            simctg(x, segments, margin=25.0, normalize=False, **options),
            dense_simctg(exact[0], segments, 25.0, normalize=False)[0].mean(),
        ),
    ]
    bound = 1e-4 if dtype == torch.float32 else GRADIENT_ERROR_16_BIT
    for value, truth in cases:
        assert value.dtype == torch.float32
        value = value.mean()
        assert relative_error(value, truth) <= (1e-5 if dtype == torch.float32 else 1e-3)
        got, expected = (
            torch.autograd.grad(v, t, materialize_grads=True) for v, t in ((value, [x, y]), (truth, exact))
        )
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype
            assert relative_error(a, b) <= bound


def test_hinges_are_never_negative(backend):
    """The sum over violators less their number times the partner may round below 0."""
    x = F.normalize(torch.randn(400, 16))
    y = F.normalize(x + 0.02 * torch.randn(400, 16))
    x[200:], y[200:] = x[:200].clone(), y[:200].clone()  # duplicates: violators by exactly nothing
    for margin in (0.0, 1e-6, 0.2):
        assert (vse(x, y, margin=margin, reduction="none", backend=backend) >= 0).all()
        assert (energy_hinge(x, y, margin=margin, hardest=False, reduction="none", backend=backend) >= 0).all()


# ---- Rows that do not count ----------------------------------------------------------------------------------------


def test_tokens_that_are_alone_do_not_count(backend):
    x = leaf(6, 4)
    value = simctg(x, torch.arange(6), margin=9.0, backend=backend)
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, x)[0], torch.zeros_like(x))


def test_one_pair_has_loss_zero(backend):
    x, y = leaf(1, 4), leaf(1, 4)
    for loss in (vse, energy_hinge):
        for hardest in (False, True):
            value = loss(x, y, hardest=hardest, backend=backend)
            assert value == 0
            assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(value, [x, y]))


# ---- Bad input -----------------------------------------------------------------------------------------------------

X, Y, IDS = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
CASES = [
    (lambda: vse(X, Y), ValueError, "vse: text must have the same shape as image, got image (4, 3) and text (5, 3)"),
    (lambda: vse(X, X, margin=torch.nan), ValueError, "vse: margin must be in [0, inf), got nan"),
    (lambda: vse(X, X, labels=IDS[:2]), ValueError, "vse: labels must have shape (4,), got (2,)"),
    (
        lambda: energy_hinge(X, X, torch.ones(2, 4)),
        ValueError,
        "energy_hinge: negatives must have the same last dimension as query",
    ),
    (lambda: energy_hinge(X, X, weight=X[0]), ValueError, "energy_hinge: weight must have shape (4,), got (3,)"),
    (lambda: simctg(X, IDS[:3]), ValueError, "simctg: segments must have shape (4,), got (3,)"),
    (
        lambda: simctg(X, IDS, average="batch"),
        ValueError,
        "simctg: average must be one of 'pair', 'segment', got 'batch'",
    ),
    (lambda: simctg(X, IDS, margin=None), TypeError, "simctg: margin must be a number, got NoneType"),
    (
        lambda: simctg(X, IDS, reduction="avg"),
        ValueError,
        "simctg: reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
    (lambda: vse(X, X, backend="gpu"), ValueError, "vse: backend must be one of 'auto', 'reference', 'cpu', "),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
