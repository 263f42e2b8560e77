"""Virtual cores: what is counted when tasks are scheduled on cores that are not there; nothing here is timed."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import cores, cores_plot
from benchmarks import virtual_cores as virtual
from contrastive_ops import grouped_matmul, similarity_reduce, similarity_topk
from contrastive_ops.core import extension
from contrastive_ops.moe import Router

ROOT = Path(__file__).resolve().parent.parent
COMPILED = pytest.mark.skipif(extension.load() is None, reason="needs the C++ extension")


@pytest.fixture
def virtual_cores():
    """Sets their number, and returns the regions since then."""
    switch = extension.load().virtual_cores
    switch(0)
    yield switch
    switch(0)


def multiply():
    a, b = torch.randn(4096, 64), torch.randn(8, 64, 128)
    return grouped_matmul(a, b, torch.arange(9) * 512, backend="cpu")


@COMPILED
@pytest.mark.parametrize("count", [1, 4, 128])
def test_regions_are_counted(virtual_cores, count):
    assert virtual_cores(count) == []
    multiply()
    regions = virtual_cores(0)
    assert regions and max(len(seconds) for *_, seconds in regions) > 1
    for elapsed, makespan, stages, seconds in regions:
        total = sum(seconds)
        assert len(seconds) == sum(tasks for tasks, _ in stages) and min(seconds) > 0
        assert max(seconds) <= makespan * (1 + 1e-9) and makespan <= total * (1 + 1e-9)
        assert makespan >= total / count * (1 - 1e-9) and elapsed >= total
        # The benchmark schedules as the extension does.
        region = virtual.Region(tuple((tasks, tuple(after)) for tasks, after in stages), tuple(seconds))
        assert region.makespan(count) == pytest.approx(makespan, rel=1e-9)
    assert virtual_cores(0) == []  # the account was cleared


@COMPILED
def test_nothing_is_counted_when_it_is_off_or_by_another_thread(virtual_cores):
    multiply()
    assert virtual_cores(3) == []
    other = threading.Thread(target=multiply)
    other.start()
    other.join()
    assert virtual_cores(0) == []


@COMPILED
def test_as_many_threads_as_virtual_cores(virtual_cores):
    """A search cuts its rows for the threads that there are."""
    x, y = torch.randn(2048, 64), torch.randn(4096, 64)
    counts = []
    for count in (1, 8):
        virtual_cores(count)
        similarity_topk(x, y, 5, backend="cpu")
        counts.append(len(virtual_cores(0)[0][-1]))
    assert 8 <= counts[0] < counts[1]  # of which most pack the columns


@COMPILED
def test_a_large_map_of_a_router_is_cut_into_tasks(virtual_cores):
    """Forward and backward; a small one, and that of another backend, is torch's."""
    gate = Router(64, 32, 2)
    for rows, backend, own in ((2100, "auto", True), (2100, "reference", False), (1900, "auto", False)):
        tokens = torch.randn(rows, 64, requires_grad=True)
        upstream = torch.randn(rows, 32)
        virtual_cores(4)
        logits = gate.logits(tokens, backend=backend)
        forward = virtual_cores(4)
        found = torch.autograd.grad(logits, [tokens, gate.weight], upstream)
        backward = virtual_cores(0)
        expected = tokens @ gate.weight.T
        assert (bool(forward), bool(backward)) == (own, own)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        truth = torch.autograd.grad(expected, [tokens, gate.weight], upstream)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@COMPILED
@pytest.mark.parametrize("count", [-1, 1025])
def test_cores_out_of_range(virtual_cores, count):
    with pytest.raises(ValueError, match=rf"virtual_cores: cores must be in \[0, 1024\], got {count}"):
        virtual_cores(count)


def region(*seconds, stages=None):
    return virtual.Region(stages or ((len(seconds), ()),), seconds)


def test_a_region_is_scheduled():
    assert region(3.0, 1.0, 1.0, 1.0).makespan(2) == 3.0
    assert region(1.0, 1.0, 1.0, 3.0).makespan(2) == 4.0  # the last task comes last
    assert region(1.0, 2.0).makespan(128) == 2.0
    # Two tasks, then one that waits for both, an empty stage that waits for it, and two behind that one.
    chain = ((2, ()), (1, (0,)), (0, (1,)), (2, (2,)))
    assert region(1.0, 2.0, 4.0, 1.0, 5.0, stages=chain).makespan(8) == 11.0
    free = ((2, ()), (1, (0,)), (2, ()))
    assert region(1.0, 2.0, 4.0, 1.0, 5.0, stages=free).makespan(2) == 8.0  # who waits takes nothing else


