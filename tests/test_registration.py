"""torch.library: opcheck, torch.compile without graph breaks or recompilation, meta tensors, saved tensors."""

import pytest
import torch
import torch._dynamo.testing

import contrastive_ops
from contrastive_ops import Fold, Pairs, clip, info_nce, nt_xent, similarity_reduce, similarity_topk
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf, SetFold
from contrastive_ops.core.rules import Slot
from contrastive_ops.reference.row_losses import FOLDS
from contrastive_ops.testing import sample_problem

ops = torch.ops.contrastive_ops


def arguments(backend, self_similarity=False, target=True, biases=True, depth=64, dtype=torch.float64):
    p = sample_problem(9, 7, depth, dtype=dtype, self_similarity=self_similarity, target=target, biases=biases)
    return [p.x, p.y, p.scale.detach().abs().requires_grad_(), p.row_bias, p.col_bias, p.target]


def layout(rows=True, cols=True, kinds=("logsumexp", "max"), scale_of=ScaleOf.ROWS, rules=True):
    """(pair_data, spec) of one set, folded in the directions asked for."""
    data = {Slot.BELOW_ROWS: torch.full((9,), 50.0, dtype=torch.float64)} if rules else {}
    each = LogitSet(scale_of, negate=False, diagonal=0, data=data)
    folds = [SetFold(0, kind, side) for kind in kinds for side, wanted in ((False, rows), (True, cols)) if wanted]
    return Layout((each,), tuple(folds)).encode()


@pytest.mark.parametrize("self_similarity", [False, True])
@pytest.mark.parametrize("rows,cols", [(True, False), (False, True), (True, True)])
def test_opcheck_forward(backend, self_similarity, rows, cols):
    problem = arguments(backend, self_similarity)
    torch.library.opcheck(ops.similarity_reduce_forward, (*problem, *layout(rows, cols), 0, backend))


