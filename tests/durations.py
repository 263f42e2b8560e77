"""How long a run of tests will take: said when it begins, from what each file took the last time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

# Of a file that was not timed yet: the mean of the whole suite on one core of a shared machine.
SECONDS = 0.12
# Runs that take less need no word.
SHORTEST = 30.0
KEY = "contrastive_ops/seconds"


def file_of(test: str) -> str:
    """The file of a test's name."""
    return test.partition("::")[0].rpartition("/")[2]


def expected(tests: Iterable[str], known: Mapping[str, float]) -> float:
    """Seconds that tests take one after the other."""
    return sum(known.get(file_of(test), SECONDS) for test in tests)


def announcement(tests: Iterable[str], known: Mapping[str, float], processes: int) -> str:
    """What is said before the first test; empty of a short run."""
    names = list(tests)
    seconds = expected(names, known) / processes
    if seconds < SHORTEST:
        return ""
    timed = sum(file_of(name) in known for name in names) / len(names)
    source = "by the last run" if timed > 0.5 else "by the mean of all tests"
    how = f"{processes} processes" if processes > 1 else "one process; -n 2 takes about half of that on two cores"
    return f"{len(names):,} tests, about {max(round(seconds / 60), 1)} min in {how} ({source})"


class Durations:
    """The plug-in of pytest: announces, and keeps the mean seconds of a test by file in pytest's cache."""

    def __init__(self, config) -> None:
        self.config, self.seconds, self.tests, self.said = config, Counter(), Counter(), False

    def known(self) -> dict[str, float]:
        cache = getattr(self.config, "cache", None)
        return dict(cache.get(KEY, {})) if cache is not None else {}

    def announce(self, tests: Iterable[str], processes: int) -> None:
        line = "" if self.said else announcement(tests, self.known(), processes)
        self.said = True
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if line and reporter is not None:
            reporter.write_line(line)

    def pytest_collection_finish(self, session) -> None:
        if session.items:
            self.announce([item.nodeid for item in session.items], 1)

    def pytest_runtest_logreport(self, report) -> None:
        if not report.skipped:
            self.seconds[file_of(report.nodeid)] += report.duration
            self.tests[file_of(report.nodeid)] += report.when == "call"

    def pytest_sessionfinish(self) -> None:
        cache = getattr(self.config, "cache", None)
        if cache is not None and self.tests:
            mean = {name: self.seconds[name] / number for name, number in self.tests.items() if number}
            cache.set(KEY, {**self.known(), **mean})


class OverProcesses:
    """The same where pytest-xdist collects in its workers."""

    def __init__(self, durations: Durations) -> None:
        self.durations = durations

    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self.durations.announce(ids, int(node.workerinput["workercount"]))


def register(config) -> None:
    """Adds the plug-in where a person looks: not in workers."""
    if hasattr(config, "workerinput"):
        return
    durations = Durations(config)
    config.pluginmanager.register(durations)
    if config.pluginmanager.hasplugin("dsession") or config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(OverProcesses(durations))
