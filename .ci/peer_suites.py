"""Runs the test suites of other packages with the classes of `contrastive_ops.integrations` in the place of theirs.

    make peer-suites                                              the versions in requirements/peers.txt, cloned
    make peer-suites ARGS="--only lightly --sources ~/clones"     of clones that are there, of any version

Wheels and sdists of these packages carry no test of a loss or of mining, so the sources are cloned into
build/peer_suites. A test that fails is run once more with the package's own classes: where it fails there, too, it says
nothing of ours (tests of another version than the installed one, files that only a network would give). `differences`
of a suite are what fails with our classes alone and shall; anything else is an error, and so is a difference that is
none.

This file is also the plug-in of pytest that puts the classes there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "peer_suites"
OURS = "contrastive_ops.integrations"
PACKAGE, OUTCOMES = "PEER_SUITES_PACKAGE", "PEER_SUITES_OUTCOMES"


@dataclass(frozen=True)
class Suite:
    """Tests of a package.

    Attributes:
        repository: on GitHub.
        distribution: what pip calls it.
        tests: folders and files that ask something of a class that we have.
        needs: what these tests import beside the package.
        variables: of the environment.
        models: whether tests load models of a hub, for which there are stand-ins.
        differences: tests that fail with our classes, and why they shall; docs/integrations.md names each.
        chance: the same of tests that pass or fail by what they draw.
    """

    repository: str
    distribution: str
    tests: tuple[str, ...]
    needs: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    models: bool = False
    differences: dict[str, str] = field(default_factory=dict)
    chance: dict[str, str] = field(default_factory=dict)


def named(folder: str, words: str, kind: str) -> tuple[str, ...]:
    """Files of pytorch-metric-learning."""
    plain = {"cross_batch_memory", "losses_without_labels", "multiple_losses", "batch_easy_hard_miner_labels"}
    return tuple(f"tests/{folder}/test_{word}{'' if word in plain else f'_{kind}'}.py" for word in words.split())


LOSSES = "arcface contrastive cosface cross_batch_memory losses_without_labels multi_similarity multiple_losses ntxent"
LOSSES += " self_supervised triplet_margin"
MINERS = "batch_easy_hard batch_easy_hard_miner_labels batch_hard multi_similarity pair_margin triplet_margin"
GIST = "tests/sentence_transformer/losses/test_{}gist_embed.py"
PROTECTS = "test_positive_mask_protects_ce_target_column"
SUPPRESSES = "test_relative_margin_negative_positive_score_suppresses_closer_negative"
GRADCACHE = "tests/sentence_transformer/losses/test_gradcache.py"
MINING = "tests/util/test_hard_negatives.py"
NO_FAISS = "FAISS on a GPU lists 2,048 columns at most, and ours asks no FAISS"
VICREG = "tests/loss/test_vicreg_loss.py"
SUITES = {
    "lightly": Suite(
        "lightly-ai/lightly",
        "lightly",
        tuple(f"tests/loss/test_{name}_loss.py" for name in ("ntx_ent", "dcl", "vicreg", "vicregl", "barlow_twins")),
        ("pytest-mock",),
        chance={
            f"{VICREG}::TestVICRegLoss::test_forward__compare": "of random rows it asks for the very bits of another "
            "formula, from which ours is the last digit away in one of five draws",
        },
    ),
    "pytorch_metric_learning": Suite(
        "KevinMusgrave/pytorch-metric-learning",
        "pytorch-metric-learning",
        (*named("losses", LOSSES, "loss"), *named("miners", MINERS, "miner")),
        # Of float16 rows our losses are float32 numbers, which these tests compare with float16 ones.
        variables={"TEST_DEVICE": "cpu", "TEST_DTYPES": "float32,float64"},
        chance={
            "tests/losses/test_losses_without_labels.py::TestLossesWithoutLabels::test": "of random rows it asks the "
            "lists that the package's own code takes without labels for the very bits of a sweep by labels",
        },
    ),
    "sentence_transformers": Suite(
        "huggingface/sentence-transformers",
        "sentence-transformers",
        (
            "tests/sentence_transformer/losses",
            "tests/sentence_transformer/evaluation",
            "tests/sparse_encoder/losses",
            "tests/util/test_hard_negatives.py",
            "tests/util/test_retrieval.py",
        ),
        variables={"HF_HUB_OFFLINE": "1"},
        models=True,
        differences={
            **dict.fromkeys(
                (
                    *(f"{GIST.format('cached_')}::{PROTECTS}[{size}]" for size in (2, 32)),
                    f"{GIST.format('cached_')}::{SUPPRESSES}",
                    f"{GIST.format('')}::{PROTECTS}",
                    f"{GIST.format('')}::{SUPPRESSES}",
                ),
                "it takes the place of the cross-entropy inside the loss and reads its matrix, which ours never makes",
            ),
            f"{GRADCACHE}::test_gradcache_under_autocast": "it begins with a loss of bfloat16; ours is float32",
            f"{MINING}::test_non_faiss_batched_search_matches_single_batch": "it counts the parts of a matrix",
            f"{MINING}::test_num_negatives_exceeds_range_window_capped_by_faiss": NO_FAISS,
            f"{MINING}::test_range_min_above_faiss_capped_range_max": NO_FAISS,
        },
    ),
}


def replacements(package: str) -> Iterator[tuple[str, Any, Any]]:
    """Names, what is theirs, and what takes its place."""
    ours = importlib.import_module(f"{OURS}.{package}")
    for name, mine in list(vars(ours).items()):
        if isinstance(mine, type):
            found = [base for base in mine.__mro__ if base.__name__ == name and base.__module__.startswith(package)]
            if found and mine is not found[0]:
                yield name, found[0], mine
        elif name in getattr(ours, "__all__", ()):
            yield name, getattr(sys.modules[f"{package}.util"], name), mine


used: Counter[str] = Counter()


def counted(name: str, mine: Any) -> Any:
    """The same, with a count of how often it is made or called."""
    used[name] = 0
    function = mine.__init__ if isinstance(mine, type) else mine

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        used[name] += 1
        return function(*args, **kwargs)

    if not isinstance(mine, type):
        return call
    mine.__init__ = call
    return mine


kept: list[tuple[Any, str, Any]] = []


def pytest_configure() -> None:
    """Put our classes where the package has its own."""
    package = os.environ.get(PACKAGE)
    if not package:
        return
    for name, theirs, mine in list(replacements(package)):
        instead = counted(name, mine)
        for key, module in list(sys.modules.items()):
            if key.partition(".")[0] == package:
                for at in [at for at, value in vars(module).items() if value is theirs]:
                    setattr(module, at, instead)
                    if key == theirs.__module__:
                        kept.append((module, at, theirs))


def pytest_collection_finish() -> None:
    """Give a module back what it defines, which may say `super(Loss, self)`; tests have imported ours from it."""
    for module, name, theirs in kept:
        setattr(module, name, theirs)


def pytest_runtest_logreport(report: Any) -> None:
    """Note how each test ended."""
    if report.outcome == "failed" or report.when == "call":
        note({"test": report.nodeid, "outcome": report.outcome})


def pytest_collectreport(report: Any) -> None:
    """Note a file that cannot be imported."""
    if report.failed:
        note({"test": report.nodeid, "outcome": "failed"})


def pytest_sessionfinish() -> None:
    """Note what was used."""
    note({"used": dict(used)})


def note(found: dict[str, Any]) -> None:
    """Add a line to what the caller reads."""
    with open(os.environ[OUTCOMES], "a") as file:
        file.write(json.dumps(found) + "\n")


def sources(suite: Suite, clones: Path | None) -> Path:
    """The folder with the tests of a suite."""
    name = suite.repository.rpartition("/")[2]
    folder, clone = BUILD / name, (clones or BUILD / "clones") / name
    if clones is None and not clone.exists():
        tag = f"v{importlib.metadata.version(suite.distribution)}"
        address = f"https://github.com/{suite.repository}.git"
        subprocess.run(["git", "clone", "-q", "--depth", "1", "--branch", tag, address, str(clone)], check=True)
    archive = subprocess.run(["git", "-C", str(clone), "archive", "HEAD", "tests"], check=True, capture_output=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def outcomes(package: str, suite: Suite, folder: Path, tests: list[str], ours: bool) -> tuple[dict[str, str], Any]:
    """How tests end, and how often each of our classes was made."""
    noted = BUILD / f"{package}.{'ours' if ours else 'theirs'}.jsonl"
    noted.unlink(missing_ok=True)
    paths = os.pathsep.join([str(Path(__file__).parent), str(BUILD / "needs"), str(ROOT)])
    chosen = {PACKAGE: package if ours else "", OUTCOMES: str(noted), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_suites", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--rootdir", str(folder), "-c", os.devnull, "--continue-on-collection-errors", "-W", "ignore", *tests]
    with (BUILD / f"{package}.{'ours' if ours else 'theirs'}.log").open("w") as log:
        subprocess.run(command, cwd=folder, env={**os.environ, **suite.variables, **chosen}, stdout=log, stderr=log)
    lines = [json.loads(line) for line in noted.read_text().splitlines()]
    ended: dict[str, str] = {}
    for line in lines:
        if "test" in line and ended.get(line["test"]) != "failed":
            ended[line["test"]] = line["outcome"]
    return ended, lines[-1].get("used", {})


def run(package: str, suite: Suite, clones: Path | None) -> bool:
    """Run a suite, print what came of it, and return whether that is as it shall be."""
    if suite.needs:
        needs = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(BUILD / "needs")]
        subprocess.run([*needs, "--upgrade", *suite.needs], check=True)
    folder = sources(suite, clones)
    if suite.models:
        home = BUILD / f"{package}.hub"
        shutil.rmtree(home, ignore_errors=True)
        command = [sys.executable, str(Path(__file__).with_name("peer_models.py")), str(home), str(folder / "tests")]
        subprocess.run(command, check=True, capture_output=True)
        suite.variables["HF_HOME"] = str(home)
    ended, made = outcomes(package, suite, folder, list(suite.tests), ours=True)
    failed = sorted(test for test, outcome in ended.items() if outcome == "failed")
    again = outcomes(package, suite, folder, failed, ours=False)[0] if failed else {}
    only_here = {test for test in failed if again.get(test) == "passed"}
    numbers = Counter(ended.values())
    print(f"{package}: {numbers['passed']} passed, {numbers['skipped']} skipped, {numbers['failed']} failed")
    print(f"  of these with the package's own classes, too: {numbers['failed'] - len(only_here)}")
    for name in sorted(name for name, number in made.items() if not number):
        print(f"  not asked by any test: {name}")
    named = suite.differences | suite.chance
    for test in sorted(only_here & set(named)):
        print(f"  different: {test}: {named[test]}")
    unknown, gone = sorted(only_here - set(named)), sorted(set(suite.differences) - only_here)
    for test in unknown:
        print(f"  FAILS: {test}")
    for test in gone:
        print(f"  NO DIFFERENCE: {test}")
    return bool(numbers["passed"]) and not unknown and not gone


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(SUITES), nargs="+", default=sorted(SUITES), help="packages")
    parser.add_argument("--sources", type=Path, help="folder of clones, named as the repositories are")
    options = parser.parse_args(arguments)
    BUILD.mkdir(parents=True, exist_ok=True)
    ended = [run(package, SUITES[package], options.sources) for package in options.only]
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
