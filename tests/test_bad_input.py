"""Every message a user can meet: which function, which argument, what it must be, what it was."""

import re

import pytest
import torch

from contrastive_ops import Fold, Pairs, clip, info_nce, nn, nt_xent, similarity_reduce
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf, SetFold
from contrastive_ops.core.rules import Slot
from contrastive_ops.ops import Guide, merge_lse

X, Y = torch.randn(4, 3), torch.randn(5, 3)
CASES = [
    (
        lambda: similarity_reduce(X, torch.randn(5, 2)),
        ValueError,
        "y must have the same last dimension as x, got x (4, 3) and y (5, 2)",
    ),
    (lambda: similarity_reduce(X[0], Y), ValueError, "x must have two dimensions (rows, D), got (3,)"),
    (lambda: similarity_reduce(X, Y[None]), ValueError, "y must have two dimensions (rows, D), got (1, 5, 3)"),
    (
        lambda: similarity_reduce(X, Y.double()),
        TypeError,
        "y must have the same dtype as x, got x torch.float32 and y torch.float64",
    ),
    (
        lambda: similarity_reduce(X.long(), Y),
        TypeError,
        "x must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    (lambda: similarity_reduce([1.0], Y), TypeError, "x must be a tensor, got list"),
    (
        lambda: similarity_reduce(X, Y.to("meta")),
        ValueError,
        "y must be on the same device as x, got x on cpu and y on meta",
    ),
    (lambda: similarity_reduce(X, Y, reduce="mean"), ValueError, "reduce must be one of 'logsumexp', 'max', "),
    (lambda: similarity_reduce(X, Y, dim=2), ValueError, "dim must be 0, 1 or (0, 1), got 2"),
    (lambda: similarity_reduce(X, Y, dim=(0, 0)), ValueError, "dim must be 0, 1 or (0, 1), got (0, 0)"),
    (lambda: similarity_reduce(X, Y, dim="rows"), ValueError, "dim must be 0, 1 or (0, 1), got 'rows'"),
    (
        lambda: similarity_reduce(X, Y, scale=torch.ones(5)),
        ValueError,
        "scale must be one number or have shape (4,), got (5,)",
    ),
    (
        lambda: similarity_reduce(X, Y, scale=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "scale must be a number or a floating tensor, got torch.int64",
    ),
    (
        lambda: similarity_reduce(X, Y, scale=torch.ones(4, 1)),
        ValueError,
        "scale must be one number or have shape (4,), got (4, 1)",
    ),
    (lambda: similarity_reduce(X, Y, scale="1"), TypeError, "scale must be a number, got str"),
    (lambda: similarity_reduce(X, Y, row_bias=torch.ones(5)), ValueError, "row_bias must have shape (4,), got (5,)"),
    (lambda: similarity_reduce(X, Y, col_bias=torch.ones(4)), ValueError, "col_bias must have shape (5,), got (4,)"),
    (
        lambda: similarity_reduce(X, Y, col_bias=torch.ones(5).long()),
        TypeError,
        "col_bias must be a floating tensor, got torch.int64",
    ),
    (lambda: similarity_reduce(X, Y, col_bias=1.0), TypeError, "col_bias must be a tensor, got float"),
    (
        lambda: similarity_reduce(X, Y, target=torch.arange(4).float()),
        TypeError,
        "target must be int64, got torch.float32",
    ),
    (lambda: similarity_reduce(X, Y, target=torch.arange(3)), ValueError, "target must have shape (4,), got (3,)"),
    (lambda: similarity_reduce(X, Y, target=torch.arange(4) + 2), ValueError, "target must be in [0, 5), got 5"),
    (lambda: similarity_reduce(X, Y, target=torch.arange(4) - 1), ValueError, "target must be in [0, 5), got -1"),
    (lambda: similarity_reduce(X, Y[:0], target=torch.arange(4)), ValueError, "target must be in [0, 0), got 3"),
    (
        lambda: similarity_reduce(X, Y, memory_budget=-1),
        ValueError,
        "memory_budget must be at least 0, got -1",
    ),
    (
        lambda: similarity_reduce(X, Y, backend="gpu"),
        ValueError,
        "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'triton_persistent', 'cuda', 'hopper', got 'gpu'",
    ),
    (
        lambda: similarity_reduce(X.to("meta"), Y.to("meta"), backend="cpu"),
        NotImplementedError,
        "backend 'cpu' cannot run these inputs:\n    device=meta (supported: cpu)",
    ),
]
IDS, OTHER_IDS = torch.arange(4), torch.arange(5)
FOLD_CASES = [
    (lambda: Fold("mean"), ValueError, "Fold: name must be one of 'logsumexp', 'max', "),
    (lambda: Fold("max", pairs={}), TypeError, "Fold: pairs must be Pairs or None, got dict"),
    (lambda: Pairs(differ=IDS), TypeError, "Pairs: differ must be a tuple of 2 tensors, got Tensor"),
    (lambda: Pairs(same=(IDS,)), TypeError, "Pairs: same must be a tuple of 2 tensors, got 1 elements"),
    (lambda: Pairs(guide=X), TypeError, "Pairs: guide must be a Guide or None, got Tensor"),
    (lambda: Pairs(fill="0"), TypeError, "Pairs: fill must be a number, got str"),
    (lambda: reduce(()), ValueError, "similarity_reduce: reduce must name at least one fold, got ()"),
    (lambda: reduce(3), TypeError, "similarity_reduce: reduce must be a name, a Fold or a tuple of these, got int"),
    (
        lambda: ruled(differ=(IDS, IDS)),
        ValueError,
        "similarity_reduce: pairs.differ of the columns must have shape (5,)",
    ),
    (
        lambda: ruled(same=(IDS.float(), OTHER_IDS)),
        TypeError,
        "similarity_reduce: pairs.same of the rows must be int64, got torch.float32",
    ),
    (
        lambda: ruled(exclude=(torch.tensor([0, 1, 1, 2, 3]), torch.tensor([0, 5, 1]))),
        ValueError,
        "similarity_reduce: exclude indices must be in [0, 5), got 5 in the list of row 2",
    ),
    (
        lambda: ruled(exclude=(torch.tensor([0, 2, 1, 2, 2]), torch.tensor([0, 1]))),
        ValueError,
        "similarity_reduce: exclude indptr must rise from 0 to the 2 indices, got 0 to 2, not monotonic",
    ),
    (
        lambda: ruled(exclude=(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1]))),
        ValueError,
        "similarity_reduce: exclude indptr must have shape (5,), got (4,)",
    ),
    (
        lambda: ruled(below="1"),
        TypeError,
        "Pairs: below must be a number, got str",
    ),
    (
        lambda: ruled(above=torch.ones(5)),
        ValueError,
        "similarity_reduce: pairs.above must be one number or have shape (4,), (4, 1) or (1, 5), got (5,)",
    ),
    (
        lambda: ruled(guide=Guide(X, Y[:4], 0.5)),
        ValueError,
        "similarity_reduce: guide.gy must have 5 rows, got (4, 3)",
    ),
    (
        lambda: similarity_reduce(X, pairs=Pairs(guide=Guide(X, X, 0.5))),
        ValueError,
        "similarity_reduce: guide.gy must be None where a matrix is compared with itself, got (4, 3)",
    ),
    (
        lambda: reduce(
            (Fold("max", pairs=Pairs(guide=Guide(X, Y, 0.5))), Fold("max", pairs=Pairs(guide=Guide(X * 2, Y, 1.0))))
        ),
        NotImplementedError,
        "similarity_reduce: pairs.guide must be one guide for all folds of a sweep",
    ),
    (
        lambda: ruled(log_weight=(torch.ones(2, 2), IDS, OTHER_IDS)),
        ValueError,
        "similarity_reduce: pairs.log_weight classes of the rows must be in [-1, 2), got 3",
    ),
    (
        lambda: ruled(log_weight=(torch.ones(5, 5, requires_grad=True), IDS, OTHER_IDS)),
        ValueError,
        "similarity_reduce: pairs.log_weight must not require a gradient, got one that does; detach it",
    ),
    (lambda: similarity_reduce(X, Y, pairs={}), TypeError, "similarity_reduce: pairs must be Pairs or None, got dict"),
    (
        lambda: similarity_reduce(X, Y, linear=IDS),
        TypeError,
        "similarity_reduce: linear must be (indptr, indices) or (indptr, indices, weights), got Tensor",
    ),
    (
        lambda: similarity_reduce(X, Y, linear=(torch.tensor([0, 1, 1, 1, 1]), torch.tensor([2]), torch.ones(2))),
        ValueError,
        "similarity_reduce: linear weights must have shape (1,), got (2,)",
    ),
    (
        lambda: similarity_reduce(X, Y, dim=0, col_scale=torch.ones(4)),
        ValueError,
        "similarity_reduce: col_scale must be one number or have shape (5,), got (4,)",
    ),
]


