"""The benchmark suite is itself right: truths, checks, CSV, tables. No time is asserted."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# The suite is part of the checkout only. At the end: an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, memory, plot, providers, report, results, run, tables, targets
from benchmarks.registry import OURS, Case, Inputs, Outcome, Provider, Target, all_cases
from benchmarks.truth import errors

CASES = all_cases()
TARGETS = [(case, target) for case in CASES.values() for target in case.targets]
DUE = [row for row in targets.ROWS if row.group in targets.FINISHED]
# Where the shape does not matter: each op and dtype once, small; and each op in float32.
SHRUNK = {case.shrunk().name: case.shrunk() for case in CASES.values() if case.copies == 1}
ONE_PER_OP = {case.op: case for case in SHRUNK.values() if case.dtype == torch.float32}
COPIED = {case.op: case.shrunk() for case in CASES.values() if case.copies > 1}


# ---------------------------------------------------------------------------------------------
# Registry and targets


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_case_is_well_formed(case: Case):
    names = [provider.name for provider in case.providers]
    kinds = [provider.kind for provider in case.providers]
    assert len(set(names)) == len(names)
    assert case.baseline in names and OURS in names
    assert set(kinds) <= {"ours", "torch", "peer", "matmul"}
    assert kinds.count("matmul") == ("time" in case.measure), "one floor for every timed case"
    assert case.measure and set(case.measure) <= {"time", "memory"}
    assert case.flops(case.shapes) > 0 and 0 < case.tolerance < 1
    known = {row.key for row in targets.ROWS}
    for target in case.targets:
        assert target.row in known
        assert target.metric in report.METRIC_COLUMN
        assert set(report.providers_of(target)) <= set(names)


def test_design_rows_are_well_formed():
    keys = [row.key for row in targets.ROWS]
    assert len(set(keys)) == len(keys)
    assert {row.group for row in targets.ROWS} >= targets.FINISHED


@pytest.mark.parametrize("row", DUE, ids=lambda row: row.key)
def test_finished_row_is_measured(row):
    due = [(case, target) for case, target in TARGETS if target.row == row.key]
    assert due, f"no case of the registry has a target of the finished row {row.key!r}"
    rows = results.read()
    open_targets = [
        f"{case.name}: {' against '.join(report.providers_of(target))}"
        for case, target in due
        if tables.measured(case, target, rows) is None
    ]
    assert not open_targets, f"no CSV row under benchmarks/results/ for {open_targets}"


# ---------------------------------------------------------------------------------------------
# Inputs and truth

EAGER = {
    "clip": providers.eager_clip,
    "info_nce": providers.eager_info_nce,
    "nt_xent": providers.eager_nt_xent,
    "sup_con": providers.eager_sup_con,
    "siglip": providers.eager_siglip,
    "gte": providers.eager_gte,
    "gist": providers.eager_gist,
}


def in_float64(inputs: Inputs) -> Inputs:
    tensors = {k: tensor.double() for k, tensor in inputs.tensors.items()}
    frozen = {k: tensor.double() if tensor.is_floating_point() else tensor for k, tensor in inputs.frozen.items()}
    return replace(inputs, tensors=tensors, frozen=frozen)


@pytest.mark.parametrize("op", EAGER)
def test_truth_is_dense_autograd_in_float64(op: str, monkeypatch):
    case = ONE_PER_OP[op]
    inputs = in_float64(case.make_inputs(case))
    step = providers.torch_eager("eager", EAGER[op]).build(inputs)
    assert max(errors(step(), case.truth(inputs))) < 1e-12
    # The same in checkpointed chunks of a few rows.
    monkeypatch.setattr("benchmarks.truth.CHUNK_BYTES", 8 * 50 * case.shapes["N"])
    assert max(errors(step(), case.truth(inputs))) < 1e-12


@pytest.mark.parametrize("op", COPIED)
def test_truth_of_copies_is_the_truth_of_the_whole_batch(op: str):
    case = COPIED[op]
    inputs = in_float64(case.make_inputs(case))
    assert inputs.copies == 2
    whole = case.truth(replace(inputs, copies=1))
    assert max(errors(whole, case.truth(inputs))) < 1e-12


@pytest.mark.parametrize("case", SHRUNK.values(), ids=SHRUNK.keys())
def test_package_agrees_with_truth(case: Case):
    inputs = case.make_inputs(case)
    truth = case.truth(inputs)
    bound = 1e-5 if case.dtype == torch.float32 else 5e-3
    for provider in case.providers:
        if provider.kind == "ours":
            assert max(errors(provider.build(inputs)(), truth)) < bound, provider.name


def test_inputs_are_those_of_training():
    # At a shape of the registry: a loss that is neither converged nor log N.
    case = next(case for case in CASES.values() if case.op == "info_nce")
    inputs = case.make_inputs(case)
    again = case.make_inputs(case)
    loss = providers.eager_info_nce(**inputs.tensors, **inputs.constants).item()
    assert 0.3 < loss < 2
    assert all(torch.equal(inputs.tensors[name], again.tensors[name]) for name in inputs.tensors)


def test_labels_give_every_row_positives():
    inputs = ONE_PER_OP["sup_con"].make_inputs(ONE_PER_OP["sup_con"])
    labels = inputs.frozen["labels"]
    assert labels.shape == inputs.tensors["x"].shape[:1]
    assert set(labels.unique(return_counts=True)[1].tolist()) == {8}


def test_guide_similarities_are_exact_and_drop_some_pairs():
    case = ONE_PER_OP["gist"]
    inputs = case.make_inputs(case)
    query, key = (torch.nn.functional.normalize(each, dim=1) for each in inputs.frozen.values())
    similarity = query @ key.T
    assert torch.equal(similarity.double(), query.double() @ key.double().T)
    dropped = similarity > similarity.diagonal()[:, None] - inputs.constants["margin"]
    assert 0.005 < dropped.fill_diagonal_(False).double().mean() < 0.1


def test_errors_are_relative_and_see_every_gradient():
    truth = Outcome(torch.tensor(2.0).double(), {"a": torch.ones(4).double()})
    off = Outcome(torch.tensor(2.2), {"a": torch.tensor([1.0, 1.0, 1.0, 2.0])})
    assert errors(off, truth) == pytest.approx((0.1, 0.5))
    with pytest.raises(ValueError, match="no gradient for"):
        errors(Outcome(torch.tensor(2.0), {}), truth)


# ---------------------------------------------------------------------------------------------
# Measuring


def clip_case(**changes) -> Case:
    return replace(ONE_PER_OP["clip"], **changes)


def wrong_loss(image, text, scale):
    return 1.01 * providers.eager_clip(image, text, scale)


def nan_loss(image, text, scale):
    return torch.nan * providers.eager_clip(image, text, scale)


def missing_package(inputs):
    raise ImportError("No module named 'nowhere'")


def test_wrong_failed_and_missing_providers_are_named_and_not_timed():
    case = clip_case(
        providers=(
            providers.torch_eager("right", providers.eager_clip),
            providers.torch_eager("wrong", wrong_loss),
            providers.torch_eager("nan", nan_loss),
            providers.torch_eager("broken", lambda image, text, scale: 1 // 0),
            Provider("absent", missing_package, package="nowhere"),
        ),
        baseline="right",
        targets=(),
    )
    options = run.Options(rounds=1, quick=True, memory=False)
    rows, notes = run.run_case(case, options)
    status = {row["provider"]: row["status"] for row in rows}
    assert status == {"right": "ok", "wrong": "wrong", "nan": "wrong", "broken": "failed"}
    assert [row["provider"] for row in rows if row.get("min_ms")] == ["right"]
    assert len(notes) == 4
    assert any("absent: not installed (nowhere)" in note for note in notes)


def test_rounds_interleave_and_rotate(monkeypatch):
    monkeypatch.setattr(measure, "SLICE_SECONDS", 0.0)
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = measure.interleave(steps, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # the warm-up, then three rounds
    for timing in timings.values():
        assert timing.minimum <= timing.p20 <= timing.median <= timing.p80
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        measure.interleave(steps, rounds=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is reset through /proc")
def test_extra_memory_is_the_peak_above_inputs_and_gradients():
    mib = 2**18  # float32 numbers

    def step() -> Outcome:
        torch.ones(64 * mib)
        return Outcome(torch.tensor(0.0), {"a": torch.ones(16 * mib)})

    torch.ones(200 * mib)  # an earlier, higher peak must not hide this one
    extra, _ = memory._extra_bytes(step, "cpu")
    # 64 MiB come and go before the 16 MiB of the gradient, which are not extra.
    assert 40 * memory.MIB < extra < 70 * memory.MIB


def test_memory_is_measured_in_a_subprocess():
    case = next(case for case in CASES.values() if case.copies > 1)
    numbers = memory.measure(case, case.provider(OURS), quick=True, check=True)
    assert 0 <= numbers["peak_extra_mib"] < 64
    assert max(numbers["loss_error"], numbers["grad_error"]) < 1e-5


# ---------------------------------------------------------------------------------------------
# CSV and verdicts


def test_quick_run_appends_rows_with_provenance(tmp_path, capsys):
    path = tmp_path / "machine.csv"
    command = ["--quick", "--case", "clip-fp32-N4096", "--no-memory", "--no-peers"]
    command += ["--rounds", "1", "--csv", str(path)]
    for _ in range(2):
        assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "clip-fp32-N192-D48" in printed and "reach >= 2.00x faster: not measured" in printed
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == results.COLUMNS
    assert lines.count(lines[0]) == 1
    rows = results.read(tmp_path)
    assert len(rows) == len(lines) - 1 and len(rows) % 2 == 0
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["min_ms"]) <= float(row["median_ms"])
        for column in ("run", "date", "device", "cores", "threads", "capability", "torch"):
            assert row[column], column
    floor = next(row for row in rows if row["kind"] == "matmul")
    assert floor["provider"] == providers.MATMUL and float(floor["of_matmul_rate"]) == 1


def test_quick_run_without_file_writes_nothing():
    case = ONE_PER_OP["clip"]
    assert run.csv_of(case, run.Options(quick=True)) is None
    assert run.csv_of(case, run.Options()).parent == results.RESULTS


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("op,case\nclip,x\n")
    with pytest.raises(ValueError, match="must have the columns"):
        results.append(path, [{"op": "clip"}])
    assert path.read_text() == "op,case\nclip,x\n"


def test_command_names_unknown_cases(capsys):
    assert run.main(["--op", "nothing"]) == 2
    assert "no benchmark case matches" in capsys.readouterr().err
    assert run.main(["--list"]) == 0
    assert "clip-fp32-N4096-D768" in capsys.readouterr().out


def row_of(provider: str, start: str, **fields: str) -> results.Row:
    blank = dict.fromkeys(results.COLUMNS, "")
    blank.update(case="clip-fp32-N4096-D768", provider=provider, run=start, status="ok")
    return {**blank, **fields}


def test_targets_compare_rows_of_one_run_only():
    peer = "open_clip ClipLoss"
    target = Target("clip", "faster", 2.0, OURS, peer)
    case = CASES["clip-fp32-N4096-D768"]
    rows = [
        row_of(OURS, "1", min_ms="10"),
        row_of(peer, "1", min_ms="26"),
        row_of(OURS, "2", min_ms="5"),  # a later run without the peer
        row_of(peer, "3", min_ms="99", status="wrong"),
    ]
    value, used = tables.measured(case, target, rows)
    assert value == pytest.approx(2.6)
    assert {row["run"] for row in used} == {"1"}
    assert tables.measured(case, target, rows[2:]) is None


@pytest.mark.parametrize(
    ("metric", "bound", "ours", "against", "text"),
    [
        ("faster", 2.0, "10", "26", ">= 2.00x faster: 2.60x ok"),
        ("faster", 3.0, "10", "26", ">= 3.00x faster: 2.60x missed"),
        ("time", 0.9, "9.5", "10", "<= 0.90x the time: 0.95x missed"),
        ("memory", 0.05, "4", "100", "<= 0.050x the extra memory: 0.040x ok"),
        ("peak", 256, "255.4", None, "<= 256 MiB: 255 MiB ok"),
        ("error", 5e-3, "6.0e-3", None, "<= 5e-03 gradient error: 6.0e-03 missed"),
        ("faster", 2.0, "", "26", ">= 2.00x faster: not measured"),
    ],
)
def test_verdict(metric, bound, ours, against, text):
    column = report.METRIC_COLUMN[metric]
    target = Target("clip", metric, bound, OURS, "peer" if against else None)
    rows = {OURS: {column: ours}, "peer": {column: against or ""}}
    assert report.verdict(target, rows).endswith(text)


# ---------------------------------------------------------------------------------------------
# Tables and plot


def measured_rows() -> list[results.Row]:
    common = {
        "dtype": "fp32", "device": "a machine", "threads": "2", "torch": "2",
        "date": "2026-01-01T0", "capability": "avx512", "contrastive_ops": "0",
        "grad_error": "1e-6",
    }  # fmt: skip
    return [
        row_of(OURS, "1", kind="ours", min_ms="10", peak_extra_mib="3", **common),
        row_of("open_clip ClipLoss", "1", kind="peer", version="9", min_ms="26.04", **common),
        row_of(providers.MATMUL, "1", kind="matmul", min_ms="12", of_matmul_rate="1", **common),
    ]


def test_tables_are_written_between_markers():
    text = "a\n<!-- benchmark:clip -->\nold\n<!-- /benchmark -->\nb\n"
    new = tables.updated(text, measured_rows())
    assert new.startswith("a\n<!-- benchmark:clip -->\n") and new.endswith("-->\nb\n")
    assert "old" not in new
    assert "| N=4096 D=768 fp32 | contrastive_ops | 10.0 | 2.60x | 3 | 1e-6 |  |" in new
    assert "open_clip ClipLoss 9" in new and "a machine, 2 threads, avx512" in new
    assert tables.updated(new, measured_rows()) == new
    from_csv = set(tables.tables([])) - {"demo", "headline"}
    every = "".join(f"<!-- benchmark:{n} -->\n<!-- /benchmark -->\n" for n in from_csv)
    assert tables.updated(every, []).count("Not measured yet.") == len(from_csv)


def test_targets_table_says_what_is_missed():
    text = tables.targets_table(measured_rows())
    assert ">= 2.00x faster | 2.60x | ok |" in text
    slower = [{**row, "min_ms": "10"} for row in measured_rows()]
    assert ">= 2.00x faster | 1.00x | **missed** |" in tables.targets_table(slower)


@pytest.mark.parametrize("text", ["<!-- benchmark:nothing -->\n<!-- /benchmark -->", "<!-- benchmark:clip -->\nx"])
def test_bad_markers_are_refused(text: str):
    with pytest.raises(ValueError, match="benchmark"):
        tables.updated(text, [])


def test_check_finds_a_table_out_of_date(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:clip -->\nold\n<!-- /benchmark -->\n")
    command = ["--readme", str(readme)]
    assert tables.main([*command, "--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert tables.main(command) == 0
    assert tables.main([*command, "--check"]) == 0


def test_readme_tables_are_what_the_csv_files_say():
    if not tables.README.exists() or "<!-- benchmark:" not in tables.README.read_text():
        pytest.skip("the README has no benchmark tables")
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_plot_is_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib")
    found = plot.panels(measured_rows())
    assert [case.name for case, _ in found] == ["clip-fp32-N4096-D768"]
    plot.draw(found, tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    assert "open_clip ClipLoss" in text and "2.60x" in text
