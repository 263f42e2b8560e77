"""Tensors of every kind at the door of every function, FLOP counts, and messages that print no tensor.

Losses are those of the registry; for each of their tensors, each kind runs with the right value, or is refused in a
message that begins with the function.
"""

import subprocess
import sys

import pytest
import torch
from torch.masked import masked_tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import contrastive_ops
from contrastive_ops import clip, info_nce, route, similarity_reduce, similarity_topk
from contrastive_ops.core import flops
from contrastive_ops.decoding import contrastive_search
from contrastive_ops.metrics import isotropy
from contrastive_ops.moe import ExpertChoice, SoftMoE, SparseMoE
from contrastive_ops.ops import (
    Capacity,
    Gating,
    combine,
    dispatch,
    expert_choice,
    grouped_matmul,
    maxsim,
    similarity_prefix,
    similarity_values,
    stream_rows,
)
from contrastive_ops.testing import LOSSES

REFUSED = (TypeError, ValueError, NotImplementedError)
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def _subclass(run):
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
            made.inner = inner
            return made

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
            return run(cls, function, arguments, keywords or {})

    return Wrapper


def _only_detach(cls, function, arguments, keywords):
    """As quantised weights do, which know a few operators."""
    if function is torch.ops.aten.detach.default:
        return cls(arguments[0].inner)
    raise NotImplementedError(f"{function} is not implemented")


def _unwrapping(cls, function, arguments, keywords):
    def inner(x):
        return x.inner if isinstance(x, cls) else x

    found = function(*tree_map(inner, arguments), **tree_map(inner, keywords))
    return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, found)


class DTensor(torch.Tensor):
    """Known by its name: importing torch's takes seconds."""