def reduce(folds):
    return similarity_reduce(X, Y, reduce=folds)


def ruled(**rules):
    return similarity_reduce(X, Y, pairs=Pairs(**rules))


LOSS_CASES = [
    (
        lambda: info_nce(X, torch.randn(5, 2)),
        ValueError,
        "info_nce: key must have the same last dimension as query, got query (4, 3) and key (5, 2)",
    ),
    (
        lambda: info_nce(Y, X),
        ValueError,
        "info_nce: key must have at least as many rows as query where target is not given, got query (5, 3) and",
    ),
    (lambda: info_nce(X, Y, target=torch.full((4,), 9)), ValueError, "info_nce: target must be in [0, 5), got 9"),
    (
        lambda: info_nce(X, Y, temperature=0.1, scale=10.0),
        ValueError,
        "info_nce: temperature and scale must not both be given",
    ),
    (lambda: info_nce(X, Y, temperature=0.0), ValueError, "info_nce: temperature must be in (0, inf], got 0.0"),
    (lambda: info_nce(X, Y, temperature=float("nan")), ValueError, "info_nce: temperature must be in (0, inf], got"),
    (lambda: info_nce(X, Y, temperature="x"), TypeError, "info_nce: temperature must be a number, got str"),
    (
        lambda: info_nce(X, Y, reduction="avg"),
        ValueError,
        "info_nce: reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
    (lambda: info_nce(X, Y, label_smoothing=1.5), ValueError, "info_nce: label_smoothing must be in [0, 1], got 1.5"),
    (lambda: info_nce(X, Y, weight=torch.ones(5)), ValueError, "info_nce: weight must have shape (4,), got (5,)"),
    (
        lambda: info_nce(X, Y, torch.ones(2, 4)),
        ValueError,
        "info_nce: negatives must have the same last dimension as query",
    ),
    (
        lambda: info_nce(X, Y, row_negatives=torch.ones(2, 4, 3)),
        ValueError,
        "info_nce: row_negatives must have shape (4, 3) or (4, K, 3), got (2, 4, 3)",
    ),
    (
        lambda: info_nce(X, Y, row_negatives=torch.ones(4, 2, 3).half()),
        TypeError,
        "info_nce: row_negatives must have the same dtype as query",
    ),
    (lambda: clip(X, Y), ValueError, "clip: text must have the same shape as image, got image (4, 3) and text (5, 3)"),
    (lambda: nt_xent(X, Y), ValueError, "nt_xent: z1 must have the same shape as z0, got z0 (4, 3) and z1 (5, 3)"),
    (
        lambda: clip(X, X, scale=torch.ones(3)),
        ValueError,
        "clip: scale must be one number or have shape (4,), got (3,)",
    ),
    (
        lambda: clip(X, X, backend="gpu"),
        ValueError,
        "clip: backend must be one of 'auto', 'reference', 'cpu', 'triton', 'triton_persistent', 'cuda', 'hopper', "
        "got 'gpu'",
    ),
    (
        lambda: nt_xent(X, X, memory_budget=-5),
        ValueError,
        "nt_xent: memory_budget must be at least 0, got -5",
    ),
    (lambda: merge_lse(), ValueError, "merge_lse: lse must be at least one tensor, got none"),
    (
        lambda: merge_lse(torch.ones(2), torch.ones(3)),
        ValueError,
        "merge_lse: lse must have one shape, got (2,) and (3,)",
    ),
    (lambda: Pairs(diagonal=0.5), TypeError, "Pairs: diagonal must be an int, got float"),
    (lambda: nn.CLIPLoss(-1.0), ValueError, "CLIPLoss: temperature must be in (0, inf), got -1.0"),
    (lambda: nn.InfoNCELoss(max_scale=0.0), ValueError, "InfoNCELoss: max_scale must be in (0, inf], got 0.0"),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:50] for *_, m in CASES])
