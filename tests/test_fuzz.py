"""The fuzzer: a fixed short run, that it finds and simplifies what is wrong, and raw calls of the extension.

`make fuzz CASES=10000 SEED=...` is the long run; docs/reliability.md has what was run.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import SUBJECTS, check, draw_case, run, shrunk
from fuzz.__main__ import save, saved
from fuzz.cases import FINE, Case, attempt
from fuzz.children import Report
from fuzz.formulas import FORMULAS

from benchmarks import tables_reliability
from contrastive_ops.core import extension
from contrastive_ops.testing import LOSSES

HERE = Path(__file__).parent
needs_extension = pytest.mark.skipif(extension.load() is None, reason=str(extension.why_missing()))


@needs_extension
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_short_run(name):
    counts, failed = run({name: SUBJECTS[name]}, 12 if name != "losses" else 30, seed=20261130)
    assert not failed, "\n".join(f"{case.reproducer()}: {said}" for case, said in failed)
    assert counts[name] > 0


class Off(type(SUBJECTS["grouped_matmul"])):
    """The answer to a matrix of three and more columns is wrong in its last one."""

    name = "grouped_matmul"

    def build(self, **parameters):
        call = super().build(**parameters)

        def wrong(inputs):
            (out,) = call.ours(inputs)
            return [out + (torch.arange(out.shape[1]) >= 3) * 1e-3]

        return dataclasses.replace(call, ours=wrong)


def test_what_is_wrong_is_found_and_made_simple():
    subject, rng = Off(), random.Random(3)
    case = next(
        case
        for case in (draw_case({"grouped_matmul": subject}, rng, {"backend": "reference"}) for _ in range(50))
        if attempt(case) not in FINE
    )
    simple, said = shrunk(case)
    assert "result 0" in said and "is off by" in said
    assert simple.parameters["f"] == 8 and simple.parameters["d"] == 1 and simple.parameters["sizes"] == (1,)
    assert Case(SUBJECTS["grouped_matmul"], simple.parameters).reproducer().startswith("PYTHONPATH=tests python -c")
    words = simple.reproducer().split("check(")[1].removesuffix(')"')
    name, given = eval(f"(lambda name, **given: (name, given))({words})")
    check(name, **given)  # the true subject is right


@needs_extension
def test_compiled_functions_refuse_anything():
    """A part of the calls; `python -m fuzz.raw SEED 1` makes all of them."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.raw", "5", "0.05"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "calls" in done.stdout, done.stdout + done.stderr[-2000:]


CRASH = """
import os, signal
from fuzz import SUBJECTS
from fuzz.children import run_in_children

class Crash(type(SUBJECTS["grouped_matmul"])):
    def build(self, **parameters):
        if parameters["f"] >= 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().build(**parameters)

report = run_in_children({"grouped_matmul": Crash()}, 4, 3, {"backend": "reference"})
assert report.compared["grouped_matmul"] == 4 and report.backends["reference"] == 4
(simple, said), *_ = report.failed
assert said == "ended by SIGSEGV" and "f=3)" in simple and "bias" not in simple, (simple, said)
"""


RESUMED = """
import copy
from fuzz import SUBJECTS
from fuzz.children import run_in_children

drawn, kept = {"grouped_matmul": SUBJECTS["grouped_matmul"]}, []
fixed = {"backend": "reference", "d": 2, "f": 2, "sizes": (1,)}
whole = run_in_children(drawn, 300, 3, fixed, progress=lambda report: kept.append(copy.deepcopy(report)))
assert 0 < kept[0].compared.total() < 300 and kept[0].drawn == 250
rest = run_in_children(drawn, 300, 3, fixed, before=kept[0])
rest.seconds = whole.seconds
assert rest == whole
"""


def test_a_run_that_was_stopped_goes_on():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, "-c", RESUMED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_case_that_ends_the_process_has_a_reproducer():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, "-c", CRASH], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_runs_are_kept_by_seed_and_level_and_counted_where_they_ran(tmp_path):
    path, rng = tmp_path / "runs.json", random.Random(0)
    for level, fixed in (
        ("avx2", {"backend": "cpu", "level": "avx512"}),
        ("triton alone", {"backend": "triton"}),
        ("avx2", {"backend": "cpu", "level": "default"}),
        ("amx", {"backend": "cpu", "level": "avx512"}),
    ):
        report = Report()
        report.add(draw_case({"grouped_matmul": SUBJECTS["grouped_matmul"]}, rng, fixed), None)
        report.failed.append(("a call", "is off"))
        save(path, 4, level, report)
        assert saved(path, 4, level) == report and saved(path, 5, level) is None
        table = tables_reliability.fuzz(json.loads(path.read_text())["runs"])
        if level == "avx2":  # the processor has no higher one
            ran_at = {"avx512": "avx2"}.get(fixed["level"], fixed["level"])
            assert f"| {ran_at} | 1 |" in table and "avx512" not in table
    assert "| triton, interpreted | 1 |" in table and "| avx512 | 1 |" in table and table.count("| 4 |") == 3


def test_formulas_are_those_of_the_registry_in_float64():
    """With the reference, so that a formula that is wrong is not taken for rounding."""
    for name, formula in FORMULAS.items():
        case = LOSSES[name]
        given = case.inputs(7, 6, torch.float64, seed=7)
        rows = formula(given, case.options)
        rows = rows * given["weight"] if "weight" in given else rows
        found = case(given, "none" if "none" in case.reductions else "sum", "reference")
        torch.testing.assert_close(found, rows if found.dim() else rows.sum(), rtol=1e-9, atol=1e-9)
    assert set(FORMULAS) < set(LOSSES) and len(FORMULAS) == 78
