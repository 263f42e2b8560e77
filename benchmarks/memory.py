"""Peak extra memory of one provider on one case, measured in a process of its own.

Extra is what is resident at the peak of one forward and backward, above the inputs and the
gradients: the gradients are the answer, so their bytes are subtracted. A process of its own,
because a peak can hide below an earlier one, and because what one provider leaves in the
allocator would be free for the next.

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
from pathlib import Path

import torch

from benchmarks.registry import Case, Outcome, Provider, Step, all_cases
from benchmarks.truth import errors

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


def _extra_bytes(step: Step, device: str) -> tuple[int, Outcome | None]:
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome = step()
        torch.accelerator.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        _give_back_free_memory()
        _reset_peak()
        before = _peak_bytes()
        outcome = step()
        peak = _peak_bytes()
    gradients = 0
    if outcome is not None:
        gradients = sum(grad.numel() * grad.element_size() for grad in outcome.grads.values())
    return max(0, peak - before - gradients), outcome


def measure_here(case: Case, provider: Provider, *, check: bool) -> dict[str, float]:
    """Measures in this process, which should have done nothing else yet.

    One call on the shrunk case comes first: it loads the code pages and starts the threads.
    """
    small = case.shrunk()
    provider.build(small.make_inputs(small))()
    inputs = case.make_inputs(case)
    step = provider.build(inputs)
    extra, outcome = _extra_bytes(step, case.device)
    result = {"peak_extra_mib": extra / MIB}
    if check and outcome is not None:
        result["loss_error"], result["grad_error"] = errors(outcome, case.truth(inputs))
    return result


# ---------------------------------------------------------------------------------------------
# In the parent


def measure(case: Case, provider: Provider, *, quick: bool = False, check: bool = False) -> dict[str, float]:
    """Measures in a subprocess; RuntimeError with the last line of its output if that fails.

    Args:
        case: as registered (not shrunk; the child finds it by name).
        provider: one of the case's.
        quick: measure the shrunk case.
        check: also return the errors against the truth.
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
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    print(json.dumps(measure_here(case, provider, check=arguments.check)))


if __name__ == "__main__":
    main()
