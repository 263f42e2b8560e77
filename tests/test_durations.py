"""What a run of tests says of its length, alone and over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import durations
import pytest


def test_seconds_are_those_of_the_last_run_by_file() -> None:
    tests = [f"tests/test_a.py::test[{number}]" for number in range(600)] + ["tests/test_b.py::test"] * 10
    assert durations.expected(tests, {"test_a.py": 0.5}) == pytest.approx(300 + 10 * durations.SECONDS)
    assert durations.announcement(tests, {"test_a.py": 0.5}, 1).startswith("610 tests, about 5 min in one process")
    assert "(by the last run)" in durations.announcement(tests, {"test_a.py": 0.5}, 1)
    over = durations.announcement(tests, {"test_a.py": 1.0}, 2)
    assert over.startswith("610 tests, about 5 min in 2 processes")
    assert "by the mean of all tests" in durations.announcement(tests, {}, 1)
    assert durations.announcement(tests[:20], {}, 1) == ""


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_run_says_it_first_and_remembers(processes: list[str], tmp_path: Path) -> None:
    if processes:
        pytest.importorskip("xdist")
    hook = "def pytest_configure(config):\n    durations.SHORTEST = 0.0\n    durations.register(config)\n"
    (tmp_path / "conftest.py").write_text(f"import durations\n{hook}")
    lines = "import pytest, time\n@pytest.mark.parametrize('n', range(4))\ndef test(n):\n    time.sleep(0.05)\n"
    (tmp_path / "test_few.py").write_text(lines)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    command += ["-o", f"cache_dir={tmp_path / 'cache'}", *processes]
    env = {**os.environ, "PYTHONPATH": str(Path(durations.__file__).parent)}
    env.pop("PYTEST_ADDOPTS", None)
    for source in ("by the mean of all tests", "by the last run"):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        said = [line for line in done.stdout.splitlines() if "4 tests, about 1 min in" in line]
        assert len(said) == 1 and source in said[0], done.stdout
        assert ("2 processes" in said[0]) == bool(processes)
    assert '"test_few.py": 0.0' in (tmp_path / "cache" / "v" / "contrastive_ops" / "seconds").read_text()
