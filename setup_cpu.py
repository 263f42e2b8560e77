"""The part of setup.py that knows C++ compilers: which one, and the SIMD levels it is asked for."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from setuptools import Extension
from setuptools.errors import ExecError

from setup_says import compilers

X86_LEVELS: dict[str, list[str]] = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_LEVELS["avx512"] = [*X86_LEVELS["avx2"], *AVX512]
X86_LEVELS["avx512_bf16"] = [*X86_LEVELS["avx512"], "-mavx512bf16"]
X86_LEVELS["amx"] = [*X86_LEVELS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
# Every processor of this architecture has NEON.
ARM_LEVELS: dict[str, list[str]] = {"neon": [], "neon_bf16": ["-march=armv8.2-a+bf16"]}
# What the sources are told about a level beside LEVEL, its namespace. LEVEL_BELOW has what a level leaves to another.
LEVEL_MACROS: dict[str, list[tuple[str, str]]] = {
    "default": [("VECTOR_BYTES", "16")],
    "avx2": [("VECTOR_BYTES", "32")],
    "avx512": [("VECTOR_BYTES", "64")],
    "avx512_bf16": [("VECTOR_BYTES", "64"), ("HAS_BF16_DOT", "1"), ("LEVEL_BELOW", "level_avx512")],
    "neon": [("VECTOR_BYTES", "16")],
    "neon_bf16": [("VECTOR_BYTES", "16"), ("HAS_BF16_DOT", "1"), ("LEVEL_BELOW", "level_neon")],
}
LEVEL_MACROS["amx"] = [*LEVEL_MACROS["avx512_bf16"], ("HAS_AMX", "1")]

# What is hot is written in vectors and unrolled by pragmas: -O3 compiles a third longer and makes the rest no faster.
# -fno-lto and -g0 overrule what the interpreter was built with. Link-time optimisation would merge
# the levels again and let AVX-512 code into functions that every processor runs.
COMMON_FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-Wall"]
COMMON_FLAGS += ["-g0", "-fno-lto"]
# One build for all Pythons from 3.10 on, but those without a lock, whose objects are others.
LIMITED_API = [] if sysconfig.get_config_var("Py_GIL_DISABLED") else [("Py_LIMITED_API", "0x030A0000")]
# But the selection of the largest, whose rows are loops of few steps, loses 3% without it.
STEM_FLAGS = {"csrc/cpu/similarity_topk.cpp": ("-O3",)}


# What a wheel is linked with for the sake of an older glibc, and how.
PORTABLE = "csrc/portable.cpp"
WRAPPED = ("exp", "log", "pow", "dlopen", "dlsym")


def portable_arguments() -> list[str]:
    """Flags of the linker, for extensions that have PORTABLE among their sources."""
    return [f"-Wl,--wrap={name}" for name in WRAPPED] if sys.platform == "linux" and architecture() == "x86_64" else []


def find_compiler() -> list[str] | None:
    """The C++ compiler command; setuptools is told to take it for everything."""
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for name in filter(None, names):
        command = shlex.split(name)
        # The c++ of a Mac without its tools is there, and fails.
        if shutil.which(command[0]) and compilers.version(command):
            os.environ["CXX"] = name
            c_compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
            if not shutil.which(c_compiler[0]):  # a relocated interpreter names its own toolchain
                os.environ["CC"] = name
                os.environ.setdefault("LDCXXSHARED", f"{name} -shared")
            return command
    return None


def say_first_error(compiler, name: str) -> None:
    """Makes what a compiler of setuptools raises name the compiler, the file and the first error, not the command."""

    def run_or_raise(command: list[str], **options) -> None:
        print(shlex.join(map(str, command)), flush=True)
        target = sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET")
        environment = {**({"MACOSX_DEPLOYMENT_TARGET": str(target)} if target else {}), **os.environ}
        try:
            run = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
        except OSError as error:
            raise ExecError(f"{command[0]} does not run: {error}") from error
        print(run.stderr, end="", file=sys.stderr, flush=True)
        if run.returncode:
            source = next((word for word in command if word.endswith(".cpp")), "the object files")
            raise ExecError(f"{name} rejected {source}: {first_error(run.stderr, run.returncode)}")

    compiler.call = compiler.spawn = run_or_raise  # newer releases of setuptools use the first, older ones the second


def first_error(output: str, status: int) -> str:
    """What a compiler or linker says first about why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if re.search(r"\b(error|undefined reference|cannot find)\b", line)]
    return [*said, *lines, f"exit status {status}"][0]


def architecture() -> str:
    """What is built for, which is not always this machine: x86_64, aarch64 or arm64, universal2 (both), or another."""
    return sysconfig.get_platform().rpartition("-")[2]


# GCC notes each pair of numbers that a function returns: compilers of before GCC 10 passed them in other registers, and
# their objects are not linked with these.
COMMON_FLAGS += ["-Wno-psabi"] if architecture() in ("aarch64", "arm64") else []


@functools.cache
def has_amx() -> bool:
    """Whether the compiler knows AMX (GCC 11, Clang 11), and the system is one whose kernel offers it."""
    command = [*(find_compiler() or ["c++"]), *X86_LEVELS["amx"], "-E", "-x", "c++", os.devnull]
    return sys.platform == "linux" and subprocess.run(command, capture_output=True, check=False).returncode == 0


