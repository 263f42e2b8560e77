"""Command line: ``python -m contrastive_ops info | check | bench``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import contrastive_ops
from contrastive_ops import _checkout, _compilers

PACKAGE = Path(__file__).resolve().parent
CHECKED_BUILD = "CONTRASTIVE_OPS_EXT=1"  # a build that fails says so
MIN_SETUPTOOLS = 77  # as in pyproject.toml
# Largest relative error of a result and of each gradient against the reference in float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m contrastive_ops")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what is installed, what can run, and why not")
    info.add_argument("--json", action="store_true", help="print JSON, for issues and scripts")
    commands.add_parser("check", help="compare every available backend with the reference")
    commands.add_parser("bench", help="run the benchmark suite of a source checkout", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "bench":  # only bench hands its arguments on
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "info":
        facts = collect_info()
        print(json.dumps(facts, indent=2) if options.json else "\n".join(format_info(facts)))
        return 0
    return run_check() if options.command == "check" else run_bench(rest)


# ---------------------------------------------------------------------------------------------
# info


def collect_info() -> dict[str, Any]:
    """Facts about the installation; a fact that cannot be had is replaced by its error."""
    return {
        "contrastive_ops": probe(
            lambda: {
                "version": contrastive_ops.__version__,
                "location": str(PACKAGE),
                "editable": _record().get("dir_info", {}).get("editable", False),
                "installed": [str(folder) for folder in _checkout.installed_copies()],
            }
        ),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": probe(lambda: {"version": str(torch.__version__), "cuda": torch.version.cuda}),
        "extension": probe(_extension_info),
        "cpu": probe(_cpu_info),
        "backends": probe(_backends),
        "triton": probe(_triton_version),
        "cuda_devices": probe(_cuda_devices),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("CONTRASTIVE_OPS_")},
    }


def probe(fact: Callable[[], Any]) -> Any:
    """The fact, or the text of the error that hides it: `info` must not fail where it is needed."""
    try:
        return fact()
    except Exception as error:
        return f"unknown: {type(error).__name__}: {error}"


def _extension_info() -> dict[str, Any]:
    from contrastive_ops.core import eager, extension

    module = extension.load()
    if module is None:
        return {"present": False, "why": probe(extension.reason) or "unknown", "fix": _fix_commands()}
    report, config, file = extension.report(), dict(module.build_config()), str(module.__file__)
    facts: dict[str, Any] = {"present": True, "file": file, "build": report.get("summary"), "config": config}
    facts["losses_in_C++"] = probe(lambda: eager.reason() or "yes")
    if Path(file).parent != PACKAGE:
        facts["note"] = f"the Python code is that of {PACKAGE}, which is not built; the C++ sources are the same"
    if config.get("cuda") == "no":
        facts["why_no_cuda"] = report.get("why_no_cuda") or "unknown"
    return facts


def _record() -> dict[str, Any]:
    """What pip recorded of the folder in use; empty where nobody did."""
    return next((record for folder, record in _checkout.installations() if folder == PACKAGE and record), {})


def _source() -> str | None:
    """What pip can build the package from: the clone in use, or what it was installed from."""
    record, root = _record(), _checkout.source_folder()
    url = str(record.get("url", ""))
    if root is not None:
        return f"{'-e ' if record else ''}{shlex.quote(str(root))}"
    if "vcs_info" in record:
        return shlex.quote(f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}")
    if url.startswith("file:"):
        path = _checkout.local_path(url)
        return None if path.suffix == ".whl" or not path.exists() else shlex.quote(str(path))
    return shlex.quote(url) if url else None


def _fix_commands() -> list[str]:
    """The commands that build the extension in this environment."""
    from contrastive_ops.core import extension

    commands, other = _compilers.remedies(extension.reason() or "")
    source = _source()
    if source is None:
        return [*commands, f"install it again from the folder of its source code, with {CHECKED_BUILD}"]
    # Without isolation nothing is downloaded, but then the build needs this of the environment.
    isolation = "--no-build-isolation " if _has_setuptools() else ""
    python = shlex.quote(sys.executable or "python")
    install = f"-m pip install {isolation}--no-deps --no-cache-dir --force-reinstall {source}"
    compiler = f"CXX={other} " if other else ""
    return [*commands, f"{compiler}{CHECKED_BUILD} {python} {install}"]


def _has_setuptools() -> bool:
    """Whether setuptools can build this package."""
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= MIN_SETUPTOOLS
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


def _cpu_info() -> dict[str, Any]:
    from contrastive_ops.core import extension

    module = extension.load()
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "openmp_runtimes": probe(_openmp_runtimes),
    }
    if module is not None:
        facts["simd_detected"] = probe(module.cpu_capability_detected)
        facts["simd_used"] = probe(module.cpu_capability)
        facts["simd_cap"] = os.environ.get("CONTRASTIVE_OPS_CPU_CAPABILITY") or None
        if facts["simd_cap"] not in (None, facts["simd_used"]):
            facts["simd_note"] = "CONTRASTIVE_OPS_CPU_CAPABILITY caps the level, and this processor has no higher one"
    if isinstance(facts["openmp_runtimes"], list) and len(facts["openmp_runtimes"]) > 1:
        facts["openmp_note"] = (
            "several OpenMP runtimes are loaded, and each starts threads for all cores; this package takes torch's."
            " Install what brings the others (scikit-learn, faiss) from where torch is from, or set OMP_NUM_THREADS"
        )
    return facts


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries of this process; two of them oversubscribe the cores."""
    names = ("libgomp", "libiomp", "libomp")
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(str(path) for path in mapped if path.name.startswith(names))


