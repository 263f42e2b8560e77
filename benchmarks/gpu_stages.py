"""Runs commands one after the other, each with a time limit and a log, and says how each ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# A stage with less time than this is not begun.
LEAST_SECONDS = 3.0

Verdict = Callable[[int, str], "tuple[str, str]"]


def last_line(text: str) -> str:
    """The last line with something in it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def verdict_of_status(status: int, log: str) -> tuple[str, str]:
    """Passed if the exit status is 0."""
    return ("passed", "") if status == 0 else ("failed", last_line(log))


def verdict_of_pytest(status: int, log: str) -> tuple[str, str]:
    """pytest's own last line; a run that skipped everything has not passed."""
    said = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+ in [\d.]+s.*?)\s*=*$", log, re.MULTILINE)
    note = said[-1] if said else last_line(log)
    if status == 0 and not re.search(r"\b[1-9]\d* passed", note):
        return "skipped", note
    return ("passed" if status == 0 else "failed"), note


def verdict_of_sanitizer(status: int, log: str) -> tuple[str, str]:
    """Failed if it found errors or the calls failed; some virtual machines do not let it see the device."""
    refused = re.search(r"Device not supported|No attachable process|not supported on this (?:system|device)", log)
    if refused:
        return "skipped", f"compute-sanitizer cannot run here: {refused[0]}"
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    return ("passed" if status == 0 and found else "failed"), found[-1] if found else last_line(log)


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage; its log is name.log.
        command: what is run.
        limit: seconds after which it is ended.
        cwd: the folder, if it is not that of all stages.
        env: variables on top of those of all stages.
        verdict: makes a status and a note of the exit status and the log.
        skip: why it is not run.
        essential: nothing follows if it fails.
        may_be_cut: its results so far count when the time is over.
    """

    name: str
    command: Sequence[str]
    limit: float
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    verdict: Verdict = verdict_of_status
    skip: str | None = None
    essential: bool = False
    may_be_cut: bool = False


@dataclass(frozen=True)
class Result:
    """How a stage ended: passed, failed, skipped, timed out, or cut (its results so far count)."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the whole command must fail."""
        return self.status in ("failed", "timed out")


def run_stage(stage: Stage, *, folder: Path, cwd: Path, env: Mapping[str, str], left: float) -> Result:
    """Runs one stage within its limit and the time that is left."""
    if stage.skip is not None:
        return Result(stage.name, "skipped", note=stage.skip)
    limit = min(stage.limit, left)
    if limit < LEAST_SECONDS:
        return Result(stage.name, "cut" if stage.may_be_cut else "timed out", note="no time was left for it")
    path = folder / f"{stage.name.replace(' ', '-')}.log"
    started = time.monotonic()
    with path.open("w") as log:
        log.write(f"$ {' '.join(stage.command)}\n")
        log.flush()
        status = _run(stage, log, cwd=stage.cwd or cwd, env={**env, **stage.env}, limit=limit)
    seconds = time.monotonic() - started
    if status is None:
        return Result(stage.name, "cut" if stage.may_be_cut else "timed out", seconds, f"ended after {limit:.0f} s")
    verdict, note = stage.verdict(status, path.read_text(errors="replace"))
    return Result(stage.name, verdict, seconds, note)


def _run(stage: Stage, log, *, cwd: Path, env: Mapping[str, str], limit: float) -> int | None:
    """The exit status, or None if the command and all that it started had to be ended."""
    try:
        process = subprocess.Popen(
            stage.command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also what a command leaves running, and all of it when this program is interrupted.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stages(
    first: Sequence[Stage],
    rest: Callable[[], Sequence[Stage]],
    *,
    folder: Path,
    cwd: Path,
    env: Mapping[str, str],
    seconds: float,
    report: Callable[[Sequence[Result]], None] = lambda results: None,
) -> list[Result]:
    """Runs the first stages, then those that are known only after them, within ``seconds`` altogether.

    ``report`` is given all results so far after each stage.
    """
    end = time.monotonic() + seconds
    results: list[Result] = []
    for stages in (lambda: first, rest):
        for stage in stages():
            left = end - time.monotonic()
            print(f"=== {stage.name} (at most {max(min(stage.limit, left), 0):.0f} s)", flush=True)
            result = run_stage(stage, folder=folder, cwd=cwd, env=env, left=left)
            print(f"    {result.status} after {result.seconds:.1f} s: {result.note}", flush=True)
            results.append(result)
            report(results)
            if stage.essential and result.is_bad:
                return results
    return results