def levels() -> dict[str, list[str]]:
    """The levels of a build and their flags; a level comes after that which has what it leaves to another."""
    x86 = {level: flags for level, flags in X86_LEVELS.items() if level != "amx" or has_amx()}
    match architecture():
        case "x86_64":
            return x86
        case "aarch64" | "arm64":
            return ARM_LEVELS
        case "universal2":  # setuptools drops the architectures of the interpreter where flags name one
            both = {"x86_64": x86, "arm64": ARM_LEVELS}
            return {level: ["-arch", name, *flags] for name, some in both.items() for level, flags in some.items()}
    return {"default": []}


# What /proc/cpuinfo calls what the sources ask the processor for.
PROC_FLAGS: dict[str, set[str]] = {"default": set(), "avx2": {"avx2", "fma"}}
PROC_FLAGS["avx512"] = {*PROC_FLAGS["avx2"], "avx512f", "avx512bw", "avx512vl", "avx512dq"}


def native_levels(cpuinfo: str) -> dict[str, list[str]]:
    """Of the levels of a build the best of this processor that leaves nothing to another; all where it is not known.

    Args:
        cpuinfo: what Linux says in /proc/cpuinfo; empty elsewhere.
    """
    every = levels()
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if found is None or architecture() != "x86_64":
        return every
    has = set(found[1].split())
    whole = [level for level in every if "LEVEL_BELOW" not in dict(LEVEL_MACROS[level])]
    best = [level for level in whole if PROC_FLAGS[level] <= has][-1]
    return {best: every[best]}


# Has the compiler write down the headers of an object. Not on macOS, where one command may be for two architectures.
NAME_HEADERS = ["-MMD"] if sys.platform == "linux" else []


def level_macros(level: str) -> list[tuple[str, str]]:
    return [("LEVEL", f"level_{level}"), *LEVEL_MACROS[level]]


def is_current(target: str, command: list[str]) -> bool:
    """Whether an object was made by this command and is newer than every file that the compiler read for it."""
    read = f"{target.removesuffix('.o')}.d"
    if not os.path.exists(target) or not os.path.exists(read):
        return False
    with open(read, encoding="utf-8") as file:
        made_by, _, rule = file.read().partition("\n")
    files = rule.partition(":")[2].replace("\\\n", " ").split()
    made = os.path.getmtime(target)
    return made_by == shlex.join(command) and all(os.path.exists(f) and os.path.getmtime(f) <= made for f in files)


def remember_command(target: str, command: list[str]) -> None:
    """Puts the command in front of what the compiler wrote about the files that it read."""
    path = f"{target.removesuffix('.o')}.d"
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        rule = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{shlex.join(command)}\n{rule}")


@dataclass(frozen=True)
class Object:
    """A C++ file and how it is compiled; each is compiled once, whoever asks for it first."""

    folder: str  # in that of the build, because some files are compiled more than once
    source: str
    flags: tuple[str, ...]
    macros: tuple[tuple[str, str], ...]
    includes: tuple[str, ...] = ()

    def start(self, pool: Executor, command, compiler: str) -> Future[str]:
        """Has the pool compile the file; the result is the path of the object."""
        if self not in STARTED or STARTED[self].cancelled():
            STARTED[self] = pool.submit(self.compile, command, compiler)
        return STARTED[self]

    def compile(self, command, compiler: str) -> str:
        """Compiles the file, unless its object is newer than all that it was made of."""
        folder = os.path.join(command.build_temp, self.folder)
        target = os.path.join(folder, os.path.splitext(self.source)[0] + ".o")
        macros = (f"-D{name}={value}" for name, value in self.macros)
        said = [compiler, *self.flags, *macros, *(f"-I{path}" for path in self.includes)]
        if not is_current(target, said):
            options = {"macros": list(self.macros), "extra_preargs": list(self.flags), "debug": command.debug}
            command.compiler.compile([self.source], output_dir=folder, include_dirs=list(self.includes), **options)
            remember_command(target, said)
        return target


STARTED: dict[Object, Future[str]] = {}


def library_objects(library: str, info: dict) -> list[Object]:
    """What a static library is made of."""
    flags, macros = tuple(info["cflags"]), tuple(info["macros"])
    return [Object(library, path, (*flags, *STEM_FLAGS.get(path, ())), macros) for path in info["sources"]]


def extension_objects(extension: Extension, python: list[str]) -> list[Object]:
    """What an extension is made of beside the libraries; `python`: where its headers are."""
    folder = "eager" if extension.name.endswith("_eager") else "bindings"  # one file is compiled for both
    how = (tuple(extension.extra_compile_args), tuple(extension.define_macros), (*extension.include_dirs, *python))
    return [Object(folder, source, *how) for source in extension.sources]


def has_macros(names: Iterable[str]) -> list[tuple[str, str]]:
    """What csrc/cpu/capability.cpp is told: which levels a build has."""
    return [(f"CONTRASTIVE_OPS_HAS_{name.upper()}", "1") for name in names]


def amx_macro() -> list[tuple[str, str]]:
    """For which processors may be asked, whatever levels a build has."""
    return [("CONTRASTIVE_OPS_AMX", "1")] if "amx" in levels() else []