Quantised, Unwrapping = _subclass(_only_detach), _subclass(_unwrapping)
RUNS = {
    "parameter": torch.nn.Parameter,
    "subclass": lambda t: t.as_subclass(type("Named", (torch.Tensor,), {})),
    "unwrapping": Unwrapping,
}
KINDS = {
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "masked": lambda t: masked_tensor(t, t > 0),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "quantised subclass": Quantised,
    "DTensor": lambda t: t.as_subclass(DTensor),
}
FUNCTIONS = {
    "similarity_reduce": similarity_reduce,
    "similarity_topk": lambda x: similarity_topk(x, X, 2).values,
    "similarity_values": lambda x: similarity_values(X, x),
    "similarity_prefix": lambda x: similarity_prefix(x, X, dims=[2]).rows,
    "stream_rows": lambda x: stream_rows(lambda logits, rows: logits.sum(1), x),
    "route": lambda x: route(x, 2).gates,
    "expert_choice": lambda x: expert_choice(x, 1.0).gates,
    "dispatch": lambda x: dispatch(x, route(X, 2)),
    "combine": lambda x: combine(x, route(X, 1)),
    "grouped_matmul": lambda x: grouped_matmul(x, X[:5, None].expand(5, 5, 5), torch.tensor([0, 1, 2, 3, 4, 6])),
    "isotropy": isotropy,
    "SparseMoE": lambda x: SparseMoE(5, 4, 3)(x)[0],
    "ExpertChoice": lambda x: ExpertChoice(5, 4, 3)(x)[0],
    "SoftMoE": lambda x: SoftMoE(5, 4, 3)(x),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_functions_refuse_what_they_cannot_read(name, kind):
    with pytest.raises(REFUSED, match=rf"^{name}: \w+ must "):
        FUNCTIONS[name](KINDS[kind](X))


def _tensors():
    for name, case in LOSSES.items():
        if name == case.function.__name__:
            # What the case itself makes of a tensor is not the loss's affair.
            given = case.arrange(case.inputs(6, 5))
            yield from (pytest.param(case, each, id=f"{name}-{each}") for each, t in given.items() if _is_tensor(t))


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("case,name", list(_tensors()))
@pytest.mark.filterwarnings("ignore")
def test_losses_read_or_refuse_every_kind(case, name):
    given = {**case.options, **case.arrange(case.inputs(6, 5))}
    for kind, make in {**KINDS, **RUNS}.items():
        if kind == "parameter" and not given[name].is_floating_point():
            continue
        try:
            made = make(given[name].detach())
        except Exception:  # there is no such tensor of this dtype or dimension
            continue
        with torch.no_grad():
            expected = case.function(**given)
            try:
                found = case.function(**{**given, name: made})
            except REFUSED as error:
                assert kind not in RUNS and str(error).startswith(f"{case.function.__name__}: "), (kind, error)
                continue
        assert kind in RUNS, kind
        expected, found = (value[0] if isinstance(value, tuple) else value for value in (expected, found))
        torch.testing.assert_close(
            found.inner if kind == "unwrapping" and hasattr(found, "inner") else +found, expected
        )


def test_what_to_do_instead():
    for kind, advice in (("DTensor", "to_local"), ("coo", "to_dense"), ("jagged", "padded"), ("masked", "get_data")):
        with pytest.raises(NotImplementedError, match=advice):
            clip(KINDS[kind](X), X)
    with pytest.raises(TypeError, match="dequantize"):
        clip(KINDS["quantised"](X), X)
    with pytest.raises(TypeError, match=r"image must be a tensor, got Proxy\n.*torch.export"):
        torch.fx.symbolic_trace(lambda image: clip(image, X))


def test_maxsim_and_decoding():
    for kind, make in KINDS.items():
        if kind in ("csr", "quantised"):
            continue
        with pytest.raises(REFUSED, match=r"^maxsim: queries"):
            maxsim(make(X.view(2, 3, 5)), X.view(2, 3, 5))
        with pytest.raises(REFUSED, match=r"^contrastive_search: "):
            contrastive_search(make(X.view(2, 3, 5)[:, :2]), torch.rand(2, 2), X.view(2, 3, 5))


# ---- Messages --------------------------------------------------------------------------------------------------------

LONG = torch.arange(5000.0)
WRONG = {
    "a 0-d operand": lambda: clip(torch.tensor(7.25), X),
    "a 1-d operand": lambda: similarity_topk(X, LONG, 3),
    "a choice": lambda: info_nce(X, X, reduction=LONG),
    "a backend": lambda: similarity_reduce(X, backend=LONG),
    "a number": lambda: clip(X, X, scale=LONG),
    "a dim": lambda: similarity_reduce(X, dim=LONG),
    "a fold": lambda: similarity_reduce(X, reduce=LONG),
    "a list": lambda: similarity_reduce(X, reduce=(LONG,)),
    "k": lambda: similarity_topk(X, X, LONG),
    "hidden": lambda: contrastive_ops.losses.linear_cross_entropy(LONG, X, torch.zeros(6, dtype=torch.int64)),
    "counts": lambda: contrastive_ops.losses.UnigramSampler(LONG[:, None]),
    "negatives": lambda: contrastive_ops.losses.negative_sampling(X, X, torch.arange(6), LONG),
    "groups": lambda: contrastive_ops.losses.group_whiten(X, LONG),
    "losses": lambda: route(X, 2, losses=LONG),
    "capacity": lambda: route(X, 2, capacity=LONG),
    "a field": lambda: route(X, 2, capacity=Capacity(limit=LONG)),
    "gating": lambda: expert_choice(X, 1.0, gating=Gating(bias=LONG)),
    "directions": lambda: contrastive_ops.losses.gte(X, X, directions=LONG),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_messages_print_no_tensor(wrong):
    with pytest.raises(REFUSED) as error:
        WRONG[wrong]()
    assert "tensor(" not in str(error.value) and "7.25" not in str(error.value) and len(str(error.value)) < 400


def test_self_search():
    pairs = contrastive_ops.Pairs(diagonal=0)
    expected = similarity_topk(X, X, 2, pairs=pairs)
    for found in (similarity_topk(X, None, 2, pairs=pairs), similarity_topk(X, k=2, pairs=pairs)):
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
    assert not bool((expected.indices == torch.arange(6)[:, None]).any())
    assert torch.equal(similarity_topk(X, None, 2, coarse=torch.bfloat16).indices, similarity_topk(X, X, 2).indices)
    assert torch.equal(similarity_values(X), similarity_values(X, X))
    with pytest.raises(TypeError, match="k must be an int, got NoneType"):
        similarity_topk(X)
    x = X.double().requires_grad_()
    torch.autograd.gradcheck(lambda x: similarity_topk(x, None, 2, pairs=pairs).values, x)


# ---- Floating point operations ---------------------------------------------------------------------------------------


def _count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_flops_of_a_step(backend):
    n, d = 24, 16  # less than what is kept for backward
    x, y = _leaf(n, d), _leaf(n, d)
    product = 2 * n * n * d
    assert _count(lambda: clip(x.detach(), y.detach(), backend=backend)) == product
    assert _count(lambda: clip(x, y, backend=backend).backward()) == 4 * product  # one is computed again
    assert _count(lambda: F.cross_entropy(x @ y.T, torch.arange(n)).backward()) == 3 * product
    assert _count(lambda: info_nce(x, y, backend=backend).backward()) == 3 * product  # gradients made in forward
    assert _count(lambda: similarity_reduce(x, backend=backend).sum().backward()) == 2 * product


def test_flops_of_kept_products():
    x, y = _leaf(24, 64), _leaf(30, 64)
    if contrastive_ops.core.backends.backends()["similarity_reduce"]["cpu"]:
        pytest.skip("only compiled backends keep products")
    assert _count(lambda: similarity_reduce(x, y).sum().backward()) == 3 * 2 * 24 * 30 * 64


def test_flops_of_experts():
    tokens, weights = _leaf(10, 8), _leaf(3, 8, 16)
    offsets = torch.tensor([0, 4, 4, 10])
    assert _count(lambda: grouped_matmul(tokens, weights, offsets).sum().backward()) == 3 * 2 * 10 * 8 * 16
    routing = route(torch.randn(10, 3), 2)
    assert _count(lambda: grouped_matmul(tokens, weights, routing).sum().backward()) == 3 * 2 * 20 * 8 * 16


def test_every_operator_is_counted_or_has_no_product():
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("contrastive_ops::")
    }
    without = {name for name in names - set(flops.FORMULAS) if not name.startswith("expert_routing_")}
    sums = {"ordered_sum", "repeated", "segment_sums", "segment_rows", "unit_rows"}
    differences = {"listed_distances", "listed_distances_backward", "rank_lists"}
    activations = {"grouped_matmul_activate", "grouped_matmul_activate_backward"}
    assert without == {*sums, *differences, *activations, "probe"}
    assert set(flops.FORMULAS) <= names


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if name == case.function.__name__])
def test_flops_of_every_loss(name):
    case = LOSSES[name]
    inputs = case.inputs(6, 5)
    forward = _count(lambda: case(inputs))
    of_scores = ("alignment", "dpo", "triplet", "contrastive", "listwise_cross_entropy")
    assert forward > 0 or name in of_scores or "distillation" in name or "mse" in name
    assert _count(lambda: case(inputs).backward()) >= forward


def test_formulas_wait_for_the_counter():
    code = """
import sys, torch, contrastive_ops
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(4, 8)
with FlopCounterMode(display=False) as counter:
    contrastive_ops.clip(x, x)
assert counter.get_total_flops() == 2 * 4 * 4 * 8, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
