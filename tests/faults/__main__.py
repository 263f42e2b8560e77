"""`make mutate`: plants each fault in a copy of the sources, and says which of them no test notices.

make mutate                                      all; those that were caught before, and are as they were, again
make mutate ARGS="--kinds cuda triton"           cpu, cuda, triton, python
make mutate ARGS="--only barrier 'tie order'"    those whose name or file has one of these words
make mutate ARGS="--resume"                      but for those that were caught before, of which no file has changed
make mutate ARGS="--minutes 30"                  for as long, and --resume goes on
make mutate ARGS="--list"                        only names

Tests of CUDA kernels run without sanitizers first, which is three times as fast; what no number shows runs under them.
"""

from __future__ import annotations

import argparse
import compileall
import filecmp
import json
import math
import os
import py_compile
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP

import builds

# Forks have these, and nothing of the package; nor of Triton, which looks for its interpreter when it is imported.
import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import torch  # noqa: F401
from builds.objects import Object

from . import ROOT, Fault, all_faults, hosts
from .hosts import HOSTS, PLAIN, SANITIZED

FOLDER = ROOT / "build" / "faults"
TREE = FOLDER / "tree"
KINDS = ("python", "triton", "cuda", "cpu")
# What pytest returns: 0 all passed, 1 some failed, 2 a file does not import, 5 no test was selected.
PASSED, FAILED, BROKEN, INTERNAL = 0, 1, 2, 3
UNDER = "caught under sanitizers"


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seconds", type=float, default=600, help="of the tests of one fault; longer is a hang")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no other fault is planted")
    parser.add_argument("--save", type=Path, help="a file whose results of these faults are replaced")
    return parser.parse_args()


def run_tests(
    kind: str, level: str, tests: tuple[str, ...], seconds: float, host: str | None = None
) -> tuple[int | None, str]:
    """What pytest returns, None where it did not end in time, and the last of what it says.

    `host` says how CUDA kernels are compiled for the host: one of `HOSTS`, or None where no test needs them.
    """

    def run() -> int:
        if host is not None:
            hosts.choose(host)
        return int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]))

    return forked(kind, level, seconds, run)


def forked(kind: str, level: str, seconds: float, run: Callable[[], int]) -> tuple[int | None, str]:
    """What a function returns in the copy, None where it did not end in time, and the last of what it prints.

    In a fork of this process, which has imported torch and nothing of the package: that saves seconds of each.
    """
    log = FOLDER / "tests.log"
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.setsid()  # with the processes that tests start
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            enter_tree(kind, level)
            os._exit(run())
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(INTERNAL)
    ends = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended or time.monotonic() > ends:
            break
        time.sleep(0.05)
    if not ended:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    said = log.read_text(errors="replace")[-4000:]
    return os.waitstatus_to_exitcode(status) if ended else None, said


