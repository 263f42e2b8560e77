"""All that needs a GPU, in one command and eight minutes: build, tests, experiments, compute-sanitizer, benchmarks.

    make gpu                                     or: python -m benchmarks.gpu
    make gpu ARGS="--output folder"              logs, results and the summary (default: gpu-results)
    make gpu ARGS="--only tests --minutes 5"     the stages whose names contain a word; a limit for all together
    make gpu ARGS="--only experiment"            what single sweeps and steps take, and who is faster at which shape
    make gpu ARGS="--rehearse"                   the same on a machine without a GPU, on what stands in for it

It runs on the torch of this Python, installs nothing and needs no network: the package is built into
``build/gpu`` for the GPU that is here. Kernels of each backend are tested on the device. Each stage has a
time limit and a log of its own; a stage that cannot run says why. The exit status is 1 if the build, a test,
the sanitizer or a check of results failed, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import gpu_tables
from benchmarks.gpu_stages import (
    Result,
    Stage,
    last_line,
    run_stages,
    verdict_of_pytest,
    verdict_of_sanitizer,
    verdict_of_status,
)

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
MINUTES = 8.0
BACKENDS = ("triton", "cuda")
# Seconds of each of `gpu_trials.EXPERIMENTS`, in the order in which they decide what comes after; each may be cut.
EXPERIMENTS = {
    "folds": 22,
    "weights": 18,
    "products": 12,
    "clip": 25,
    "host": 15,
    "siglip": 18,
    "topk": 18,
    "persistent": 25,
    "grouped": 15,
    "router": 12,
}

# Run by a Python of their own: a crash there must not end this one. Each prints one line of JSON at last.
ASK_DEVICE = """
import json, sys, torch
facts = {"python": sys.version.split()[0], "torch": str(torch.__version__), "cuda": torch.version.cuda}
facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
if facts["gpu"]:
    properties = torch.cuda.get_device_properties(0)
    facts["capability"] = [properties.major, properties.minor]
    facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
print(json.dumps(facts))
"""
ASK_BACKENDS = """
import json, torch
from contrastive_ops.core import extension, triton_kernels
from contrastive_ops.ops.similarity_reduce import BACKENDS
x = torch.empty(0, 1, device="cuda")
why = {name: "; ".join(BACKENDS[name].unsupported(x)) if name in BACKENDS else "not in this version"
       for name in ("triton", "cuda", "hopper")}
module = extension.load()
built = module.build_config()["cuda"] if module is not None else "no"
print(json.dumps({"why": {name: text or None for name, text in why.items()}, "built": built}))
"""


def ask(script: str, env: dict[str, str], seconds: float = 120) -> dict:
    """What a script prints in its last line; {"error": ...} if it fails."""
    command = [sys.executable, "-c", script]
    try:
        done = subprocess.run(command, cwd=WORK, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} s"}
    if done.returncode:
        return {"error": last_line(done.stderr) or f"exit status {done.returncode}"}
    return json.loads(last_line(done.stdout))


def said_by(*command: str) -> str:
    """The first line that a program prints, or an empty string."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def provenance(facts: dict) -> dict:
    """Where the results come from."""
    versions = {name: _version(name) for name in ("triton", "pytest", "numpy")}
    driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    # Of the folder of the checkout: its parent may be a repository of something else.
    commit = said_by("git", "rev-parse", "HEAD") if (ROOT / ".git").exists() else ""
    changed = bool(said_by("git", "status", "--porcelain")) if commit else None
    nvcc = shutil.which("nvcc") and subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    release = [line for line in (nvcc.stdout if nvcc else "").splitlines() if "release" in line]
    toolkit = release[0].strip() if release else None
    return {**facts, **versions, "driver": driver or None, "nvcc": toolkit, "commit": commit or None, "dirty": changed}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, str]:
    """The built package before the checkout, which lends its tests and benchmarks."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    path = [str(WORK / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {f"{name}_CACHE_DIR": str(WORK / "caches" / name.lower()) for name in ("TRITON", "TORCHINDUCTOR")}
    return {**kept, **caches, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}


# ---- Stages


def build_stage(capability: Sequence[int]) -> Stage:
    """The extension with code for this GPU alone; what pip would install, without pip."""
    own = "9.0a" if tuple(capability) == (9, 0) else "{}.{}".format(*capability)
    wanted = {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", own)}
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build", "--build-base", str(WORK / "objects")]
    command += ["--build-lib", str(WORK / "site")]
    return Stage("build", command, limit=150, cwd=ROOT, env=wanted, essential=True)


def pytest_command(files: Iterable[Path], *options: str) -> list[str]:
    """Runs test files from anywhere, with the plugins that are here."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", "--maxfail=30", "--durations=5"]
    if importlib.util.find_spec("xdist"):
        # Compiling for the device is most of the time, and happens on the processor.
        command += ["-n", str(min(14, os.cpu_count() or 1))]
    return [*command, *options, *map(str, sorted(files))]