def _backends() -> dict[str, str]:
    from contrastive_ops.core import backends

    tables = backends.backends()
    found = {}
    for name in dict.fromkeys(name for table in tables.values() for name in table):
        reasons = dict.fromkeys(table[name] or "available" for table in tables.values() if name in table)
        without = [primitive for primitive, table in tables.items() if name not in table]
        named = [primitive for primitive, table in backends.by_name().items() if name in table]
        found[name] = "; ".join(reasons) + (f" (has no {', '.join(without)})" if without else "")
        found[name] += f" (by name only, not by 'auto': {', '.join(named)})" if named else ""
    return found


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 20} MiB" for p in properties]


def format_info(facts: Any, indent: int = 0) -> Iterator[str]:
    """The lines of a nested dictionary, one fact a line."""
    pad = " " * indent
    for name, value in facts.items():
        label = name.replace("_", " ") if indent == 0 else name
        if isinstance(value, dict) and value:
            yield f"{pad}{label}"
            yield from format_info(value, indent + 2)
        elif isinstance(value, list) and len(value) > 1:
            yield f"{pad}{label}"
            yield from (f"{pad}  {item}" for item in value)
        else:
            text = value[0] if isinstance(value, list) and value else value
            yield f"{pad}{label:<{20 - indent}} {_say(text)}"


def _say(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _cuda_kernels() -> str:
    """The toolkit and the GPUs that the kernels were compiled for, or why there are none."""
    from contrastive_ops.core import cuda_kernels, extension

    missing = cuda_kernels.why_missing()
    if missing is not None:
        return missing
    module: Any = extension.load()
    return str(module.build_config()["cuda"])


# ---------------------------------------------------------------------------------------------
# check

Case = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]