def test_similarity_reduce(call, error, message):
    with pytest.raises(error, match="^" + re.escape(f"similarity_reduce: {message}")):
        call()


@pytest.mark.parametrize("call,error,message", FOLD_CASES, ids=[m[:70] for *_, m in FOLD_CASES])
def test_folds_and_pairs(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("call,error,message", LOSS_CASES, ids=[m[:50] for *_, m in LOSS_CASES])
def test_losses(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message) if ":" in message else re.escape(message)):
        call()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_target_out_of_range_is_found_by_every_backend(backend):
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\), got 7"):
        info_nce(X.detach().requires_grad_(), Y, target=torch.tensor([0, 1, 7, 2]), backend=backend)


def test_environment_variable_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="backend must be one of .* got 'gpu'"):
        similarity_reduce(X, Y)
    similarity_reduce(X, Y, backend="reference")


def test_wrong_capability_is_an_error_not_an_abort(monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_OPS_CPU_CAPABILITY", "sse9")
    with pytest.raises(ValueError, match="CONTRASTIVE_OPS_CPU_CAPABILITY: value must be a level of this .* got sse9"):
        similarity_reduce(X, Y, backend="cpu")


def test_compiled_functions_protect_memory():
    """Called behind Python's back with sizes that do not fit, the extension refuses."""
    from contrastive_ops.core import extension

    functions = extension.functions("similarity_reduce")

    def forward(y=Y, scale=1, row_bias=None, data=None, folds=((0, "logsumexp", False),)):
        each = LogitSet(ScaleOf.ALL, data=data or {})
        layout = Layout((each,), tuple(SetFold(*fold) for fold in folds))
        functions.forward(X, y, torch.ones(scale), row_bias, None, None, *layout.encode(), 0)

    forward()
    ids, indptr = torch.arange(4), torch.tensor([0, 1, 1, 1, 1])
    for arguments, message in (
        ({"row_bias": torch.ones(3)}, "row_bias must have shape"),
        ({"y": torch.ones(5, 9)}, "same last dimension"),
        ({"scale": 4}, "scale must have shape"),
        ({"folds": ((1, "max", False),)}, "spec must name sets and kinds"),
        ({"data": {Slot.DIFFER_ROWS: ids, Slot.DIFFER_COLS: ids}}, "differ_cols must have shape"),
        ({"data": {Slot.EXCLUDE_INDPTR: indptr, Slot.EXCLUDE_INDICES: torch.tensor([5])}}, "indices must be below 5"),
        ({"data": {Slot.EXCLUDE_INDPTR: indptr, Slot.EXCLUDE_INDICES: ids}}, "indptr must span the indices"),
        ({"data": {Slot.GUIDE_X: X, Slot.GUIDE_Y: torch.ones(5, 2)}}, "guide_y must have shape"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            forward(**arguments)
    with pytest.raises((ValueError, RuntimeError), match="spec must describe all sets and folds"):
        functions.forward(X, Y, torch.ones(1), None, None, None, [], [1, 1], 0)
