"""Peak extra memory of one provider on one case, measured in a process of its own.

Extra is what is resident at the peak of one step, above the inputs and the answer: gradients, or
the lists of a search, are what the caller wants, so their bytes are subtracted. What a provider
builds before its first step (an index) is not extra either. A process of its own, because a peak can
hide below an earlier one, and because what one provider leaves in the allocator would be free for
the next.

    python -m benchmarks.memory CASE PROVIDER [--quick] [--check]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.errors import Errors, errors
from benchmarks.registry import Answer, Case, Provider, Step, all_cases

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


# ---------------------------------------------------------------------------------------------
# In the child


def _status_bytes(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _give_back_free_memory() -> None:
    """Returns what the allocator holds free to the system; it could serve the step unseen."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    """Lowers the process's high-water mark to what is resident now, where Linux allows it.

    Without it the mark starts at whatever was highest before: a larger import, the making of the
    inputs, or the parent, from which an exec'ed child inherits ``ru_maxrss``.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def extra_bytes(step: Step, device: str) -> tuple[int, Answer | None]:
    """The peak above what is there now and the answer, and the answer."""
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = step()
        torch.accelerator.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        _give_back_free_memory()
        _reset_peak()
        before = _peak_bytes()
        answer = step()
        peak = _peak_bytes()
    wanted = 0
    if answer is not None:
        wanted = sum(tensor.numel() * tensor.element_size() for tensor in answer.answers)
    return max(0, peak - before - wanted), answer


def measure_here(case: Case, provider: Provider, *, check: bool) -> tuple[float, Errors | None]:
    """Measures in this process, which should have done nothing else yet.

    One call on the shrunk case comes first: it loads the code pages and starts the threads.
    """
    small = case.shrunk()
    provider.build(small.make_inputs(small))()
    inputs = case.make_inputs(case)
    step = provider.build(inputs)
    extra, answer = extra_bytes(step, case.device)
    found = errors(answer, case.truth(inputs)) if check and answer is not None else None
    return extra / MIB, found


# ---------------------------------------------------------------------------------------------
# In the parent


def measure(case: Case, provider: Provider, *, quick: bool = False, check: bool = False) -> tuple[float, Errors | None]:
    """MiB measured in a subprocess, and errors if asked for; RuntimeError with the last line it printed if it fails.

    Args:
        case: as registered (not shrunk; the child finds it by name).
        provider: one of the case's.
        quick: measure the shrunk case.
        check: also return the errors against the truth; None of an answer that has none.
    """
    command = [sys.executable, "-m", "benchmarks.memory", case.name, provider.name]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--quick"] * quick + ["--check"] * check
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{case.name}, {provider.name}: {lines[-1]}")
    extra, found = json.loads(done.stdout.strip().splitlines()[-1])
    return extra, Errors(**found) if found else None


def main() -> None:
    """The child's entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("provider")
    parser.add_argument("--quick", action="store_true", help="measure the shrunk case")
    parser.add_argument("--check", action="store_true", help="also compare with the truth")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    case = all_cases()[arguments.case]
    provider = case.provider(arguments.provider)
    if arguments.quick:
        case = case.shrunk()
    extra, found = measure_here(case, provider, check=arguments.check)
    print(json.dumps([extra, asdict(found) if found else None]))


if __name__ == "__main__":
    main()
