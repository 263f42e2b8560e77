"""Results have the same bits on 1 to 128 virtual cores: primitives whose tasks are cut by the number of threads."""

import pytest
import torch
from similarity_topk_cases import integers, rules_of, select

import contrastive_ops as co
from contrastive_ops import ops
from contrastive_ops.core import extension

if extension.load() is None:
    pytest.skip("needs the C++ extension", allow_module_level=True)

CORES = (1, 2, 5, 16, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def topk(rows, columns, k, dtype, ties=True, rules=(), **options):
    """Integers have many ties, and rules drop many pairs."""
    if ties:
        x, y = integers(rows, 24, dtype), integers(columns, 24, dtype, seed=1)
    else:
        x, y = torch.randn(rows, 24).to(dtype), torch.randn(columns, 24).to(dtype)
    pairs = rules_of(rows, columns, rules, 3) if rules else None
    found = ops.similarity_topk(x, y, k, pairs=pairs, backend="cpu", **options)
    return [found.values, found.indices, found.counts]


def ascending(k):
    """Each block of columns is better than all before it: thresholds never help."""
    x, y = torch.ones(9, 8), torch.arange(9000.0)[:, None].expand(-1, 8) / 9000
    found = ops.similarity_topk(x, y, k, backend="cpu")
    return [found.values, found.indices]


def nothing_but_ties(k):
    found = ops.similarity_topk(torch.ones(40, 32), torch.ones(9001, 32), k, backend="cpu")
    return [found.values, found.indices]


def statistics(rules):
    x, y = integers(50, 24, torch.float32), integers(9001, 24, torch.float32, seed=1)
    found = select(x, y, 10, pairs=rules_of(50, 9001, rules, 3), count_above=torch.ones(50), backend="cpu")
    return [found.top.values, found.top.indices, *found.statistics.values()]


def experts(dtype):
    layer = co.moe.SparseMoE(96, 80, 8, 2, gated=True, bias=True, router={"capacity": 1.25}).to(dtype)
    tokens = leaf(1500, 96, dtype=dtype)
    out, routing = layer(tokens)
    return [out, *torch.autograd.grad(out.float().square().sum(), [tokens, *layer.parameters()])]


def router(dtype):
    """Of more products than `moe.router.LARGE`."""
    gate, tokens = co.moe.Router(700, 11, 2, learned_noise=True).to(dtype), leaf(1100, 700, dtype=dtype)
    logits = gate.logits(tokens, torch.Generator().manual_seed(1))
    return [logits, *torch.autograd.grad(logits.square().sum(), [tokens, *gate.parameters()])]


def groups(dtype):
    a, b, bias = leaf(1100, 300, dtype=dtype), leaf(5, 300, 700, dtype=dtype), leaf(5, 700, dtype=dtype)
    out = ops.grouped_matmul(a, b, torch.tensor([0, 3, 3, 600, 611, 1000]), bias, backend="cpu")
    return [out, *torch.autograd.grad(out.float().square().sum(), [a, b, bias])]


def route():
    logits = leaf(9000, 32)
    routing = ops.route(logits, 2, losses=("switch",), capacity=1.0, backend="cpu")
    total = routing.gates.sum() + routing.losses["switch"].sum()
    return [routing.gates, routing.experts, routing.slots, *torch.autograd.grad(total, logits)]


def interact(dtype):
    queries, documents = leaf(21, 17, 64, dtype=dtype), leaf(90, 33, 64, dtype=dtype)
    scores = ops.maxsim(queries, documents, backend="cpu")
    return [scores, *torch.autograd.grad(scores.square().sum(), [queries, documents])]


RULES = ("exclude", "below", "differ")
SEARCHES = ((1, 20_000, 40), (13, 9001, 3), (150, 9001, 100))
CALLS = {
    **{f"topk {n}x{m} {dtype}": (topk, n, m, k, dtype) for n, m, k in SEARCHES for dtype in DTYPES},
    "topk of few columns": (topk, 700, 333, 50, torch.float32),
    "topk of no ties": (topk, 150, 9001, 100, torch.float32, False),
    "topk with rules": (topk, 60, 9001, 20, torch.float32, True, RULES),
    "topk with rules in 16 bits": (topk, 60, 9001, 20, torch.float16, True, RULES),
    "topk of more than there are": (topk, 20, 9001, 9500, torch.float32),
    "topk of ascending columns": (ascending, 30),
    "topk with statistics": (statistics, RULES),
    "topk of equal columns": (nothing_but_ties, 77),
    **{f"SparseMoE {dtype}": (experts, dtype) for dtype in DTYPES},
    **{f"Router {dtype}": (router, dtype) for dtype in DTYPES},
    **{f"grouped_matmul {dtype}": (groups, dtype) for dtype in DTYPES},
    "route": (route,),
    **{f"maxsim {dtype}": (interact, dtype) for dtype in DTYPES},
}


@pytest.mark.parametrize("name", CALLS)
def test_bits_on_virtual_cores(name):
    function, *arguments = CALLS[name]
    switch, results = extension.load().virtual_cores, []
    try:
        for cores in CORES:
            torch.manual_seed(0)
            switch(cores)
            results.append(function(*arguments))
    finally:
        switch(0)
    for cores, other in zip(CORES[1:], results[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), f"{cores} cores"


def test_lists_are_those_of_the_reference():
    """Cut for many cores, against plain torch."""
    switch = extension.load().virtual_cores
    x, y = integers(33, 24, torch.float32), integers(9001, 24, torch.float32, seed=1)
    pairs = rules_of(33, 9001, RULES, 3)
    switch(64)
    try:
        found = ops.similarity_topk(x, y, 70, pairs=pairs, backend="cpu")
    finally:
        switch(0)
    expected = ops.similarity_topk(x, y, 70, pairs=pairs, backend="reference")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
