"""Virtual cores: what is counted when tasks are scheduled on cores that are not there; nothing here is timed."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import cores, cores_plot
from contrastive_ops import grouped_matmul, similarity_topk
from contrastive_ops.core import extension

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
    assert regions and max(tasks for tasks, *_ in regions) > 1
    for _, total, makespan, longest in regions:
        assert 0 < longest <= makespan * (1 + 1e-9) and makespan <= total * (1 + 1e-9)
        assert makespan >= total / count * (1 - 1e-9)
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
        counts.append(virtual_cores(0)[0][0])
    assert 8 <= counts[0] < counts[1]  # of which most pack the columns


@COMPILED
@pytest.mark.parametrize("count", [-1, 1025])
def test_cores_out_of_range(virtual_cores, count):
    with pytest.raises(ValueError, match=rf"virtual_cores: cores must be in \[0, 1024\], got {count}"):
        virtual_cores(count)


def test_seconds_of_a_step_and_what_regions_lose():
    regions = [(4, 8.0, 2.5, 2.5), (4, 8.0, 2.0, 2.0), (1, 3.0, 3.0, 3.0)]
    modelled = cores.Modelled(4, regions, outside=1.0)
    assert modelled.work == 19.0
    assert modelled.seconds == pytest.approx(8.5 + 2 * cores.REGION_SECONDS)
    assert [found[:3] for found in modelled.lost()] == [(2.25, 1, 1), (0.5, 2, 4)]
    assert cores.Modelled(1, regions, outside=1.0).seconds == 8.5


@COMPILED
def test_the_table_and_its_rows():
    work = next(work for work in cores.works() if (work.op, work.size) == ("clip", "small"))
    step = work.build()
    found = cores.model(step, cores.CORES, 1)
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
    def row(run, cores_, ms, case="cores-x-large"):
        named = {"provider": f"{cores_} virtual cores", "kind": "modelled", "status": "ok", "min_ms": ms}
        return {"run": run, "case": case, "op": "x", "shapes": "8x8", **named}

    rows = [row("1", 1, "9"), row("1", 2, "9"), row("2", 1, "8"), row("2", 2, "4"), row("2", 1, "3", "cores-x-small")]
    found = cores_plot.curves(rows)
    assert list(found) == ["cores-x-large"]
    assert {count: each["min_ms"] for count, each in found["cores-x-large"].items()} == {1: "8", 2: "4"}
