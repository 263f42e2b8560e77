"""Bitwise equality of runs and thread counts, agreement of SIMD levels, and threads that really run."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from pairwise import pairwise
from similarity_cases import KINDS, RULES, Inputs, flat, winners
from similarity_topk_cases import integers, rules_of

from contrastive_ops import clip, info_nce, linear_cross_entropy, nt_xent, similarity_reduce, similarity_topk
from contrastive_ops.core import extension
from contrastive_ops.testing import clustered_pairs, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = {"info_nce": info_nce, "clip": clip, "nt_xent": nt_xent}


def run(loss, dtype, backend, rows=1500, depth=72, memory_budget=None):
    a, b = (t.requires_grad_() for t in clustered_pairs(rows, depth, 0.3, dtype=dtype))
    scale = torch.tensor(20.0, requires_grad=True)
    value = loss(a, b, scale=scale, memory_budget=memory_budget, backend=backend)
    return [value.detach(), *torch.autograd.grad(value, [a, b, scale])]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_two_runs_and_any_number_of_threads_agree_bitwise(name, dtype, threads):
    """Of several chunks of rows; the contract asks it of every loss, with fewer."""
    results = []
    for count in (1, 1, 2, 3, 2):
        threads(count)
        results.append(run(LOSSES[name], dtype, "cpu"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Counts of real threads, and of virtual cores, whose tasks run one after another on the scratch of many threads.
THREADS, CORES = (2, 7, 16), (16, 128)
# (N, M): one tile, narrow blocks, tiles of 64 and 128 rows, more than one chunk of weights.
SIZES = ((20, 30), (130, 100), (300, 250), (700, 900), (1300, 640))


def bits_of_a_sweep(size, rule, dtype, itself, budget):
    """All results and gradients of a call with every fold, in both directions, with ties."""
    inputs = Inputs(*size, 24, itself=itself, dtype=dtype, seed=3)
    with torch.no_grad():
        for rows in (inputs.x, inputs.y):
            if rows is not None:
                rows.mul_(4).round_().div_(4)
                rows[1::7] = rows[0]
    n, m = inputs.n, inputs.m
    options = {"scale": inputs.leaf(n), "row_bias": inputs.leaf(n), "col_bias": inputs.leaf(m)}
    reduced = similarity_reduce(
        inputs.x,
        inputs.y,
        reduce=KINDS,
        dim=(0, 1),
        target=inputs.target(),
        linear=inputs.lists(5, weights=True),
        pairs=inputs.pairs(rule),
        memory_budget=budget,
        backend="cpu",
        **options,
    )
    values = flat(reduced)
    total = sum(torch.where(v.isfinite(), v, 0.0).sum() for v in values if v.requires_grad)
    found = [inputs.x, *(t for t in (inputs.y, *options.values()) if t is not None)]
    return [*values, *winners(reduced), *torch.autograd.grad(total, found)]


@pairwise(size=SIZES, rule=RULES, dtype=(torch.float32, torch.bfloat16), itself=(False, True), budget=(0, 1 << 30))
def test_sweeps_with_rules_have_the_bits_of_one_thread(size, rule, dtype, itself, budget, threads):
    cores = extension.load().virtual_cores

    def found(of_threads, of_cores=0):
        threads(of_threads)
        cores(of_cores)
        try:
            return bits_of_a_sweep(size, rule, dtype, itself, budget)
        finally:
            cores(0)

    expected = found(1)
    for other in (*(found(count) for count in THREADS), *(found(1, count) for count in CORES)):
        for one, many in zip(expected, other, strict=True):
            assert torch.equal(one.nan_to_num(), many.nan_to_num())


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_have_the_bits_of_one_thread(name, dtype, threads):
    """With their lengths, whose ranges follow the threads."""
    results = []
    for count in (1, 3, 64):
        threads(count)
        results.append(run(LOSSES[name], dtype, "cpu", 1100, 200))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(extension.load() is None, reason="needs the C++ extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_gradients_are_multiplied_as_torch_does(dtype, threads):
    """By the upstream gradient, in tasks: the head of a large softmax, whose loss is divided after its sweep."""
    hidden, head = torch.randn(40, 64, dtype=dtype), torch.randn(20_000, 64, dtype=dtype)
    labels, found = torch.randint(0, 20_000, (40,)), []
    for count, factor in ((1, 1.0), (1, 0.3), (7, 0.3)):
        threads(count)
        leaf = head.clone().requires_grad_()
        loss = linear_cross_entropy(hidden, leaf, labels, reduction="sum", backend="cpu")
        found += torch.autograd.grad(loss, leaf, torch.tensor(factor, dtype=loss.dtype))
    once, scaled, by_many = found
    assert torch.equal(scaled, once * torch.tensor(0.3, dtype=dtype)) and torch.equal(scaled, by_many)


CHILD = """
import json, sys
sys.path.insert(0, {tests!r})
from test_determinism import results_of_this_level
print(json.dumps(results_of_this_level()))
"""


def results_of_this_level():
    """By name; in "exact" what no order of summation changes."""
    out = {"level": extension.load().cpu_capability()}
    for name, loss in LOSSES.items():
        for dtype in DTYPES:
            out[f"{name} {dtype}"] = [t.double().flatten().tolist() for t in run(loss, dtype, "cpu", 300, 40)]
    small = torch.arange(-40, 40).reshape(16, 5).remainder(4).float()
    exact = {"one logit of each row": similarity_reduce(small, small[:1], scale=1.0).tolist()}
    for dtype, rows, k in itertools.product(DTYPES, (2, 21), (5, 90)):
        x, y = integers(rows, 37, dtype), integers(700, 37, dtype, seed=1)
        found = similarity_topk(x, y, k, pairs=rules_of(rows, 700, ("exclude", "below", "differ"), 3), backend="cpu")
        exact[f"topk {dtype} {rows} {k}"] = [found.indices.tolist(), found.values.tolist()]
    return {**out, "exact": exact}


@pytest.fixture(scope="module")
def levels():
    """Results of every SIMD level that this processor has, one process each."""
    if not torch.backends.cpu.get_cpu_capability():
        pytest.skip("no capability is known")
    results = {}
    names = extension.load().build_config()["cpu_levels"].split()
    for level in names[: names.index(extension.load().cpu_capability_detected()) + 1]:
        code = CHILD.format(tests=os.path.dirname(__file__))
        environment = {**os.environ, "CONTRASTIVE_OPS_CPU_CAPABILITY": level}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        results[level] = json.loads(done.stdout)
        assert results[level].pop("level") == level  # it must have run as itself, not as its fallback
    return results


def test_levels_agree(levels):
    truth = next(iter(levels.values()))  # of the lowest
    for level, results in levels.items():
        for name, expected in truth.items():
            if name == "exact":
                assert results[name] == expected, level
                continue
            # Only avx512_bf16, amx and neon_bf16 multiply bfloat16 numbers; the other levels convert them to float32.
            bound = 1e-12 if "float64" in name else 4e-3 if "bfloat16" in name else 5e-4 if "16" in name else 2e-5
            for got, want in zip(results[name], expected, strict=True):
                assert relative_error(torch.tensor(got), torch.tensor(want)) <= bound, (level, name)


# Raw thread times: a thread that never ran tile work stays far below the one that did.
THREADS_CHILD = """
import glob, json, os, sys, torch
from contrastive_ops import clip
torch.set_num_threads(int(sys.argv[1]))
a, b = torch.randn(3000, 256), torch.randn(3000, 256)
def times():
    ticks = {}
    for path in glob.glob("/proc/self/task/*/stat"):
        fields = open(path).read().rsplit(")", 1)[1].split()
        ticks[path] = int(fields[11]) + int(fields[12])
    return ticks
before = times()
for _ in range(12):
    clip(a, b, backend="cpu")
after = times()
print(json.dumps(sorted((t - before.get(p, 0) for p, t in after.items()), reverse=True)))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's per-thread times")
def test_two_threads_run_and_set_num_threads_is_honoured():
    # A limit that this process was started with would leave the child without a second thread.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def ticks(count):
        done = subprocess.run(
            [sys.executable, "-c", THREADS_CHILD, str(count)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return json.loads(done.stdout)

    one, two = ticks(1), ticks(2)
    assert one[0] > 5 and one[1] <= max(2, one[0] // 10)
    # Far below a half: on a busy machine the second thread may be kept waiting, but without work it stays at 0.
    assert two[1] > max(2, two[0] // 20)