def test_seconds_of_a_step_and_what_regions_lose():
    regions = (region(2.5, 1.5, 2.0, 2.0), region(2.0, 2.0, 2.0, 2.0), region(3.0))
    modelled = virtual.Modelled(4, regions, outside=1.0)
    assert modelled.work == 19.0
    assert modelled.seconds == pytest.approx(8.5 + 2 * virtual.REGION_SECONDS)
    assert [found[:3] for found in modelled.lost()] == [(2.25, 1, 1), (0.5, 2, 4)]
    assert virtual.Modelled(1, regions, outside=1.0).seconds == 20.0


def test_the_least_of_each_task_counts():
    """Of regions that are cut alike, however many cores they were cut for; the n-th of its kind is one region."""
    first = virtual.Modelled(1, (region(1.0, 5.0), region(2.0), region(3.0)), outside=3.0)
    other = virtual.Modelled(2, (region(4.0, 2.0), region(7.0), region(1.0)), outside=0.5)
    apart = virtual.Modelled(4, (region(3.0, 3.0), region(1.0, 1.0, 1.0)), outside=9.0)
    regions = (region(1.0, 2.0), region(2.0), region(1.0))
    assert virtual.fastest([first, other, apart]) == [
        virtual.Modelled(1, regions, outside=0.5),
        virtual.Modelled(2, regions, outside=0.5),
        virtual.Modelled(4, (region(1.0, 2.0), region(1.0, 1.0, 1.0)), outside=9.0),
    ]


@COMPILED
def test_numbers_of_cores_share_what_is_recorded_where_cuts_are_the_same():
    x, y = torch.randn(512, 64), torch.randn(512, 64)
    one, many = virtual.model(lambda: similarity_reduce(x, y, backend="cpu"), [1, 16], 1)
    assert (one.regions, one.outside) == (many.regions, many.outside) and many.seconds < one.seconds
    x, y = torch.randn(2048, 64), torch.randn(4096, 64)  # a search cuts its rows for the threads that there are
    one, many = virtual.model(lambda: similarity_topk(x, y, 5, backend="cpu"), [1, 8], 1)
    assert len(one.regions[0].seconds) < len(many.regions[0].seconds)


@COMPILED
def test_the_table_and_its_rows():
    work = next(work for work in cores.works() if (work.op, work.size) == ("clip", "small"))
    found = cores.model(work.build(), cores.CORES, 1)
    assert len(cores.line(work, found).split()) >= len(cores.CORES) + 4
    assert [row["provider"] for row in cores.rows_of(work, found, 1)] == [f"{n} virtual cores" for n in cores.CORES]
    assert extension.load().virtual_cores(0) == []


def test_every_primitive_and_loss_has_three_sizes():
    sizes: dict[str, list[str]] = {}
    for work in cores.works():
        sizes.setdefault(work.op, []).append(work.size)
    assert all(found == list(cores.SIZES) for found in sizes.values())
    assert {"clip", "nt_xent", "sup_con", "siglip", "similarity_topk", "route", "maxsim", "SparseMoE"} <= set(sizes)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_stages_wait_for_each_other(tmp_path, sanitizer):
    """On threads, more threads than cores, one thread and virtual cores: csrc/threads.cpp without Python."""
    program, sources = tmp_path / "stages", ["csrc/threads.cpp", "tests/threads_host/stages.cpp"]
    options = ["-std=c++17", "-O1", "-rdynamic", "-fopenmp", "-Wl,--no-as-needed", "-lgomp"]
    if sanitizer:  # libgomp's own barriers are not known to it: threads of the standard library stand in
        options = ["-std=c++17", "-O1", "-g", "-rdynamic", "-pthread", "-DSTANDARD_THREADS", f"-fsanitize={sanitizer}"]
    command = ["g++", *options, *(str(ROOT / source) for source in sources), "-o", str(program), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and sanitizer and "tsan" in done.stderr:
        pytest.skip("no thread sanitizer")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, env={**os.environ, "OMP_DYNAMIC": "false"})
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr + done.stdout


def test_the_picture_is_of_the_newest_run():
    def row(run, cores_, ms, op="clip", size="large"):
        named = {"provider": f"{cores_} virtual cores", "kind": "modelled", "status": "ok", "min_ms": ms}
        return {"run": run, "case": f"cores-{op}-{size}", "op": op, "shapes": "8x8", **named}

    rows = [row("1", 1, "9"), row("1", 2, "9"), row("2", 1, "8"), row("2", 2, "4"), row("2", 1, "3", size="small")]
    found = cores_plot.curves([*rows, row("2", 1, "7", op="one that is not shown")])
    assert list(found) == ["cores-clip-large"]
    assert {count: each["min_ms"] for count, each in found["cores-clip-large"].items()} == {1: "8", 2: "4"}
