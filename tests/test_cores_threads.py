"""More threads than cores, fewer, and calls from within other parallel regions: the same results, in bounded memory."""

import json
import os
import subprocess
import sys

import pytest

from contrastive_ops.core import extension

MIB = 1 << 20
if extension.load() is None:
    pytest.skip("needs the C++ extension", allow_module_level=True)
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")


def child(code, *arguments, **environment):
    """What a process prints, as JSON."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    unlimited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**unlimited, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CALLS = """
import json, os, sys, torch
from contrastive_ops import grouped_matmul, info_nce, maxsim, route, similarity_topk

def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def results():
    x, y = draw(300, 64), draw(9000, 64, seed=1)
    found = [info_nce(x, y[:300]), *similarity_topk(x, y, 40, backend="cpu")[:2]]
    found.append(grouped_matmul(draw(2000, 64), draw(4, 64, 300), torch.arange(5) * 500, backend="cpu"))
    found.append(maxsim(draw(20, 30, 64), draw(80, 60, 64), backend="cpu"))
    found.append(route(draw(9000, 16), 2, backend="cpu").gates)
    return found

def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
"""

NUMBERS = (
    CALLS
    + """
torch.set_num_threads(1)
expected, wrong = results(), []
for count in (2, 7, 64, 3, 1):
    torch.set_num_threads(count)
    if not same(results(), expected):
        wrong.append(count)
if hasattr(os, "sched_setaffinity"):  # as a container with less than the threads it was started with
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(16)
    if not same(results(), expected):
        wrong.append("16 on one core")
print(json.dumps(wrong))
"""
)


def test_more_threads_than_cores_and_fewer():
    assert child(NUMBERS) == []


INSIDE = (
    CALLS
    + """
import ctypes
torch.set_num_threads(1)
expected, found = results(), []
torch.set_num_threads(4)
results()
path = next(line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line)
callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

@callback
def body(_):
    found.append(same(results(), expected))

ctypes.CDLL(path).GOMP_parallel(body, None, 3, 0)
found.append(same(results(), expected))
print(json.dumps(found))
"""
)


@LINUX
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_calls_inside_another_parallel_region():
    with open("/proc/self/maps") as maps:
        if "libgomp" not in maps.read():
            pytest.skip("torch runs on another OpenMP")
    assert child(INSIDE) == [True] * 4


MEMORY = """
import json, sys, torch
from contrastive_ops import grouped_matmul, maxsim, route, similarity_topk
from contrastive_ops.testing import reset_peak, resident_bytes

torch.set_num_threads(int(sys.argv[1]))
depth, k = 64, 50
x, y = torch.randn(2000, depth), torch.randn(50_000, depth)
rows, matrices = torch.randn(16_000, depth), torch.randn(4, depth, 1024)
queries, documents, logits = torch.randn(64, 32, depth), torch.randn(500, 60, depth), torch.randn(60_000, 16)
calls = {
    "similarity_topk": lambda: similarity_topk(x, y, k, backend="cpu")[:2],
    "similarity_topk of few": lambda: similarity_topk(x[:20], y, k, backend="cpu")[:2],
    "grouped_matmul": lambda: [grouped_matmul(rows, matrices, torch.arange(5) * 4000, backend="cpu")],
    "maxsim": lambda: [maxsim(queries, documents, backend="cpu")],
    "route": lambda: [route(logits, 2, backend="cpu").gates],
}
similarity_topk(x[:100], y[:4000], 5, backend="cpu")  # starts the threads
found = {}
for name, call in calls.items():
    base = reset_peak()
    out = call()
    size = sum(t.numel() * t.element_size() for t in out)
    found[name] = resident_bytes("VmHWM") - base - size
    del out
print(json.dumps(found))
"""


@LINUX
@pytest.mark.parametrize("threads", [2, 64])
def test_scratch_of_many_threads_is_bounded(threads):
    """The formula of docs/design.md, for float32."""
    depth, k = 64, 50
    bound = 128 * MIB + threads * (3 * MIB + 4 * 1024 * depth + 1024 * k)
    measured = child(MEMORY, threads)
    assert all(peak <= bound for peak in measured.values()), (measured, bound)
    if threads == 64:  # the bound would mean nothing if it were far away
        assert max(measured.values()) > 8 * MIB, measured
