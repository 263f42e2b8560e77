"""The benchmark suite is itself right: truths, checks, CSV, tables. No time is asserted."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

# The suite is part of the checkout only. At the end: an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    measure,
    memory,
    plot,
    provenance,
    providers,
    providers_routing,
    providers_topk,
    report,
    results,
    run,
    tables,
    tables_examples,
    tables_reliability,
    targets,
)
from benchmarks.errors import Errors, errors
from benchmarks.registry import (
    FLOORS,
    OURS,
    Case,
    Inputs,
    Lists,
    Outcome,
    Provider,
    Scores,
    Target,
    all_cases,
    representatives,
)

CASES = all_cases()
ON_CPU = [case for case in CASES.values() if case.device == "cpu"]
ON_GPU = [case for case in CASES.values() if case.device == "cuda"]
TARGETS = [(case, target) for case in CASES.values() for target in case.targets]
DUE = [row for row in targets.ROWS if row.group in targets.FINISHED]
# Where the shape does not matter: each op and dtype once, small; and each op in float32.
SHRUNK = {name: case.shrunk() for name, case in representatives(c for c in ON_CPU if c.copies == 1).items()}
ONE_PER_OP = {case.op: case for case in SHRUNK.values() if case.dtype == torch.float32}
COPIED = {case.op: case.shrunk() for case in CASES.values() if case.copies > 1}


# ---------------------------------------------------------------------------------------------
# Registry and targets


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_case_is_well_formed(case: Case):
    names = [provider.name for provider in case.providers]
    kinds = [provider.kind for provider in case.providers]
    assert len(set(names)) == len(names)
    assert case.baseline in names and "ours" in kinds
    assert set(kinds) <= {"ours", "torch", "peer", *FLOORS}
    floors = kinds.count("matmul") or kinds.count("read")
    assert floors == ("time" in case.measure), "one floor for every timed case"
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
    "info_nce-cosine": providers.eager_cosine_info_nce,
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
    assert errors(step(), case.truth(inputs)).worst < 1e-12
    # The same in checkpointed chunks of a few rows.
    monkeypatch.setattr("benchmarks.truth.CHUNK_BYTES", 8 * 50 * case.shapes["N"])
    assert errors(step(), case.truth(inputs)).worst < 1e-12


@pytest.mark.parametrize("op", COPIED)
def test_truth_of_copies_is_the_truth_of_the_whole_batch(op: str):
    case = COPIED[op]
    inputs = in_float64(case.make_inputs(case))
    assert inputs.copies == 2
    whole = case.truth(replace(inputs, copies=1))
    assert errors(whole, case.truth(inputs)).worst < 1e-12


@pytest.mark.parametrize("case", SHRUNK.values(), ids=SHRUNK.keys())
def test_package_agrees_with_truth(case: Case):
    inputs = case.make_inputs(case)
    truth = case.truth(inputs)
    bound = 1e-5 if case.dtype == torch.float32 else 5e-3
    for provider in case.providers:
        if provider.kind == "ours":
            found = errors(provider.build(inputs)(), truth)
            assert found.worst < bound and not found.starved, provider.name


@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
def test_cases_of_a_gpu_are_right_on_a_cpu_too(case: Case):
    small = replace(case.shrunk(), device="cpu")
    inputs = small.make_inputs(small)
    truth = small.truth(inputs)
    if torch.cuda.is_available():
        on_gpu = case.shrunk().make_inputs(case.shrunk())
        assert all(torch.equal(tensor, on_gpu.tensors[name].cpu()) for name, tensor in inputs.tensors.items())
    for provider in small.providers:
        if provider.kind in ("torch", *FLOORS) and not provider.optional:
            answer = provider.build(inputs)()
            assert answer is None or errors(answer, truth).worst < small.tolerance, provider.name
        elif provider.kind == "ours":  # the same provider, on a backend that is here
            with pytest.raises(ImportError, match=r"device=cpu|has no backend"):
                provider.build(inputs)
    reference = {
        "clip": lambda: providers.ours("clip", backend="reference"),
        "siglip": lambda: providers.ours("siglip", backend="reference"),
        "topk": lambda: providers_topk.ours(backend="reference"),
        "route-without-noise": lambda: providers_routing.ours_route(backend="reference"),
    }[small.op]()
    assert errors(reference.build(inputs)(), truth).worst < (1e-2 if small.op != "topk" else 1e-6)


def test_rounded_router_logits_have_one_best_order():
    case = next(case for case in ON_GPU if case.op.startswith("route"))
    small = replace(case, shapes={"T": 4096, "E": 32, "k": 2}, device="cpu")
    best = small.make_inputs(small).tensors["logits"].float().topk(3).values
    assert (best.diff(dim=1) < 0).all()


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
    found = errors(off, truth)
    assert (found.value, found.grads, found.starved) == (pytest.approx(0.1), 0.5, None)
    assert math.isnan(Errors(0.0, math.nan).worst) and math.isnan(Errors(math.nan, 0.0).worst)
    with pytest.raises(ValueError, match="no gradient for"):
        errors(Outcome(torch.tensor(2.0), {}), truth)
    with pytest.raises(TypeError, match="Outcome cannot judge Lists"):
        errors(Lists(torch.ones(1, 1), torch.zeros(1, 1).long()), truth)


# ---------------------------------------------------------------------------------------------
# Searches

SEARCHES = [case for case in SHRUNK.values() if case.op.startswith("topk")]
FILTERED = ONE_PER_OP["topk-filtered"]


def search_truth() -> Scores:
    """Three rows of five columns and lists of two; row 1 has a tie, row 2 only one column."""
    rows = [[5, 4, 3, 2, 1], [1, 3, 2, 2, 0], [-math.inf, -math.inf, 7, -math.inf, -math.inf]]
    scores = torch.tensor(rows, dtype=torch.float64)
    return Scores(scores, scores.topk(2).values)


def lists_of(indices: list[list[int]], values: list[list[float]] | None = None) -> Lists:
    listed = torch.tensor(indices)
    if values is not None:
        return Lists(torch.tensor(values), listed)
    found = search_truth().scores.gather(1, listed.clamp(0, 4)).masked_fill(listed < 0, -math.inf)
    return Lists(found.float(), listed)


def test_errors_of_lists_allow_ties_and_short_rows_where_nothing_is_left():
    for second in (2, 3):
        found = errors(lists_of([[0, 1], [1, second], [2, -1]]), search_truth())
        assert found == Errors(0.0, None, starved=0)


@pytest.mark.parametrize(
    ("lists", "value", "starved"),
    [
        (lists_of([[0, 2], [1, 2], [2, -1]]), 1.0, 0),  # not the second best
        (lists_of([[1, 0], [1, 2], [2, -1]]), 1.0, 0),  # not in order
        (lists_of([[0, 1], [1, 2], [2, -1]], [[5, 4], [3, 2.5], [7, -math.inf]]), 0.5, 0),  # the score of another
        (lists_of([[0, 1], [1, 2], [2, -1]], [[5, 4], [3, math.nan], [7, -math.inf]]), math.inf, 0),
        (lists_of([[0, 1], [1, 2], [2, 3]]), math.inf, 0),  # a column that takes no part
        (lists_of([[0, 1], [1, 1], [2, -1]]), math.inf, 0),  # a column twice
        (lists_of([[0, 5], [1, 2], [2, -1]]), math.inf, 0),  # a column that does not exist
        (lists_of([[0, 1], [1, 2], [-1, 2]]), math.inf, 0),  # a hole
        (lists_of([[0, -1], [1, 2], [-1, -1]]), 0.0, 2),  # what is there is right, but too short
        (replace(lists_of([[0, 1], [1, 2], [2, -1]]), same_as=lists_of([[0, 1], [1, 3], [2, -1]])), math.inf, 0),
    ],
)
def test_errors_of_wrong_lists(lists: Lists, value: float, starved: int):
    assert errors(lists, search_truth()) == Errors(value, None, starved)


def test_lists_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\), got \(3, 1\)"):
        errors(lists_of([[0], [1], [2]]), search_truth())


def sloppy(change) -> Provider:
    """A search that is right but for what ``change`` does to its inputs or lists."""

    def build(inputs: Inputs):
        return providers_topk.mm_topk().build(change(inputs))

    return Provider("sloppy", build, kind="torch")


def without_rule(rule: str, harmless: Tensor) -> Provider:
    return sloppy(lambda inputs: replace(inputs, frozen={**inputs.frozen, rule: harmless}))


def shuffled_corpus(inputs: Inputs) -> Inputs:
    return replace(inputs, tensors={**inputs.tensors, "corpus": inputs.tensors["corpus"].roll(1, 0)})


def in_bf16(inputs: Inputs) -> Inputs:
    rounded = {name: tensor.bfloat16().float() for name, tensor in inputs.tensors.items()}
    return replace(inputs, tensors=rounded)


def starving(**changes) -> Provider:
    """Lists of which one row lacks its last column."""

    def build(inputs: Inputs):
        found = providers_topk.mm_topk().build(inputs)()
        indices = found.indices.clone()
        indices[3, -1] = -1
        return lambda: Lists(found.values, indices)

    return Provider("starving", build, **changes)


def statuses(case: Case, *others: Provider) -> tuple[dict[str, str], list[str]]:
    options = run.Options(rounds=1, quick=True, memory=False)
    chosen = replace(case, providers=(case.provider(OURS), *others), baseline=OURS, targets=())
    rows, notes = run.run_case(chosen, options)
    return {row["provider"]: row["status"] for row in rows}, notes


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        (ONE_PER_OP["topk"], sloppy(shuffled_corpus)),
        (ONE_PER_OP["topk"], sloppy(in_bf16)),
        (ONE_PER_OP["topk-few"], sloppy(in_bf16)),
        (FILTERED, without_rule("excluded", torch.zeros(192, 1).long())),
        (FILTERED, without_rule("bound", torch.full((192,), 2.0))),
        (FILTERED, starving()),
    ],
)
def test_wrong_lists_are_named_and_not_timed(case: Case, provider: Provider):
    found, notes = statuses(case, provider)
    assert found == {OURS: "ok", provider.name: "wrong"}
    assert notes[0].startswith(f"{provider.name}: WRONG, not measured: error of the lists")


def test_a_provider_that_starves_is_counted():
    options = run.Options(rounds=1, quick=True, memory=False)
    case = replace(FILTERED, providers=(FILTERED.provider(OURS), starving(starves=True)), baseline=OURS, targets=())
    rows, notes = run.run_case(case, options)
    assert {row["provider"]: (row["status"], row["starved"]) for row in rows} == {
        OURS: ("ok", "0"),
        "starving": ("ok", "1"),
    }
    assert not notes


@pytest.mark.parametrize("case", SEARCHES, ids=lambda case: case.name)
def test_truth_of_searches_is_that_of_plain_loops(case: Case):
    inputs = in_float64(case.make_inputs(case))
    query, corpus = inputs.tensors.values()
    bound = inputs.frozen.get("bound", torch.full((len(query),), math.inf))
    truth = case.truth(inputs)
    for row in range(0, len(query), 40):
        excluded = inputs.frozen["excluded"][row].tolist() if inputs.frozen else []
        scores = (corpus @ query[row]).tolist()
        left = [s for column, s in enumerate(scores) if column not in excluded and s <= bound[row]]
        best = sorted(left, reverse=True)[: case.shapes["k"]]
        torch.testing.assert_close(truth.best[row], torch.tensor(best, dtype=torch.float64), rtol=0, atol=1e-12)
    assert errors(providers_topk.mm_topk().build(inputs)(), truth).worst < 1e-12


@pytest.mark.parametrize("case", SEARCHES, ids=lambda case: case.name)
def test_peers_agree_with_the_truth_of_searches(case: Case):
    pytest.importorskip("faiss")
    inputs = case.make_inputs(case)
    truth = case.truth(inputs)
    for provider in case.providers:
        if provider.kind == "peer" and not provenance.version(provider.package):
            continue
        answer = provider.build(inputs)() if provider.kind in ("peer", *FLOORS) else None
        if answer is not None:
            found = errors(answer, truth)
            assert found.worst < case.tolerance and bool(found.starved) == provider.starves, provider.name


def test_over_fetching_starves_rows_that_have_enough_columns():
    inputs = FILTERED.make_inputs(FILTERED)
    truth, k = FILTERED.truth(inputs), FILTERED.shapes["k"]
    assert truth.scores.isfinite().sum(1).min() >= k
    fetched = (inputs.tensors["query"] @ inputs.tensors["corpus"].T).topk(10 * k)
    kept = providers_topk.first_that_stay(*fetched, inputs.frozen["excluded"], inputs.frozen["bound"], k)
    found = errors(kept, truth)
    assert found.worst < FILTERED.tolerance
    # One positive in 32 is outranked by so many; the other rows lose nothing.
    assert 192 // 64 <= found.starved <= 192 // 32


def test_scores_under_rules_are_exact_and_the_excluded_would_be_found():
    inputs = FILTERED.make_inputs(FILTERED)
    query, corpus = inputs.tensors.values()
    scores = query @ corpus.T
    assert torch.equal(scores.double(), query.double() @ corpus.double().T)
    excluded = inputs.frozen["excluded"]
    assert torch.equal(excluded, excluded.sort(1).values) and (excluded.diff(dim=1) > 0).all()
    unruled = scores.topk(FILTERED.shapes["k"]).indices
    assert (unruled[:, :, None] == excluded[:, None]).any(1).double().mean() > 0.95


def test_queries_resemble_rows_of_a_corpus_in_clusters():
    case = ONE_PER_OP["topk"]
    inputs = case.make_inputs(case)
    again = case.make_inputs(case)
    assert all(torch.equal(inputs.tensors[name], again.tensors[name]) for name in inputs.tensors)
    query, corpus = inputs.tensors.values()
    torch.testing.assert_close(torch.cat([query, corpus]).norm(dim=1), torch.ones(len(query) + len(corpus)))
    best = (query @ corpus.T).amax(1)
    assert 0.4 < best.mean() < 0.7 and best.unique().numel() == len(query)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_are_timed_by_its_own_clock():
    x = torch.ones(2048, 2048, device="cuda")
    steps = {"one": lambda: x @ x, "many": lambda: [x @ x for _ in range(50)]}
    timings = measure.interleave(steps, rounds=2, device="cuda")
    assert 0 < timings["one"].minimum < timings["many"].minimum


def test_a_backend_that_cannot_run_is_missing_and_not_an_error():
    both = providers.ours("clip"), providers.ours("clip", "on a GPU", backend="triton")
    case = replace(ONE_PER_OP["clip"], providers=both, baseline=OURS, targets=())
    options = run.Options(rounds=1, quick=True, memory=False)
    rows, notes = run.run_case(case, options)
    assert [row["status"] for row in rows] == ["ok", "missing"]
    assert notes[0].startswith("on a GPU: not installed (contrastive_ops): ") and "device=cpu" in notes[0]
    assert not run._is_bad(rows)
    assert run._is_bad(rows[1:]), "nothing of ours ran"
    assert run._is_bad([{**rows[0], "status": "wrong"}, *rows])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cases_of_a_gpu_need_one(capsys):
    assert {case.device for case in run.select(device="cuda")} == {"cuda"}
    assert run.main(["--device", "cuda", "--quick"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is reset through /proc")
def test_extra_memory_is_the_peak_above_inputs_and_gradients():
    mib = 2**18  # float32 numbers

    def step() -> Outcome:
        torch.ones(64 * mib)
        return Outcome(torch.tensor(0.0), {"a": torch.ones(16 * mib)})

    torch.ones(200 * mib)  # an earlier, higher peak must not hide this one
    extra, _ = memory.extra_bytes(step, "cpu")
    # 64 MiB come and go before the 16 MiB of the gradient, which are not extra.
    assert 40 * memory.MIB < extra < 70 * memory.MIB

    def search() -> Lists:
        torch.ones(64 * mib)
        return Lists(torch.ones(8 * mib, 1), torch.ones(4 * mib, 1, dtype=torch.int64))

    extra, _ = memory.extra_bytes(search, "cpu")
    assert 40 * memory.MIB < extra < 70 * memory.MIB


def test_memory_is_measured_in_a_subprocess():
    case = next(case for case in CASES.values() if case.copies > 1)
    extra, found = memory.measure(case, case.provider(OURS), quick=True, check=True)
    assert 0 <= extra < 64 and found.worst < 1e-5


def test_memory_of_a_search_and_of_what_has_no_answer():
    extra, found = memory.measure_here(FILTERED, providers_topk.mm_topk(), check=True)
    assert extra >= 0 and found == Errors(0.0, None, starved=0)
    extra, found = memory.measure_here(FILTERED, providers_topk.read_corpus(), check=True)
    assert extra >= 0 and found is None


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


def test_changed_columns_start_another_file_and_old_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert results.file_of("machine") == tmp_path / "machine.csv"
    (tmp_path / "machine.csv").write_text("run,case,provider,status,min_ms\n1,x,a,ok,5\n")
    path = results.file_of("machine")
    assert path == tmp_path / "machine-2.csv"
    results.append(path, [{"run": "2", "case": "x", "provider": "a", "status": "ok", "starved": "3"}])
    assert results.file_of("machine") == path
    old, new = results.read(tmp_path)
    assert (old["min_ms"], old["starved"], new["min_ms"], new["starved"]) == ("5", "", "", "3")
    assert set(old) == set(new) == set(results.COLUMNS)


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
        ("starved", 0, "0", None, "<= 0 starved rows: 0 ok"),
        ("starved", 0, "31", None, "<= 0 starved rows: 31 missed"),
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
    from_csv = (
        set(tables.tables([]))
        - {"demo", "demo-mining", "headline"}
        - set(tables_examples.tables())
        - set(tables_reliability.tables())
    )
    every = "".join(f"<!-- benchmark:{n} -->\n<!-- /benchmark -->\n" for n in from_csv)
    assert tables.updated(every, []).count("Not measured yet.") == len(from_csv)


def test_table_of_a_search_shows_starved_rows_and_no_gradients():
    common = {"dtype": "fp32", "device": "a machine", "threads": "2", "torch": "2", "date": "2026-01-01T0"}
    name = "topk-filtered-fp32-N1024-M50000-D768-k100"
    fields = {"case": name, "capability": "avx512", "contrastive_ops": "0", **common}
    rows = [
        row_of(OURS, "1", kind="ours", min_ms="10", starved="0", **fields),
        row_of(providers_topk.OVER_FETCH, "1", kind="peer", version="9", min_ms="20", starved="31", **fields),
    ]
    text = tables.op_table("topk-filtered", rows)
    header = f"| shape | provider | ms | speed against {providers_topk.OVER_FETCH} | starved rows |\n"
    assert text.startswith(header)
    assert "| N=1024 M=50000 D=768 k=100 fp32 | contrastive_ops | 10.0 | 2.00x | 0 |" in text
    assert f"| {providers_topk.OVER_FETCH} 9 | 20.0 | 1.00x | 31 |" in text


def test_table_of_a_gpu_shows_the_backends_that_ran():
    common = {"case": "clip-bf16-N32768-D768-cuda", "dtype": "bf16", "device": "a GPU", "threads": "1", "torch": "2"}
    common |= {"date": "2026-01-01T0", "capability": "sm_90", "contrastive_ops": "0"}
    ours = {"kind": "ours", "min_ms": "4", "of_matmul_rate": "0.7", "peak_extra_mib": "9"}
    rows = [
        row_of("contrastive_ops cuda", "1", **ours, **common),
        row_of("torch eager", "1", kind="torch", min_ms="10", peak_extra_mib="99", **common),
    ]
    text = tables.tables(rows)["gpu-clip"]()
    assert "| N=32768 D=768 bf16 | contrastive_ops cuda | 4.0 | 2.50x | 9 | 70% |" in text
    assert "| N=32768 D=768 bf16 | torch eager | 10.0 | 1.00x | 99 |  |" in text
    assert tables.tables(rows)["clip"]() == tables.NOTHING


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
    command = ["--page", str(readme)]
    assert tables.main([*command, "--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert tables.main(command) == 0
    assert tables.main([*command, "--check"]) == 0


def test_tables_are_what_the_csv_files_say():
    if not (tables.ROOT / "README.md").exists():
        pytest.skip("needs the source checkout")
    assert sum(page.read_text().count("<!-- benchmark:") for page in tables.PAGES) > 20
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_plot_is_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib")
    found = plot.panels(measured_rows())
    assert [case.name for case, _ in found] == ["clip-fp32-N4096-D768"]
    plot.draw(found, tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    assert "open_clip ClipLoss" in text and "2.60x" in text