def check_cases() -> dict[str, Case]:
    """Small calls of the public functions: two matrices and a backend in, a scalar out."""
    from contrastive_ops.core.fold_kinds import FOLDS

    co = contrastive_ops

    def reduce_rows(x: torch.Tensor, y: torch.Tensor, backend: str) -> torch.Tensor:
        return co.similarity_reduce(x, y, scale=3.0, backend=backend).square().sum()

    def reduce_self(x: torch.Tensor, y: torch.Tensor, backend: str) -> torch.Tensor:
        # One row has no pair then: its result is -inf, which exp turns into a number.
        pairs = co.Pairs(diagonal=0)
        return co.similarity_reduce(x, scale=3.0, pairs=pairs, backend=backend).exp().sum()

    def reduce_folds(x: torch.Tensor, y: torch.Tensor, backend: str) -> torch.Tensor:
        ids = torch.arange(len(x), device=x.device), torch.arange(len(y), device=x.device) // 2
        kinds = tuple(name for name in FOLDS if name != "count")
        folds: tuple[str | contrastive_ops.Fold, ...] = (
            *kinds,
            co.Fold("sum_softplus", scale=2.0, pairs=co.Pairs(differ=ids, below=0.5), negate=True),
        )
        reduced = co.similarity_reduce(x, y, reduce=folds, dim=(0, 1), scale=3.0, backend=backend)
        return sum((v.square().sum() for v in (*reduced.rows, *reduced.cols)), x.new_zeros(()))  # type: ignore[misc]

    return {
        "similarity_reduce": reduce_rows,
        "similarity_reduce, self": reduce_self,
        "similarity_reduce, folds": reduce_folds,
        "info_nce": lambda x, y, backend: co.info_nce(x, y[: len(x)], temperature=0.2, backend=backend),
        "clip": lambda x, y, backend: co.clip(x, y[: len(x)], temperature=0.2, backend=backend),
        "nt_xent": lambda x, y, backend: co.nt_xent(x, y[: len(x)], temperature=0.2, backend=backend),
        "sup_con": lambda x, y, backend: co.sup_con(y, torch.arange(len(y), device=y.device) // 3, backend=backend),
        "siglip": lambda x, y, backend: co.siglip(x, y[: len(x)], backend=backend),
        "gte": lambda x, y, backend: co.losses.gte(x, y[: len(x)], temperature=0.2, backend=backend),
    }


def run_check() -> int:
    """Compares values and gradients of every available backend with the float64 reference."""
    from contrastive_ops.core import backends

    started, failures, compared = time.perf_counter(), 0, 0
    print(f"      CUDA kernels: {probe(_cuda_kernels)}")
    for backend, reason in backends.backends()["similarity_reduce"].items():
        on_gpu = backend in ("triton", "cuda")
        if on_gpu and reason is None and not torch.cuda.is_available():
            reason = "no CUDA device"
        if reason is not None:
            print(f"skip  {backend}: {reason}")
            continue
        # Triton has no float64 here, and the reference in float64 is the truth itself.
        only_float32 = on_gpu or backend == "reference"
        for dtype in (torch.float32,) if only_float32 else (torch.float64, torch.float32):
            for name, case in check_cases().items():
                worst, note = _worst_error(case, backend, dtype, "cuda" if on_gpu else "cpu")
                good = worst <= TOLERANCE[dtype]
                failures += not good
                compared += 1
                kind = str(dtype).removeprefix("torch.")
                print(f"{'ok' if good else 'FAIL':<5} {backend:<10} {kind:<8} {name:<24} {note}")
    seconds = time.perf_counter() - started
    print(f"{compared - failures} of {compared} comparisons passed in {seconds:.1f} s")
    if failures:
        print("report this with the output of: python -m contrastive_ops info --json")
    return 1 if failures or not compared else 0


def _worst_error(case: Case, backend: str, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """The largest relative error over a few shapes, and a remark on it."""
    worst, where = 0.0, ""
    for shape in ((1, 1, 8), (37, 41, 24), (65, 130, 67)):
        try:
            error = _error_at(case, backend, dtype, device, shape)
        except Exception as problem:
            return float("inf"), f"{shape}: {type(problem).__name__}: {problem}"
        if not error <= worst:  # also true for NaN
            worst, where = error, f" at N, M, D = {shape}"
    return worst, f"relative error {worst:.1e}{where}"


def _error_at(case: Case, backend: str, dtype: torch.dtype, device: str, shape: tuple[int, int, int]) -> float:
    rows, columns, dim = shape
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, dim, generator=generator, dtype=dtype) for n in (rows, columns)]
    unit = [torch.nn.functional.normalize(matrix, dim=1) for matrix in matrices]
    ours = _value_and_gradients(case, unit, backend, device)
    truth = _value_and_gradients(case, [m.double() for m in unit], "reference", "cpu")
    error = 0.0
    for got, expected in zip(ours, truth, strict=True):
        scale = expected.abs().max().clamp_min(1e-3)
        distance = float((got.double().cpu() - expected).abs().max() / scale)
        if not distance <= error:
            error = distance
    return error


def _value_and_gradients(case: Case, matrices: list[torch.Tensor], backend: str, device: str) -> list[torch.Tensor]:
    leaves = [matrix.detach().to(device).requires_grad_() for matrix in matrices]
    value = case(leaves[0], leaves[1], backend)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    return [value.detach(), *filled]


# ---------------------------------------------------------------------------------------------
# bench


def run_bench(arguments: list[str]) -> int:
    """Runs ``benchmarks.run`` where a checkout is at hand."""
    for root in (PACKAGE.parent, Path.cwd()):
        if (root / "benchmarks" / "run.py").exists():
            command = [sys.executable, "-m", "benchmarks.run", *arguments]
            return subprocess.run(command, cwd=root, check=False).returncode
    print(
        "the benchmark suite is part of the source checkout, not of the installed package\n"
        "  clone the repository and run `make bench` there, or call this from its root folder",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