def enter_tree(kind: str, level: str) -> None:
    """Makes this process one that has the package of the copy."""
    os.chdir(TREE)
    os.environ["CONTRASTIVE_OPS_CPU_CAPABILITY"] = level
    os.environ["PYTHONPATH"] = str(TREE)  # of processes that tests start
    if kind == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.split(".")[0] in ("builds", "faults")]:
        del sys.modules[name]
    sys.path[:] = [str(TREE), *(path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"), ""))]


def failed_tests(found: str) -> tuple[str, ...]:
    """The test that a verdict names; none where it names none."""
    word = found.partition(": ")[2]
    return (word,) if word.startswith("tests/") else ()


def verdict(status: int | None, said: str) -> str:
    """What became of a fault, from the end of its tests."""
    if status is None:
        return "caught: the tests do not end"
    if status < 0:
        return f"caught: the process ends by signal {-status}"
    if status in (FAILED, BROKEN):
        failed = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return f"caught: {failed[0].split(' - ')[0].split(' ', 1)[1] if failed else 'an error'}"
    return "survived" if status == PASSED else f"error: pytest returned {status}: {said[-300:]}"


class Tree:
    """The copy of the sources, and what is built of it."""

    def __init__(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        builds.copy_sources(TREE)
        self.objects: dict[str, dict[Object, str]] = {}  # of a level, without a fault
        self.hosts: set[str] = set()  # that have been built without a fault
        # The hash of a source is looked at, not its time, which may be the same before and after a fault.
        by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
        for place in ("contrastive_ops", "kernels", "tests"):
            compileall.compile_dir(TREE / place, quiet=1, invalidation_mode=by_hash)

    def build(self, level: str, stems: tuple[str, ...] = ()) -> None:
        """The extension of the sources as they are now."""
        made = builds.Build(TREE, FOLDER / "objects" / level, level).make(stems, self.objects.get(level))
        self.objects.setdefault(level, made)

    def take_installed(self) -> None:
        """The extension of the clone, which `make mutate` has built: for faults that are in no C++ of the CPU."""
        for folder in (FOLDER / "objects").glob("*"):
            for made_of in folder.glob("*.linked"):
                made_of.unlink()  # so that the next build links again
        for path in (ROOT / "contrastive_ops").glob("*.so"):
            target = TREE / "contrastive_ops" / path.name
            if not target.exists() or not filecmp.cmp(path, target, shallow=False):
                new = target.with_suffix(".new")
                shutil.copyfile(path, new)
                new.replace(target)

    def confirm(self, caught: dict[Fault, str], seconds: float) -> Iterator[tuple[Fault, bool]]:
        """Whether the tests that failed with each fault pass without it: all at once, and alone where that fails."""
        groups: dict[tuple[str, str, str | None], list[Fault]] = {}
        for fault, found in caught.items():
            host = (SANITIZED if found.startswith(UNDER) else PLAIN) if fault.on_host else None
            groups.setdefault((fault.kind, fault.level or builds.usual_level(), host), []).append(fault)
        for (kind, level, host), faults in groups.items():
            self.ready(faults[0], level, host)
            names = {fault: failed_tests(caught[fault]) for fault in faults}
            named = tuple(dict.fromkeys(name for each in names.values() for name in each))
            well = all(names.values()) and run_tests(kind, level, named, seconds * len(faults), host)[0] == PASSED
            for fault in faults:
                tests = names[fault] or fault.tests
                yield fault, well or run_tests(kind, level, tests, seconds, host)[0] == PASSED

    def ready(self, fault: Fault, level: str, host: str | None) -> None:
        """The extension, and the kernels on the host, without a fault."""
        if fault.kind == "cpu":
            self.build(level)
        else:
            self.take_installed()
        if host is not None:
            self.build_host(host, (), is_base=True)

    def build_host(self, host: str, stems: tuple[str, ...], *, is_base: bool = False) -> None:
        """The kernels of the copy on the host, in as long as that takes: limits are those of tests.

        Raises:
            RuntimeError: with the message of the compiler.
        """
        record = FOLDER / f"{host}.json"
        status, said = forked(
            "cuda", builds.usual_level(), math.inf, lambda: hosts.build(host, TREE, stems, record, is_base)
        )
        if status != 0:
            raise RuntimeError(said)

    def result(self, fault: Fault, seconds: float) -> str:
        """What becomes of a fault."""
        level = fault.level or builds.usual_level()
        if not builds.runs(level, ROOT):
            return f"skipped: this processor has no {level}"
        if fault.kind != "cpu" or level not in self.objects:
            self.ready(fault, level, None)
        for host in HOSTS if fault.on_host else (None,):
            found = self._result(fault, level, seconds, host)
            if found != "survived":
                break
        return found.replace("caught", UNDER, 1) if host == SANITIZED and found.startswith("caught") else found

    def _result(self, fault: Fault, level: str, seconds: float, host: str | None) -> str:
        if host is not None and host not in self.hosts:
            self.build_host(host, (), is_base=True)
            self.hosts.add(host)
        path = TREE / fault.file
        text = path.read_text()
        path.write_text(fault.planted(text))
        try:
            if fault.kind == "cpu":
                self.build(level, fault.stems)
            if host is not None:
                self.build_host(host, fault.stems)
            return verdict(*run_tests(fault.kind, level, fault.tests, seconds, host))
        except RuntimeError as error:
            return f"error: does not compile: {str(error)[-600:]}"
        finally:
            path.write_text(text)


def save(path: Path, faults: list[Fault], results: dict[str, str]) -> None:
    """Write the results with where they come from; what the file has of faults that did not run now stays."""
    sys.path.append(str(ROOT))
    from benchmarks import provenance

    known = json.loads(path.read_text()) if path.exists() else {"runs": [], "results": []}
    runs = [*known["runs"], {**provenance.gather(), "capability": builds.usual_level()}]
    stored = {(row["file"], row["name"]): row for row in known["results"]}
    chosen, rows = set(faults), []
    for fault in all_faults():
        row = {"name": fault.name, "file": fault.file, "kind": fault.kind}
        old = stored.get((fault.file, fault.name), {"result": "not run"})
        new = results.get(fault.state(TREE), "not run") if fault in chosen else "not run"
        new = new.replace(UNDER, "caught", 1)
        kept = {"result": old["result"], "run": old.get("run")}
        lacking = new == "not run" or (new.startswith("skipped") and old["result"] != "not run")
        rows.append({**row, **(kept if lacking else {"result": new.split(":")[0], "run": len(runs) - 1})})
    used = sorted({row["run"] for row in rows if row["run"] is not None})
    for row in rows:
        row["run"] = None if row["run"] is None else used.index(row["run"])
    words = ("caught", "survived", "skipped", "error", "not run")
    counts = {word: sum(row["result"] == word for row in rows) for word in words}
    content = {"faults": len(rows), **counts, "runs": [runs[number] for number in used], "results": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Runs the chosen faults; 0 if all are caught."""
    given = parse()
    everything = all_faults()
    chosen = [
        fault
        for fault in everything
        if fault.kind in given.kinds and any(word in f"{fault.name} {fault.file}" for word in given.only)
    ]
    if given.list:
        print(*(f"{fault.kind:7} {fault.file}: {fault.name}" for fault in chosen), sep="\n")
        return 0
    tree, kept = Tree(), FOLDER / "results.json"
    known = json.loads(kept.read_text()) if kept.exists() and given.resume else {}
    results = {k: v for k, v in known.get("results", {}).items() if v.startswith("caught")}
    confirmed = [key for key in known.get("confirmed", []) if key in results]
    seen = {fault: fault.state(TREE) for fault in chosen}
    until = time.monotonic() + 60 * given.minutes
    for number, fault in enumerate(chosen, 1):
        begun = time.monotonic()
        if seen[fault] not in results:
            if begun > until:
                continue
            results[seen[fault]] = tree.result(fault, given.seconds)
            kept.write_text(json.dumps({"results": results, "confirmed": confirmed}, indent=1))
        spent = time.monotonic() - begun
        print(f"{number}/{len(chosen)} {fault.file}: {fault.name}: {results[seen[fault]]} ({spent:.0f} s)", flush=True)
    caught_now = {f: results[seen[f]] for f in chosen if results.get(seen[f], "").startswith("caught")}
    for fault, well in tree.confirm({f: r for f, r in caught_now.items() if seen[f] not in confirmed}, given.seconds):
        if well:
            confirmed.append(seen[fault])
        else:
            results[seen[fault]] = f"error: without the fault, too: {results[seen[fault]]}"
            print(f"{fault.file}: {fault.name}: {results[seen[fault]]}", flush=True)
        kept.write_text(json.dumps({"results": results, "confirmed": confirmed}, indent=1))
    found = [results.get(seen[fault], "not run") for fault in chosen]
    caught = sum(each.startswith("caught") for each in found)
    skipped = sum(each.startswith("skipped") for each in found)
    print(f"{len(chosen)} faults: {caught} caught, {skipped} skipped, {len(chosen) - caught - skipped} not caught")
    if given.save:
        save(given.save, chosen, results)
    return int(caught + skipped < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
