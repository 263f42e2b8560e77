"""The list of faults that `make mutate` plants: every one is still there to be planted."""

import json

import builds
import pytest
from builds.objects import Object
from faults import ROOT, all_faults
from faults import __main__ as mutate

FAULTS = all_faults()
KINDS = ("cpu", "cuda", "triton", "python")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_a_fault_can_be_planted_and_names_tests(fault):
    path = ROOT / fault.file
    fault.planted(path.read_text())  # says why not
    files = [ROOT / word for word in fault.tests if word.startswith("tests/")]
    assert files and all(file.exists() for file in files)


def test_faults_are_many_and_differ():
    assert len({fault.digest for fault in FAULTS}) == len(FAULTS) >= 60
    assert all(sum(fault.kind == kind for fault in FAULTS) >= 10 for kind in KINDS)


def test_a_line_that_is_gone_or_there_twice_is_an_error():
    fault = FAULTS[0]
    for text in ("", 2 * (fault.old + "\n")):
        with pytest.raises(ValueError, match="must be there once"):
            fault.planted(text)


def test_an_object_that_was_removed_is_made_again(tmp_path, monkeypatch):
    """Of a file that many faults are in only the last objects are kept; that without a fault is used again."""
    one, other = (Object(f"csrc/cpu/{stem}.cpp", ()) for stem in ("one", "other"))
    monkeypatch.setattr(builds.Build, "_of_c", lambda build: [one, other])
    monkeypatch.setattr(builds.Build, "_missing_levels", lambda build: "")
    monkeypatch.setattr(builds.Build, "_link", lambda build, name, objects: None)
    compiled = []
    monkeypatch.setattr(builds, "compile_all", lambda objects, *_: [compiled.append(each) or "new" for each in objects])
    (tmp_path / "csrc").mkdir()
    (tmp_path / "other.o").write_bytes(b"")
    build = builds.Build(tmp_path, tmp_path / "objects", eager=False)
    made = {one: str(tmp_path / "gone.o"), other: str(tmp_path / "other.o")}
    assert build.make(("one",), made) == {one: "new", other: made[other]} and compiled == [one]
    compiled.clear()
    assert build.make(("other",), made) == {one: "new", other: "new"} and compiled == [one, other]


def test_results_of_some_faults_leave_those_of_the_others(tmp_path, monkeypatch):
    """A run of one kind, then one of another, then one on a processor that lacks a level."""
    file = tmp_path / "faults.json"
    monkeypatch.setattr(mutate, "TREE", ROOT)
    chosen = [next(fault for fault in FAULTS if fault.kind == kind) for kind in KINDS]
    words = ("caught", "survived", "skipped", "error", "not run")

    def rows():
        content = json.loads(file.read_text())
        assert content["faults"] == len(FAULTS) == sum(content[word] for word in words)
        found = {(row["file"], row["name"]): (row["result"], row["run"]) for row in content["results"]}
        return len(content["runs"]), [found[fault.file, fault.name] for fault in chosen]

    def save(**results):
        faults = [chosen[int(at[1:])] for at in results]
        states = [fault.state(ROOT) for fault in faults]
        mutate.save(file, faults, dict(zip(states, results.values(), strict=True)))

    save(_0="caught: a test", _1="survived")
    assert rows() == (1, [("caught", 0), ("survived", 0), ("not run", None), ("not run", None)])
    save(_1="caught: a test", _2="caught: a test")
    assert rows() == (2, [("caught", 0), ("caught", 1), ("caught", 1), ("not run", None)])
    save(_0="skipped: this processor has no level")
    assert rows() == (2, [("caught", 0), ("caught", 1), ("caught", 1), ("not run", None)])
    save(_0="error: does not compile")
    assert rows() == (2, [("error", 1), ("caught", 0), ("caught", 0), ("not run", None)])
