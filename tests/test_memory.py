"""Memory is proven, not promised: bytes kept by autograd, and the peak resident set of a process.

That what a loss keeps is linear in the batch is asked of all losses in test_losses_contract.py.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from contrastive_ops import clip, similarity_reduce, similarity_topk
from contrastive_ops.core import extension
from contrastive_ops.testing import LOSSES, saved_bytes

MIB = 1 << 20
ONE_EACH = [name for name, case in LOSSES.items() if name == case.function.__name__ and not case.keeps_scores]


@pytest.mark.parametrize("budget", [0, 1 * MIB, 3 * MIB, 1 << 40])
def test_memory_budget_bounds_what_is_kept(budget):
    a, b = (torch.randn(1000, 64, requires_grad=True) for _ in range(2))
    base, _ = saved_bytes(lambda: clip(a, b, memory_budget=0, backend="cpu"))
    size, _ = saved_bytes(lambda: clip(a, b, memory_budget=budget, backend="cpu"))
    whole = (1000 + 32) * (1000 + 128) * 4
    assert size - base == min(budget, whole)


def test_the_reference_keeps_all_products_or_none():
    a, b = (torch.randn(100, 64, requires_grad=True) for _ in range(2))
    whole, found = 100 * 100 * 4, {}
    for budget in (0, whole - 1, whole):
        size, loss = saved_bytes(lambda budget=budget: clip(a, b, memory_budget=budget, backend="reference"))
        found[budget] = size, torch.autograd.grad(loss, (a, b))
    base = found[0][0]
    assert [size - base for size, _ in found.values()] == [0, 0, whole]
    for _, gradients in found.values():
        assert all(torch.equal(*pair) for pair in zip(gradients, found[0][1], strict=True))


CHILD = """
import json, sys, torch
from contrastive_ops.testing import LOSSES, leaves, reset_peak, resident_bytes

names, rows, depth, backend = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
for name in names:
    case = LOSSES[name]
    options = {"memory_budget": 0} if case.takes_memory_budget else {}
    case(case.inputs(64, depth), backend=backend, **options).backward()
    inputs = case.inputs(rows, depth)
    for t in leaves(inputs):
        t.grad = torch.zeros_like(t)
    base = reset_peak()
    value = case(inputs, backend=backend, **options)
    forward = resident_bytes("VmHWM") - base
    reset_peak()
    value.backward()
    backward = resident_bytes("VmHWM") - base
    assert value.isfinite() and all(t.grad.isfinite().all() for t in leaves(inputs)), name
    del inputs, t, value
    print(json.dumps({name: {"forward": forward, "backward": backward}}), flush=True)
"""


def peaks(names, rows, depth, backend="cpu"):
    """How far the resident set rises in forward and in backward above what is there before, by loss."""
    command = [sys.executable, "-c", CHILD, ",".join(names), str(rows), str(depth), backend]
    done = subprocess.run(command, capture_output=True, text=True)
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {measured[-1:]}\n{done.stderr}"
    return {name: peak for each in measured for name, peak in each.items()}


LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable peak")


@pytest.fixture(scope="module")
def peaks_of_all():
    """One process for all losses: torch is imported once."""
    return peaks(ONE_EACH, 10_000, 32)


@LINUX
@pytest.mark.parametrize("name", ONE_EACH)
def test_peak_resident_set(name, peaks_of_all):
    """The matrix would take 400 MB (two views: 1.6 GB); dense autograd holds several of them."""
    measured, gradients = peaks_of_all[name], 2 * 10_000 * 32 * 4
    assert measured["forward"] <= 96 * MIB + gradients, measured
    assert measured["backward"] <= 96 * MIB + 3 * gradients, measured


@LINUX
def test_peak_resident_set_of_the_reference():
    measured = peaks(["clip"], 6000, 16, "reference")["clip"]
    assert measured["forward"] <= 160 * MIB and measured["backward"] <= 160 * MIB, measured


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_peak_resident_set_at_65536_rows(name):
    """A matrix and another, and one and itself: the sweeps that all losses above share."""
    # Few dimensions: what would grow with pairs of rows does not depend on them, and the time does.
    rows = 65_536 // LOSSES[name].copies
    measured = peaks([name], rows, 8)[name]
    assert measured["forward"] <= 192 * MIB and measured["backward"] <= 192 * MIB, measured


MINING_CHILD = """
import json, sys, numpy, torch
from contrastive_ops import mine_hard_negatives
from contrastive_ops.mining import NegativeRules
from contrastive_ops.testing import reset_peak, resident_bytes