def test_opcheck_forward_with_kept_products(backend):
    torch.library.opcheck(
        ops.similarity_reduce_forward,
        (*arguments(backend), *layout(), 16, backend),
        # Kept products are memory that only backward reads; comparing them between runs would compare garbage.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_opcheck_forward_without_options(backend):
    problem = arguments(backend, target=False, biases=False)
    problem = [t.detach() if isinstance(t, torch.Tensor) else t for t in problem]
    torch.library.opcheck(ops.similarity_reduce_forward, (*problem, *layout(cols=False, rules=False), 0, backend))


@pytest.mark.parametrize("needs", [31, 1, 2, 20])
def test_opcheck_backward(backend, needs):
    problem = arguments(backend)
    folds, argmax, _, _, kept = ops.similarity_reduce_forward(*problem, *layout(), 0, backend)
    upstream = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (32, 9)]
    torch.library.opcheck(
        ops.similarity_reduce_backward,
        (*problem, *layout(), folds.detach(), argmax, *upstream, None, kept.detach(), needs, backend),
        # Second derivatives recompute through the reference; AOT tracing of them is not promised.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def loss_arguments(backend, kind, x, y, scale, *others):
    """The problem with the sets and folds of a kind of row loss; several positives have rules of their own."""
    sets = [LogitSet(ScaleOf.ROWS)]
    if FOLDS[kind][-1].set == 1:
        ids = {"rows": torch.arange(len(x)) % 3, "cols": torch.arange(len(x if y is None else y)) % 3}
        differ = {Slot.DIFFER_ROWS: ids["rows"], Slot.DIFFER_COLS: ids["cols"]}
        same = {Slot.SAME_ROWS: ids["rows"], Slot.SAME_COLS: ids["cols"]}
        sets = [LogitSet(ScaleOf.ROWS, data=differ), LogitSet(ScaleOf.ROWS, data=same)]
        scale = torch.cat([scale, scale])
    return [x, y, scale.detach().requires_grad_(), *others, *Layout(tuple(sets), FOLDS[kind]).encode()]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", [*FOLDS, "usual target"])
def test_opcheck_loss(backend, kind, reduction):
    x, y, scale, row_bias, col_bias, target = arguments(backend)
    usual = kind == "usual target"
    kind = "softmax" if usual else kind
    if kind == "softmax_both":
        y, col_bias = torch.randn_like(x, requires_grad=True), None
    if usual:
        y, col_bias, x, row_bias, scale = None, None, x[:8].detach().requires_grad_(), None, scale[:8]
    problem = loss_arguments(backend, kind, x, y, scale, row_bias, col_bias, None if usual else target)
    terms = [torch.rand(len(x), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    terms[1] = terms[1] if kind == "softmax" else None
    count = torch.arange(len(x)).double() % 3 if FOLDS[kind][-1].set == 1 else None
    needs = sum(1 << bit for bit, t in enumerate((*problem[:5], *terms)) if t is not None)
    torch.library.opcheck(ops.similarity_loss, (*problem, *terms, count, kind, reduction, needs, 0, backend))


def topk_arguments(backend):
    x, y, scale, row_bias, col_bias, _ = arguments(backend)
    data = {Slot.BELOW_ROWS: torch.full((9,), 50.0, dtype=torch.float64)}
    return [x, y, scale, row_bias, col_bias, *Layout((LogitSet(ScaleOf.ROWS, data=data),), ()).encode()]


@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck_topk_forward(backend, statistics):
    level = torch.zeros(9, dtype=torch.float64) if statistics else None
    torch.library.opcheck(ops.similarity_topk_forward, (*topk_arguments(backend), 3, level, level, backend))


def test_opcheck_topk_at(backend):
    indices = torch.randint(-1, 7, (9, 4))
    torch.library.opcheck(ops.similarity_topk_at, (*topk_arguments(backend), indices, backend))


@pytest.mark.parametrize("needs", [31, 1, 2, 20])
def test_opcheck_topk_backward(backend, needs):
    indices = torch.randint(-1, 7, (9, 4))
    upstream = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        ops.similarity_topk_backward,
        (*topk_arguments(backend), indices, upstream, needs, backend),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def folds_of_one_sweep(a, b, s):
    ids = torch.arange(a.shape[0])
    folds = ("logsumexp", Fold("sum_softplus", scale=s, negate=True), Fold("max", pairs=Pairs(diagonal=0)))
    reduced = similarity_reduce(a, b, reduce=folds, dim=(0, 1), pairs=Pairs(differ=(ids, ids // 2), below=30.0))
    return sum(v.sum() for v in (*reduced.rows, *reduced.cols))


LOSSES = {
    "info_nce": lambda a, b, s: info_nce(a, b, scale=s),
    "info_nce none": lambda a, b, s: info_nce(a, b, scale=s, reduction="none").square().sum(),
    "info_nce smooth": lambda a, b, s: info_nce(a, b, scale=s, label_smoothing=0.1, normalize=True),
    "clip": lambda a, b, s: clip(a, b, scale=s),
    "clip kept": lambda a, b, s: clip(a, b, scale=s, memory_budget=20_000),
    "nt_xent": lambda a, b, s: nt_xent(a, b, scale=s),
    "folds": lambda a, b, s: folds_of_one_sweep(a, b, s),
    "topk": lambda a, b, s: similarity_topk(a, b, 5, scale=s, metric="cosine", pairs=Pairs(diagonal=0)).values.sum(),
    "self": lambda a, b, s: similarity_reduce(a, scale=s, dim=(0, 1), pairs=Pairs(diagonal=1)).rows[:-1].sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_compile_without_graph_break_or_recompilation(name):
    function = LOSSES[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=None)
    for count in (64, 65, 100, 130):
        a, b = (torch.randn(count, 64, requires_grad=True) for _ in range(2))
        s = torch.tensor(2.0, requires_grad=True)
        if count == 64:
            for t in (a, b):
                torch._dynamo.mark_dynamic(t, 0)
        value, expected = compiled(a, b, s), function(a, b, s)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        got = torch.autograd.grad(value, [a, s] if name == "self" else [a, b, s])
        want = torch.autograd.grad(expected, [a, s] if name == "self" else [a, b, s])
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_compile_of_evaluation():
    compiled = torch.compile(lambda a, b: clip(a, b, scale=3.0), fullgraph=True, backend="aot_eager")
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(a, b), clip(a, b, scale=3.0))


def test_inductor_compiles_the_module():
    loss = contrastive_ops.nn.CLIPLoss()
    compiled = torch.compile(loss, fullgraph=True)
    a, b = (torch.randn(40, 64, requires_grad=True) for _ in range(2))
    value = compiled(a, b)
    torch.testing.assert_close(value, loss(a, b))
    value.backward()
    assert loss.logit_scale.grad is not None and a.grad is not None


def test_meta_tensors():
    x, y = torch.empty(5, 4, device="meta"), torch.empty(6, 4, device="meta")
    got = similarity_reduce(x, y, dim=(0, 1))
    assert got.rows.shape == (5,) and got.cols.shape == (6,) and got.rows.device.type == "meta"
    assert clip(x, x).shape == ()
    assert similarity_topk(x, y, 3).indices.shape == (5, 3)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, a, b):
            return info_nce(a, b)

    batch = torch.export.Dim("batch", min=2)
    shapes = {"a": {0: batch}, "b": {0: batch}}
    program = torch.export.export(Step(), (torch.randn(8, 4), torch.randn(8, 4)), dynamic_shapes=shapes)
    a, b = torch.randn(11, 4), torch.randn(11, 4)
    torch.testing.assert_close(program.module()(a, b), info_nce(a, b))


@pytest.mark.parametrize(
    "stem,functions",
    [
        ("similarity_reduce", ("forward", "backward")),
        ("similarity_loss", ("forward",)),
        ("similarity_topk", ("forward", "at", "backward", "merge", "order")),
        ("maxsim", ("forward", "backward")),
        ("similarity_distill", ("forward", "backward")),
        ("similarity_prefix", ("forward", "backward")),
        ("similarity_values", ("forward", "backward")),
    ],
)
def test_one_table_names_every_implementation(stem, functions):
    """The stem rule: what the table says is where the code is, or the folder of a backend that has one.

    A second backend in Triton has what its name adds behind the stem.
    """
    import importlib
    import pathlib

    root = pathlib.Path(__file__).parent.parent
    for name, backend in importlib.import_module(f"contrastive_ops.ops.{stem}").BACKENDS.items():
        path = root / backend.source
        stems = (stem, stem + name.removeprefix("triton"))
        assert path.is_file() and (path.stem in stems or path.parent.name == name), backend.source
        if not backend.unsupported(torch.zeros(1)):
            assert all(callable(getattr(backend.functions(), f)) for f in functions), name


def test_a_first_call_imports_nothing_heavy():
    """torch._dynamo would cost three seconds and 150 MiB in a script that only evaluates."""
    import subprocess
    import sys

    code = """
import sys, torch, contrastive_ops
before = set(sys.modules)
a = torch.randn(9, 4, requires_grad=True)
contrastive_ops.clip(a, a.detach()).backward()
contrastive_ops.info_nce(a, a.detach()).backward()
new = set(sys.modules) - before
assert "torch._dynamo" not in new and len(new) < 20, new
"""
    subprocess.run([sys.executable, "-c", code], check=True)
