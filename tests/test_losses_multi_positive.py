"""SupCon, decoupled multi-positive InfoNCE and soft targets against dense formulas in float64."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch.nn import functional as F

from contrastive_ops.losses.multi_positive import multi_positive_info_nce, soft_info_nce, sup_con
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
REDUCTIONS = ["mean", "sum", "none"]


# ---- The definitions, from the papers, row by row ------------------------------------------------------------------


def sets_of_labels(labels, col_labels=None):
    """Positive and negative columns of each row, in plain Python."""
    own = col_labels is None
    columns = (labels if own else col_labels).tolist()
    positive, negative = [], []
    for i, label in enumerate(labels.tolist()):
        everyone = [j for j in range(len(columns)) if not (own and j == i)]
        positive.append([j for j in everyone if label != -1 and columns[j] == label])
        negative.append([j for j in everyone if label == -1 or columns[j] != label])
    return positive, negative


def dense_sup_con(logits, positive, negative, form="mean_log"):
    rows = []
    for i, (p, n) in enumerate(zip(positive, negative, strict=True)):
        if not p:
            rows.append(0.0 * logits[i].sum())
            continue
        log_p = logits[i][p] - logits[i][p + n].logsumexp(0)
        rows.append(-log_p.mean() if form == "mean_log" else -log_p.exp().mean().log())
    return torch.stack(rows) if rows else logits.sum(1)


def dense_multi_positive(logits, positive, negative):
    rows = []
    for i, (p, n) in enumerate(zip(positive, negative, strict=True)):
        each = [-F.log_softmax(logits[i][[q, *n]], 0)[0] for q in p]
        rows.append(torch.stack(each).mean() if each else 0.0 * logits[i].sum())
    return torch.stack(rows) if rows else logits.sum(1)


def dense_soft(logits, shares, smoothing):
    shares = (1 - smoothing) * shares + smoothing / logits.shape[1]
    return F.cross_entropy(logits, shares, reduction="none")


def lists_of(shares):
    """(indptr, indices, weights) of a dense matrix of shares."""
    row, column = shares.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (shares != 0).sum(1).cumsum(0)])
    return indptr, column, shares[row, column]


# ---- Labels --------------------------------------------------------------------------------------------------------


@st.composite
def labelled(draw):
    rows = draw(st.integers(0, 9))
    columns = draw(st.one_of(st.none(), st.integers(0, 11)))
    label = st.integers(-1, draw(st.integers(-1, 8)))
    labels = draw(st.lists(label, min_size=rows, max_size=rows))
    col_labels = None if columns is None else draw(st.lists(label, min_size=columns, max_size=columns))
    return labels, col_labels, draw(st.sampled_from(REDUCTIONS)), draw(st.booleans()), draw(st.booleans())


def run_labelled(loss, dense, case, backend, **options):
    labels, col_labels, reduction, weighted, normalize = case
    labels = torch.tensor(labels, dtype=torch.int64)
    x, temperature = leaf(len(labels), 5), torch.tensor(0.4, dtype=DOUBLE, requires_grad=True)
    columns = {}
    if col_labels is not None:
        columns = {
            "y": leaf(len(col_labels), 5),
            "col_labels": torch.tensor(col_labels, dtype=torch.int64),
        }
    weight = torch.rand(len(labels), dtype=DOUBLE, requires_grad=True) if weighted else None
    value = loss(
        x,
        labels,
        **columns,
        temperature=temperature,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
        **options,
    )
    a, b = x, columns.get("y", x)
    a, b = (F.normalize(a), F.normalize(b)) if normalize else (a, b)
    positive, negative = sets_of_labels(labels, columns.get("col_labels"))
    rows = dense(a @ b.T / temperature, positive, negative)
    counts = torch.tensor([len(p) for p in positive], dtype=DOUBLE)
    total_weight = weight
    if options.get("mean_over") == "pairs" and reduction == "mean":
        total_weight = counts if weight is None else counts * weight
    truth = reduced(rows, reduction, total_weight, counts > 0)
    leaves = [x, temperature, *([columns["y"]] if columns else []), *([weight] if weighted else [])]
    check(value, truth, leaves)


@pytest.mark.parametrize("form", ["mean_log", "log_mean", "each"])
@pytest.mark.parametrize("columns", [None, 7])
def test_a_bias_of_columns(backend, form, columns):
    x, labels, more = leaf(9, 5), torch.arange(9) % 4, {}
    if columns:
        more = {"y": leaf(columns, 5), "col_labels": torch.arange(columns) % 5}
    bias = leaf(columns or 9)
    logits = 3.0 * F.normalize(x) @ F.normalize(more.get("y", x)).T + bias
    sets = sets_of_labels(labels, more.get("col_labels"))
    options = {**more, "scale": 3.0, "col_bias": bias, "reduction": "none", "backend": backend}
    if form == "each":
        value, rows = multi_positive_info_nce(x, labels, **options), dense_multi_positive(logits, *sets)
    else:
        value, rows = sup_con(x, labels, positives=form, **options), dense_sup_con(logits, *sets, form)
    check(value, rows, [x, bias, *([more["y"]] if more else [])])


@FUZZ
@given(case=labelled(), form=st.sampled_from(["mean_log", "log_mean"]))
def test_sup_con(backend, case, form):
    run_labelled(sup_con, lambda *sets: dense_sup_con(*sets, form), case, backend, positives=form)


@FUZZ
@given(case=labelled(), mean_over=st.sampled_from(["rows", "pairs"]))
def test_multi_positive_info_nce(backend, case, mean_over):
    run_labelled(multi_positive_info_nce, dense_multi_positive, case, backend, mean_over=mean_over)


EDGES = {
    "no rows": ([], None),
    "one row": ([3], None),
    "no columns": ([0, 1], []),
    "all labels equal": ([4] * 6, None),
    "all labels distinct": (list(range(6)), None),
    "no label at all": ([-1] * 5, None),
    "positives without negatives": ([0, 0, -1], [0, 0]),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_of_labels(backend, edge, reduction):
    case = (*EDGES[edge], reduction, False, False)
    run_labelled(sup_con, dense_sup_con, case, backend)
    run_labelled(multi_positive_info_nce, dense_multi_positive, case, backend)


@pytest.mark.parametrize("loss", [sup_con, multi_positive_info_nce])
def test_a_batch_without_a_positive_has_loss_zero_and_gradient_zero(backend, loss):
    x = leaf(5, 4)
    value = loss(x, torch.arange(5), backend=backend)
    assert value == 0
    assert not torch.autograd.grad(value, x)[0].any()


def test_one_positive_each_is_nt_xent(backend):
    from contrastive_ops import nt_xent

    a, b = leaf(7, 4), leaf(7, 4)
    for loss, options in ((sup_con, {}), (sup_con, {"positives": "log_mean"}), (multi_positive_info_nce, {})):
        labels = torch.arange(7).repeat(2)
        value = loss(torch.cat([a, b]), labels, temperature=0.3, backend=backend, **options)
        check(value, nt_xent(a, b, temperature=0.3, backend=backend), [a, b])


LABELLED = [
    lambda *a, **k: sup_con(*a, **k),
    lambda *a, **k: sup_con(*a, positives="log_mean", **k),
    multi_positive_info_nce,
]


@pytest.mark.parametrize("form", range(3))
def test_gradcheck_of_labels(backend, form):
    labels, col_labels = torch.tensor([0, 1, 0, 2, -1]), torch.tensor([1, 0, 1, 3])
    scale = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)

    def own(x, scale):
        return LABELLED[form](x, labels, scale=scale, reduction="none", backend=backend)

    def other(x, y, scale):
        return LABELLED[form](x, labels, y, col_labels, scale=scale, normalize=False, backend=backend)

    for function, leaves in ((own, (leaf(5, 3), scale)), (other, (leaf(5, 3), leaf(4, 3), scale))):
        check_derivatives(function, leaves)


def test_gradgradcheck_of_rows_without_negatives(backend):
    def function(x):
        return multi_positive_info_nce(x, torch.zeros(3, dtype=torch.int64), scale=1.3, backend=backend)

    assert torch.autograd.gradgradcheck(function, (leaf(3, 2),))
    assert torch.autograd.gradgradcheck(lambda x: sup_con(x, torch.tensor([0, 0, 1]), backend=backend), (leaf(3, 2),))


# ---- Soft targets --------------------------------------------------------------------------------------------------


@st.composite
def soft_case(draw):
    rows, columns = draw(st.integers(0, 7)), draw(st.integers(1, 9))
    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    smoothing = draw(st.sampled_from([0.0, 0.2, "rows"]))
    flags = [draw(st.booleans()) for _ in range(3)]
    return rows, columns, density, smoothing, draw(st.sampled_from(REDUCTIONS)), flags


@FUZZ
@given(case=soft_case())
def test_soft_info_nce(backend, case):
    rows, columns, density, smoothing, reduction, (weighted, normalize, per_row) = case
    query, key = leaf(rows, 5), leaf(columns, 5)
    shares = torch.rand(rows, columns, dtype=DOUBLE) * (torch.rand(rows, columns) < density)
    shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-9)
    scale = torch.rand(rows if per_row else (), dtype=DOUBLE, requires_grad=True)
    weight = torch.rand(rows, dtype=DOUBLE, requires_grad=True) if weighted else None
    share = torch.rand(rows, dtype=DOUBLE, requires_grad=True) if smoothing == "rows" else smoothing
    value = soft_info_nce(
        query,
        key,
        lists_of(shares),
        label_smoothing=share,
        scale=scale,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
    )
    a, b = (F.normalize(query), F.normalize(key)) if normalize else (query, key)
    by_row = scale[:, None] if per_row else scale
    spread = share[:, None] if smoothing == "rows" else share
    truth = reduced(dense_soft(by_row * (a @ b.T), shares, spread), reduction, weight, shares.sum(1) > 0)
    leaves = [query, key, scale, *([weight] if weighted else []), *([share] if smoothing == "rows" else [])]
    check(value, truth, leaves)


def test_unsorted_and_repeated_targets_add_up(backend):
    query, key = leaf(3, 4), leaf(5, 4)
    indptr, indices = torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 4, 2, 1])
    weights = torch.tensor([0.3, 0.5, 0.2, 0.75, 0.25], dtype=DOUBLE)
    shares = torch.zeros(3, 5, dtype=DOUBLE)
    shares[0, 4], shares[0, 0], shares[2, 2], shares[2, 1] = 0.5, 0.5, 0.75, 0.25
    value = soft_info_nce(query, key, (indptr, indices, weights), backend=backend, normalize=False)
    rows = dense_soft(query @ key.T / 0.07, shares, 0.0)
    check(value, reduced(rows, "mean", counted=shares.sum(1) > 0), [query, key])


def test_one_key_for_each_query_is_info_nce(backend):
    from contrastive_ops import info_nce

    query, key, target = leaf(6, 4), leaf(9, 4), torch.randint(0, 9, (6,))
    lists = torch.arange(7), target, torch.ones(6)
    value = soft_info_nce(query, key, lists, label_smoothing=0.1, backend=backend, normalize=False)
    check(
        value, info_nce(query, key, target=target, label_smoothing=0.1, backend=backend, normalize=False), [query, key]
    )


def test_small_soft_losses_are_exact_in_float32(backend):
    """lse minus the listed logits would lose a loss below 1e-6 at a scale of 30."""
    query = torch.eye(8)
    lists = torch.arange(9), torch.arange(8), torch.ones(8)
    truth = 7 * torch.exp(torch.tensor(-30.0, dtype=DOUBLE))
    assert (
        relative_error(soft_info_nce(query, query, lists, scale=30.0, backend=backend, normalize=False), truth) <= 1e-5
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_edges_of_lists(backend, reduction):
    nothing = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    for columns in (0, 3):
        query, key = leaf(3, 4), leaf(columns, 4)
        value = soft_info_nce(
            query, key, nothing, reduction=reduction, label_smoothing=0.1, backend=backend, normalize=False
        )
        assert not value.any()
        assert not any(g.any() for g in torch.autograd.grad(value.sum(), [query, key], materialize_grads=True))
    one_key = torch.arange(4), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    query, key = leaf(3, 4), leaf(1, 4)
    value = soft_info_nce(query, key, one_key, reduction=reduction, backend=backend, normalize=False)
    assert not value.any()
    assert not any(g.any() for g in torch.autograd.grad(value.sum(), [query, key]))


def test_gradcheck_of_soft_targets(backend):
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.2, 0.8]], dtype=DOUBLE)
    scale, share = (torch.rand(n, dtype=DOUBLE, requires_grad=True) for n in ((), (3,)))

    def function(query, key, scale, share):
        lists = lists_of(shares)
        return soft_info_nce(
            query, key, lists, scale=scale, label_smoothing=share, reduction="none", backend=backend, normalize=False
        )

    leaves = (leaf(3, 2), leaf(3, 2), scale, share)
    check_derivatives(function, leaves)


# ---- Precision -----------------------------------------------------------------------------------------------------


@pairwise(level=[0.3, 0.01, 0.001], copies=[1, 2], name=["sup_con", "multi_positive", "soft"])
def test_gradient_error_in_bfloat16(backend, name, copies, level):
    """One positive in each row, or two of a cluster of eight."""
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 96, level, dtype=torch.bfloat16))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    labels = torch.arange(256) // copies
    sets = sets_of_labels(labels, labels)
    logits = 50.0 * exact[0] @ exact[1].T
    options = {"scale": 50.0, "normalize": False, "backend": backend}
    if name == "sup_con":
        value, truth = sup_con(a, labels, b, labels, **options), dense_sup_con(logits, *sets)
    elif name == "multi_positive":
        value, truth = multi_positive_info_nce(a, labels, b, labels, **options), dense_multi_positive(logits, *sets)
    else:
        shares = (labels[:, None] == labels).double() / copies
        value, truth = (
            soft_info_nce(a, b, lists_of(shares), **options),
            dense_soft(logits, shares, 0.0),
        )
    truth = truth.mean()
    assert relative_error(value, truth) <= 1e-3
    gradients = zip(torch.autograd.grad(value, [a, b]), torch.autograd.grad(truth, exact), strict=True)
    for got, expected in gradients:
        assert got.dtype == torch.bfloat16
        assert relative_error(got, expected) <= GRADIENT_ERROR_16_BIT


def test_rows_are_never_negative(backend):
    a, _ = clustered_pairs(128, 32, 1e-4, dtype=torch.bfloat16, scale=100.0)
    labels = torch.arange(64).repeat(2)
    for loss in LABELLED:
        assert (loss(a, labels, scale=100.0, reduction="none", backend=backend) >= 0).all()


# ---- Parity and bad input ------------------------------------------------------------------------------------------


def test_parity_with_pytorch_metric_learning(backend):
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = leaf(24, 8), leaf(17, 8)
    labels, col_labels = torch.randint(0, 6, (24,)), torch.randint(0, 6, (17,))
    for ours, theirs in (
        (lambda *a: sup_con(*a, temperature=0.2, backend=backend), peers.SupConLoss(0.2)),
        (
            lambda *a: multi_positive_info_nce(*a, temperature=0.2, mean_over="pairs", backend=backend),
            peers.NTXentLoss(0.2),
        ),
    ):
        check(ours(x, labels), theirs(x, labels), [x], 1e-7)
        truth = theirs(x, labels, ref_emb=y, ref_labels=col_labels)
        check(ours(x, labels, y, col_labels), truth, [x, y], 1e-7)


X, Y, L, M = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 0, 1, 2])
LISTS = (torch.arange(5), torch.arange(4), torch.ones(4))
BAD = [
    (lambda: sup_con(X, L.float()), TypeError, "sup_con: labels must be int64, got torch.float32"),
    (lambda: sup_con(X, L[:3]), ValueError, "sup_con: labels must have shape (4,), got (3,)"),
    (lambda: sup_con(X, [0, 1, 0, 1]), TypeError, "sup_con: labels must be a tensor, got list"),
    (lambda: sup_con(X, L, Y), ValueError, "sup_con: col_labels must be given together with y, got y alone"),
    (lambda: sup_con(X, L, None, M), ValueError, "sup_con: y must be given together with col_labels, got col_labels"),
    (lambda: sup_con(X, L, Y, L), ValueError, "sup_con: col_labels must have shape (5,), got (4,)"),
    (
        lambda: sup_con(X, L, positives="in"),
        ValueError,
        "sup_con: positives must be one of 'mean_log', 'log_mean', got",
    ),
    (lambda: sup_con(X, L, temperature=0.0), ValueError, "sup_con: temperature must be in (0, inf], got 0.0"),
    (lambda: sup_con(X, L, weight=-torch.ones(4)), ValueError, "sup_con: weight must not be negative, got -1.0"),
    (lambda: sup_con(X, L, Y[:, :2], M), ValueError, "sup_con: y must have the same last dimension as x, got x (4, 3)"),
    (
        lambda: multi_positive_info_nce(X, L, mean_over="all"),
        ValueError,
        "multi_positive_info_nce: mean_over must be one of 'rows', 'pairs', got 'all'",
    ),
    (
        lambda: multi_positive_info_nce(X, L, reduction="avg"),
        ValueError,
        "multi_positive_info_nce: reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
    (
        lambda: soft_info_nce(X, Y, LISTS[:2]),
        TypeError,
        "soft_info_nce: targets must be a tuple (indptr, indices, weights), got 2 elements",
    ),
    (
        lambda: soft_info_nce(X, Y, (LISTS[0], LISTS[1] + 2, LISTS[2])),
        ValueError,
        "soft_info_nce: targets indices must be in [0, 5), got 5 in the list of row 3",
    ),
    (
        lambda: soft_info_nce(X, Y, (LISTS[0], LISTS[1], LISTS[2][:3])),
        ValueError,
        "soft_info_nce: targets weights must have shape (4,), got (3,)",
    ),
    (
        lambda: soft_info_nce(X, Y, (LISTS[0], LISTS[1], 0.5 * LISTS[2])),
        ValueError,
        "soft_info_nce: targets weights of each row must sum to 1, got 0.5 in row 0\n  divide each row's weights",
    ),
    (
        lambda: soft_info_nce(X, Y, (LISTS[0], LISTS[1], torch.full((4,), float("nan")))),
        ValueError,
        "soft_info_nce: targets weights of each row must sum to 1, got nan in row 0",
    ),
    (
        lambda: soft_info_nce(X, Y, (LISTS[0], LISTS[1], -LISTS[2])),
        ValueError,
        "soft_info_nce: targets weights must not be negative, got -1.0",
    ),
    (
        lambda: soft_info_nce(X, Y, (LISTS[0], LISTS[1], torch.ones(4, requires_grad=True))),
        ValueError,
        "soft_info_nce: targets weights must not require a gradient, got one that does; detach it",
    ),
    (
        lambda: soft_info_nce(X, Y, LISTS, label_smoothing=1.5),
        ValueError,
        "soft_info_nce: label_smoothing must be in [0, 1], got 1.5",
    ),
    (
        lambda: soft_info_nce(X, Y, LISTS, label_smoothing=torch.ones(5)),
        ValueError,
        "soft_info_nce: label_smoothing must have shape (4,), got (5,)",
    ),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[m[:60] for *_, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