path, rows, depth = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
block = torch.randn(1 << 16, depth).numpy()
corpus = numpy.memmap(path, dtype=numpy.float32, mode="w+", shape=(rows, depth))
for begin in range(0, rows, len(block)):
    corpus[begin : begin + len(block)] = numpy.roll(block, begin // len(block), 1)[: rows - begin]
corpus.flush()
del corpus
corpus = numpy.memmap(path, dtype=numpy.float32, mode="r", shape=(rows, depth))
own = torch.arange(64) * (rows // 64)
query = torch.from_numpy(numpy.array(corpus[own])) + 0.5 * torch.randn(64, depth)
base = reset_peak()
mined = mine_hard_negatives(query, corpus, own, 30, rules=NegativeRules(relative_margin=0.05))
peak = resident_bytes("VmHWM") - base
seen = mined.statistics["eligible"] + mined.statistics["below"] + mined.statistics["positives"]
print(json.dumps({"peak": peak, "counts": mined.counts.tolist(), "seen": seen.tolist()}))
"""


@LINUX
@pytest.mark.slow
def test_a_corpus_of_two_million_rows_is_mined_from_a_memmap(tmp_path):
    """1 GB of rows, of which two blocks are resident at a time."""
    rows, depth = 2_000_000, 128
    command = [sys.executable, "-c", MINING_CHILD, str(tmp_path / "corpus.npy"), str(rows), str(depth)]
    done = subprocess.run(command, capture_output=True, text=True)
    (tmp_path / "corpus.npy").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["peak"] <= 400 * MIB, out["peak"]
    assert out["counts"] == [30] * 64  # no query starves
    assert out["seen"] == [rows] * 64  # statistics are of the whole corpus


# ---- Scratch of the kernels ------------------------------------------------------------------------------------------

COMPILED = pytest.mark.skipif(extension.load() is None, reason="needs the C++ extension")


@COMPILED
def test_what_kernels_keep_is_bounded_and_given_back():
    release = extension.load().release_scratch
    release()
    for rows in (8, 100, 700, 3000):
        a, b = (torch.randn(rows, 64, requires_grad=True) for _ in range(2))
        for _ in range(2):
            clip(a, b, backend="cpu").backward()
            similarity_topk(a, b, 5, backend="cpu")
        assert 0 < release() <= 64 * MIB
        assert release() == 0
    for rows in (4000, 100):
        # From the largest on, all sizes: what does not fit any more is freed.
        x = torch.randn(rows, 2000)
        similarity_reduce(x, torch.randn(20_000, 2000), backend="cpu")
    assert 0 < release() <= 64 * MIB


SCRATCH_CHILD = """
import os, sys, threading, torch
from contrastive_ops import clip, similarity_topk
from contrastive_ops.core import extension
torch.set_num_threads(1)
x, y = torch.randn(200, 32), torch.randn(200, 32)
loss, best = clip(x, y, backend="cpu"), similarity_topk(x, y, 5, backend="cpu")
wrong = []

def check():
    if not torch.equal(clip(x, y, backend="cpu"), loss):
        wrong.append("loss")
    if not torch.equal(similarity_topk(x, y, 5, backend="cpu").indices, best.indices):
        wrong.append("lists")

def work(count):
    while count:
        check()
        count -= 1

several = [threading.Thread(target=work, args=(40,)) for _ in range(4)]
[thread.start() for thread in several]
for _ in range(20):
    extension.load().release_scratch()
[thread.join() for thread in several]
busy = threading.Thread(target=work, args=(600,))
busy.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        check()
        os._exit(len(wrong))
    assert os.waitpid(child, 0)[1] == 0
busy.join()
assert not wrong, wrong
print("done")
"""


@COMPILED
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_scratch_of_many_threads_and_of_forks_while_one_works():
    done = subprocess.run([sys.executable, "-c", SCRATCH_CHILD], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