def test_stages(why: dict[str, str | None]) -> list[Stage]:
    """The tests of kernels on the device, first of those that no device has run; ``why`` a backend cannot run.

    Those for Hopper GPUs begin with their instructions, one by one: nothing above them makes sense before.
    """
    of_hopper = {"hopper parts": ("primitives",), "hopper": ("similarity", "topk")}
    first = {ROOT / "tests" / f"test_kernels_{name}.py" for name in ("stored", "maxsim", "persistent")}
    files = {
        "triton": {*ROOT.glob("tests/test_kernels_*.py")} - first - {ROOT / "tests" / "test_kernels_compile.py"},
        "cuda": {*ROOT.glob("tests/test_cuda_*.py"), ROOT / "tests" / "test_extension_cuda.py"},
    }
    missing = None if importlib.util.find_spec("pytest") else "pytest is not installed"
    nobody = None if None in why.values() else "no backend can run"
    stages = [
        *(
            (f"tests {name}", {ROOT / "tests" / f"test_hopper_{stem}.py" for stem in stems}, 20, why.get("hopper"))
            for name, stems in of_hopper.items()
        ),
        ("tests first run", first, 40, why["triton"]),
        ("tests graphs", {ROOT / "tests" / "test_graphs.py"}, 20, nobody),
        *((f"tests {name}", files[name], 85, why[name]) for name in BACKENDS),
    ]
    return [
        Stage(name, pytest_command(chosen), limit=limit, verdict=verdict_of_pytest, skip=missing or skip)
        for name, chosen, limit, skip in stages
    ]


def sanitizer_stages(why: dict[str, str | None]) -> list[Stage]:
    """A few calls of the CUDA kernels under compute-sanitizer; torch's cache would hide what is out of bounds."""
    tool = shutil.which("compute-sanitizer")
    skip = why["cuda"] or (None if tool else "compute-sanitizer was not found")
    calls = [sys.executable, "-m", "benchmarks.gpu_calls", "cuda"]
    # torch asks the driver for much that it may not have; those answers are no errors of kernels.
    options = ["--error-exitcode", "99", "--report-api-errors", "no"]
    return [
        Stage(
            f"sanitizer {name}",
            [tool or "compute-sanitizer", "--tool", name, *options, *calls],
            limit=30,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            verdict=verdict_of_sanitizer,
            skip=skip,
        )
        for name in ("memcheck", "racecheck")
    ]


def experiment_stages(output: Path, why: dict[str, str | None]) -> list[Stage]:
    """Each in a process of its own, so that a kernel that hangs takes no other with it."""
    nobody = None if None in why.values() else "no backend can run"
    command = [sys.executable, "-m", "benchmarks.gpu_experiments", "--csv", str(output / "experiments.csv")]
    return [
        Stage(
            f"experiment {name}",
            [*command, "--seconds", str(limit / 2), name],
            limit=limit,
            may_be_cut=True,
            skip=nobody,
        )
        for name, limit in EXPERIMENTS.items()
    ]


def benchmark_stage(output: Path, why: dict[str, str | None]) -> Stage:
    """The cases for GPUs, most wanted first, for as long as there is time."""
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--optional"]
    command += ["--csv", str(output / "benchmarks.csv")]
    nobody = None if None in why.values() else "no backend can run"
    return Stage("benchmarks", command, limit=300, may_be_cut=True, skip=nobody)


