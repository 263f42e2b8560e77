"""The C++ extension of the CPU under sanitizers: a build of one SIMD level in a copy of the sources, tests, the fuzzer.

`make sanitize` runs both kinds. Python and torch have no sanitizer: the runtime is loaded before them, and sees what
the extension does and what it gives to them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import builds

ROOT = builds.ROOT
FOLDER = ROOT / "build" / "sanitizers"
TEAM = "tests/sanitizers/threads.cpp"
ALWAYS = ("-fno-omit-frame-pointer", "-g1")
# What a report of each begins with; the runtimes end the process, a Python error has other words.
REPORTS = ("ERROR: AddressSanitizer", "WARNING: ThreadSanitizer", "runtime error:")


@dataclass(frozen=True)
class Sanitizer:
    """A kind of build, and how a process runs it.

    Args:
        name: "address" or "thread".
        flags: for the compiler and the linker.
        preloaded: libraries that must come before all others. The runtime of C++ is one: interceptors of exceptions
            look for it when they begin.
        options: of the runtime.
        sources: more files of the extension.
        tests: for pytest. Those of rules, sizes and lists, which reach every kernel; not all, as they take long.
    """

    name: str
    flags: tuple[str, ...]
    preloaded: tuple[str, ...]
    options: Mapping[str, str]
    tests: tuple[tuple[str, ...], ...]
    sources: tuple[str, ...] = field(default=())


# Files, then what is chosen of them: each primitive by its rules, shapes, lists, strides and low precision.
PRIMITIVES: tuple[tuple[str, ...], ...] = (
    ("tests/test_similarity_reduce.py", "-k", "cpu and (values_and_gradients or low_precision or extreme)"),
    ("tests/test_similarity_folds.py", "-k", "cpu and (each_rule or each_fold or ties or bounds_include)"),
    ("tests/test_similarity_topk.py", "-k", "cpu and (each_rule or stable_sort or long_lists or infinite)"),
    ("tests/test_similarity_prefix.py", "-k", "cpu and (two_matrices or rules or shapes or strided)"),
    ("tests/test_similarity_values.py", "-k", "cpu and (sums_and_gradients or strided or rows_without)"),
    ("tests/test_similarity_distill.py", "-k", "cpu and (values_and_gradients or strided or no_rows)"),
    ("tests/test_maxsim.py", "-k", "cpu and (equal_products or random_sets or any_strides or sets_without)"),
    ("tests/test_grouped_matmul.py", "-k", "cpu and (loop or integers or rows_of_no_group or any_strides)"),
    ("tests/test_expert_routing.py", "-k", "cpu and (places or stable_sort or given or no_tokens)"),
    ("tests/test_router_losses.py", "-k", "cpu and (segment or formulas)"),
)
THREADS: tuple[tuple[str, ...], ...] = (
    ("tests/test_python_threads.py", "-k", "bits_in_eight"),
    ("tests/test_faults_of_machines.py", "-k", "eight_threads or (hooks and cpu)"),
)
DOORS: tuple[tuple[str, ...], ...] = (
    ("tests/test_hostile_lists.py",),
    ("tests/test_doors.py",),
    ("tests/test_small_batches.py", "-k", "lists_of_few or numbers_that_are_no_scores or what_memory_held"),
)
ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", *ALWAYS),
    ("libasan.so", "libubsan.so", "libstdc++.so.6"),
    # Python keeps what it has until it ends; a failed allocation is an error to be raised.
    {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    (
        *PRIMITIVES,
        ("tests/test_hostile_lists.py",),
        ("tests/test_doors.py",),
        ("tests/test_small_batches.py", "-k", "few_rows or no_scores or what_memory_held"),
    ),
)
THREAD = Sanitizer(
    "thread",
    ("-fsanitize=thread", *ALWAYS),
    ("libtsan.so",),
    # Torch and Python wait for each other in ways that it does not see; nothing of ours is left out.
    {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:second_deadlock_stack=1"},
    (*THREADS, *PRIMITIVES),
    (TEAM,),
)
KINDS = {kind.name: kind for kind in (ADDRESS, THREAD)}


def why_missing() -> str | None:
    """Return None where a build can be made and run, else why not."""
    if not sys.platform.startswith("linux"):
        return "the runtime is loaded before Python as Linux does it"
    for kind in KINDS.values():
        try:
            _libraries(kind)
        except RuntimeError as error:
            return str(error)
    return None


def _libraries(kind: Sanitizer) -> str:
    """Paths for LD_PRELOAD."""
    found = []
    for name in kind.preloaded:
        command = [*builds.compiler(), f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute():
            raise RuntimeError(f"{command[0]} has no {name}: take GCC, and install what it needs for -fsanitize")
        found.append(str(path.resolve()))
    return " ".join(found)


def tree(kind: Sanitizer) -> Path:
    """Where the copy of the sources is."""
    return FOLDER / kind.name / "tree"


def build(kind: Sanitizer, level: str) -> None:
    """Copy the sources and build the extension of a level; what has not changed stays.

    Raises:
        RuntimeError: with the message of the compiler.
    """
    place = tree(kind)
    builds.copy_sources(place)
    for linked in (FOLDER / kind.name).glob("*/*.linked"):
        if linked.parent.name != level:
            linked.unlink()  # the package has one extension: that of the level that was asked for last
    lookup = ("-Ddlsym=dlsym_of_sanitizers",) if kind.sources else ()
    builds.Build(place, FOLDER / kind.name / level, level, (*kind.flags, *lookup), sources=kind.sources).make()


def environment(kind: Sanitizer, level: str) -> dict[str, str]:
    """Variables for a process that runs the copy at a level, in its folder."""
    own = {"LD_PRELOAD": _libraries(kind), "PYTHONMALLOC": "malloc", **kind.options}
    return builds.environment(level, **own, PYTHONPATH=f"{tree(kind)}:{tree(kind) / 'tests'}")


def run(kind: Sanitizer, level: str, *arguments: str, seconds: float) -> tuple[str, str]:
    """Run Python with these arguments in the copy.

    Returns:
        "" or what went wrong, in a few words, and all that was said.
    """
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tree(kind),
            env=environment(kind, level),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return f"no end within {seconds:.0f} s", str(error.stdout)
    reported = [line for line in done.stdout.splitlines() if any(words in line for words in REPORTS)]
    if reported:
        return reported[0].strip(), done.stdout
    return ("" if done.returncode == 0 else f"exit status {done.returncode}"), done.stdout