def plan(output: Path, why: dict[str, str | None]) -> list[Stage]:
    """What follows the build: what has never run on a device, what it takes, and then what has run before."""
    tests = test_stages(why)
    new = [stage for stage in tests if stage.name.startswith("tests hopper")]
    known = [stage for stage in tests if stage not in new]
    last = [*known, *sanitizer_stages(why), benchmark_stage(output, why)]
    return [*new, *experiment_stages(output, why), *last]


def rehearsed(stage: Stage) -> Stage:
    """The stage on what stands in for the device: Triton's interpreter, the host twin of CUDA, the CPU's backends.

    What takes longer there than its limit is cut, which is no failure.
    """
    command, verdict = list(stage.command), stage.verdict
    if stage.name == "build":
        command = [sys.executable, "-c", "import contrastive_ops; print(contrastive_ops.__version__)"]
    elif stage.name.startswith("sanitizer"):
        command, verdict = [sys.executable, "-m", "benchmarks.gpu_calls", "reference", "cpu"], verdict_of_status
    elif stage.name == "benchmarks":
        command[command.index("cuda")] = "cpu"
        command += ["--quick", "--no-memory", "--no-peers"]
    elif stage.name.startswith("experiment"):
        command.append("--rehearse")
    return replace(stage, command=command, verdict=verdict, skip=None, may_be_cut=True)


# ---- The command


def summary(results: Sequence[Result], facts: dict, output: Path) -> str:
    """The table that is printed last."""
    keys = ("gpu", "driver", "torch", "cuda", "triton", "nvcc", "commit")
    lines = [*gpu_tables.of_experiments(gpu_tables.read(output / "experiments.csv")), ""]
    lines += [*gpu_tables.of_benchmarks(gpu_tables.read(output / "benchmarks.csv")), ""]
    lines += [f"{key}: {facts.get(key) or 'none'}" for key in keys]
    lines += ["", *(f"{r.name:<22} {r.status:<10} {r.seconds:>6.1f} s  {r.note}".rstrip() for r in results)]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder of logs and results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together (default: 8)")
    parser.add_argument("--only", help="the stages whose names contain this, after the build")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on what stands in for it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parse(arguments)
    WORK.mkdir(parents=True, exist_ok=True)
    env = environment()
    facts = ask(ASK_DEVICE, env)
    if args.rehearse:
        env["TRITON_INTERPRET"] = "1"
        facts |= {"gpu": "none: this is a rehearsal", "capability": [9, 0]}
    if not facts.get("gpu"):
        why = facts.get("error") or f"torch {facts['torch']} sees none"
        print(f"make gpu needs an NVIDIA GPU and a CUDA build of torch: {why}", file=sys.stderr)
        return 2
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for name in ("experiments", "benchmarks"):
        (output / f"{name}.csv").unlink(missing_ok=True)
    facts = provenance(facts)
    print(json.dumps(facts, indent=1), flush=True)

    def after_build() -> list[Stage]:
        found = {"why": dict.fromkeys(BACKENDS)} if args.rehearse else ask(ASK_BACKENDS, env)
        facts["backends"] = found
        failed = found.get("error")
        why = dict.fromkeys(BACKENDS, f"the package does not import: {failed}") if failed else found["why"]
        stages = plan(output, why)
        chosen = [stage for stage in stages if args.only is None or args.only in stage.name]
        return [rehearsed(stage) for stage in chosen] if args.rehearse else chosen

    def report(results: Sequence[Result]) -> None:
        """What is known so far: a run that is ended early leaves what it found."""
        (output / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
        (output / "summary.txt").write_text(summary(results, facts, output) + "\n")

    build = build_stage(facts["capability"])
    stages = [rehearsed(build) if args.rehearse else build]
    seconds = 60 * args.minutes - 10
    results = run_stages(stages, after_build, folder=output, cwd=WORK, env=env, seconds=seconds, report=report)
    print(f"\n{(output / 'summary.txt').read_text().rstrip()}", flush=True)
    return int(any(result.is_bad for result in results))


if __name__ == "__main__":
    sys.exit(main())
