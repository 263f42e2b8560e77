"""Build of the optional extension ``contrastive_ops._C``; everything else is in pyproject.toml.

The extension is one torch file (``csrc/bindings.cpp``) linked with torch-free static libraries, one
per SIMD level, because setuptools and torch know one set of flags per extension only. Two
environment variables steer the build:

    CONTRASTIVE_OPS_EXT   auto (default): build the extension if possible, else install pure Python
                          and warn; 1: fail if it cannot be built; 0: pure Python
    CONTRASTIVE_OPS_CUDA  auto (default): CUDA kernels if a toolkit is found; 1: fail without one;
                          0: CPU only
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MIN_SETUPTOOLS = 77  # the first that reads the license expression in pyproject.toml
MIN_TORCH = (2, 6)
REPORT = "_build_report.json"  # read by `python -m contrastive_ops info`: pip hides build output

X86_LEVELS: dict[str, list[str]] = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_LEVELS["avx512"] = [*X86_LEVELS["avx2"], *AVX512]
X86_LEVELS["avx512_bf16"] = [*X86_LEVELS["avx512"], "-mavx512bf16"]
X86_LEVELS["amx"] = [*X86_LEVELS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]

# -fno-lto and -g0 overrule what the interpreter was built with. Link-time optimisation would merge
# the levels again and let AVX-512 code into functions that every processor runs.
COMMON_FLAGS = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-Wall"]
COMMON_FLAGS += ["-g0", "-fno-lto"]


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\ncontrastive_ops: {message}\n")


def choice(name: str, meaning: str) -> str:
    value = os.environ.get(name, "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        fail(f"{name} must be auto, 0 or 1, got {value!r}\n  {meaning}")
    return value


if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
    fail(
        f"setuptools must be at least {MIN_SETUPTOOLS}, got {setuptools.__version__}\n"
        f'  run: python -m pip install -U "setuptools>={MIN_SETUPTOOLS}"'
    )

WANT_EXT = choice("CONTRASTIVE_OPS_EXT", "unset it to build the extension wherever a compiler is found")
WANT_CUDA = choice("CONTRASTIVE_OPS_CUDA", "unset it to build CUDA kernels where a toolkit is found")


@dataclass
class Plan:
    """What is going to be built, or why nothing is."""

    reason: str | None = None  # why there is no extension
    summary: str = ""
    macros: list[tuple[str, str]] = field(default_factory=list)  # of bindings.cpp
    library_macros: list[tuple[str, str]] = field(default_factory=list)
    openmp: bool = False

    def report(self) -> dict[str, str | None]:
        return {"summary": self.summary, "why_no_extension": self.reason}


def find_compiler() -> list[str] | None:
    """The C++ compiler command, the same one for setuptools and for torch's ninja file."""
    # ninja of a virtual environment that is not activated
    scripts = sysconfig.get_path("scripts")
    os.environ["PATH"] = os.pathsep.join(filter(None, [scripts, os.environ.get("PATH")]))
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for name in filter(None, names):
        command = shlex.split(name)
        if shutil.which(command[0]):
            os.environ["CXX"] = name
            c_compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
            if not shutil.which(c_compiler[0]):  # a relocated interpreter names its own toolchain
                os.environ["CC"] = name
                os.environ.setdefault("LDCXXSHARED", f"{name} -shared")
            return command
    return None


def compiler_version(command: list[str]) -> str:
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        return run.stdout.splitlines()[0].strip()
    except (OSError, IndexError):
        return command[0]


def require_cuda(torch) -> None:
    """Stops the build unless CUDA kernels can be compiled."""
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = "CONTRASTIVE_OPS_CUDA=1 must find"
    if torch.version.cuda is None:
        fail(
            f"{wanted} a CUDA build of torch, got torch {torch.__version__}\n"
            "  install a CUDA build of torch, or set CONTRASTIVE_OPS_CUDA=0"
        )
    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) if CUDA_HOME else None
    if nvcc is None:
        fail(
            f"{wanted} a CUDA toolkit with nvcc, got CUDA_HOME={CUDA_HOME}\n"
            f"  install CUDA toolkit {torch.version.cuda} and set CUDA_HOME to its folder, "
            "or set CONTRASTIVE_OPS_CUDA=0"
        )
    if not any(ROOT.glob("csrc/cuda/*.cu")):
        fail(
            f"{wanted} CUDA sources in csrc/cuda, got none: this version has no CUDA extension\n"
            "  unset CONTRASTIVE_OPS_CUDA; GPUs are served by the Triton kernels"
        )


def make_plan() -> Plan:
    if WANT_EXT == "0":
        return Plan(reason="CONTRASTIVE_OPS_EXT=0 was set when the package was built")
    if sys.platform not in ("linux", "darwin"):
        return Plan(reason=f"the extension supports Linux and macOS, got {sys.platform}")
    if not (ROOT / "csrc" / "bindings.cpp").exists():
        return Plan(reason="csrc/bindings.cpp is missing from the source folder")
    try:
        import torch
        import torch.utils.cpp_extension
    except Exception as error:
        return Plan(
            reason="torch could not be imported in the build environment "
            f"({type(error).__name__}: {error}); pip hides the installed torch from the build "
            "unless it is called with --no-build-isolation"
        )
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        return Plan(reason=f"torch must be at least 2.6 at build time, got {version}")
    if WANT_CUDA == "1":
        require_cuda(torch)
    compiler = find_compiler()
    if compiler is None:
        looked = os.environ.get("CXX") or "c++, g++ and clang++"
        return Plan(reason=f"no C++ compiler was found (looked for {looked})")

    # torch adds this one to bindings.cpp; its wheels before 2.7 have the older ABI of std::string.
    new_abi = getattr(torch, "compiled_with_cxx11_abi", lambda: True)()
    abi = [("_GLIBCXX_USE_CXX11_ABI", str(int(new_abi)))]
    name = compiler_version(compiler)
    # Only GNU's OpenMP calls resolve against the libgomp that libtorch_cpu has loaded already;
    # clang would ask for a second runtime of its own.
    openmp = sys.platform == "linux" and "clang" not in name.lower()
    return Plan(
        summary=f"CPU extension with levels {', '.join(levels())}; {name}; torch {version}; "
        f"{'OpenMP' if openmp else 'no OpenMP: one thread'}; no CUDA sources",
        macros=[("CONTRASTIVE_OPS_TORCH_VERSION", f'"{version}"'), *x86_macro()],
        library_macros=[*abi, *x86_macro()],
        openmp=openmp,
    )


def is_x86() -> bool:
    # The target of the build, not the machine: a macOS universal2 build must take the common path.
    return sysconfig.get_platform().rpartition("-")[2] == "x86_64"


@functools.cache
def has_amx() -> bool:
    """Whether the compiler knows AMX (GCC 11, Clang 11), and the system is one whose kernel offers it."""
    command = [*(find_compiler() or ["c++"]), *X86_LEVELS["amx"], "-E", "-x", "c++", os.devnull]
    return sys.platform == "linux" and subprocess.run(command, capture_output=True, check=False).returncode == 0


def levels() -> dict[str, list[str]]:
    if not is_x86():
        return {"default": []}
    return {level: flags for level, flags in X86_LEVELS.items() if level != "amx" or has_amx()}


def x86_macro() -> list[tuple[str, str]]:
    if not is_x86():
        return []
    return [("CONTRASTIVE_OPS_X86", "1"), *([("CONTRASTIVE_OPS_AMX", "1")] if has_amx() else [])]


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def make_libraries(plan: Plan) -> list[tuple[str, dict]]:
    """One static library per SIMD level, and the choice between them.

    build_clib knows no dependency but the ones named here: without ``obj_deps`` an edited header
    would leave stale objects behind.
    """
    headers = [*sources("csrc/*.h"), *sources("csrc/cpu/*.h"), "setup.py"]
    own = {"csrc/cpu/capability.cpp", *(f"csrc/cpu/level_{level}.cpp" for level in X86_LEVELS)}
    included = [path for path in sources("csrc/cpu/*.cpp") if path not in own]
    flags = [*COMMON_FLAGS, "-std=c++17"]
    # The linker reads archives once and in this order: who calls comes before who is called.
    libraries = [
        (
            "contrastive_ops_capability",
            {
                "sources": ["csrc/cpu/capability.cpp"],
                "cflags": flags,
                "macros": plan.library_macros,
                "obj_deps": {"": headers},
            },
        )
    ]
    for level, level_flags in levels().items():
        info = {
            "sources": [f"csrc/cpu/level_{level}.cpp"],
            "cflags": [*flags, *level_flags],
            "macros": plan.library_macros,
            "obj_deps": {"": [*headers, *included]},
        }
        libraries.append((f"contrastive_ops_{level}", info))
    return libraries


def make_extension(plan: Plan) -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "contrastive_ops._C",
        sources=["csrc/bindings.cpp"],
        define_macros=plan.macros,
        # No -std: every torch version adds the one its headers need. OpenMP is compiled in but not
        # linked: the calls resolve through libtorch_cpu, so that only torch's runtime is mapped.
        extra_compile_args=[*COMMON_FLAGS, *(["-fopenmp"] if plan.openmp else [])],
        depends=[*sources("csrc/*.h"), *sources("csrc/cpu/*"), "setup.py"],
    )


def warn_pure_python(reason: str) -> None:
    line = "*" * 88
    print(
        f"\n{line}\nWARNING: contrastive_ops is installed WITHOUT its compiled CPU extension.\n"
        f"  why: {reason}\n"
        "  Everything works on the slower reference backend. To get the extension, remove the\n"
        "  cause and install again with --no-build-isolation; CONTRASTIVE_OPS_EXT=1 turns this\n"
        f"  warning into an error. `python -m contrastive_ops info` repeats it.\n{line}\n",
        file=sys.stderr,
        flush=True,
    )


PLAN = Plan()


class BuildPy(build_py):
    """Also writes the build report, for a reader who never sees pip's output."""

    def run(self) -> None:
        super().run()
        self.write_report(PLAN)

    def write_report(self, plan: Plan) -> None:
        folder = Path(self.get_package_dir("contrastive_ops"))
        if not self.editable_mode:
            folder = Path(self.build_lib, "contrastive_ops")
        if plan.reason is not None:
            # An extension left from an earlier build would be imported in spite of this one.
            stale = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            stale.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).write_text(json.dumps(plan.report(), indent=1) + "\n")


class BuildClib(build_clib):
    """Compiles the levels side by side and never lets a compiler error stop the installation."""

    editable_mode = False  # set by setuptools on every build command that has it

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = self.build_clib = persistent_build_folder()

    def run(self) -> None:
        try:
            super().run()
        except (Exception, SystemExit) as error:
            give_up(self, error)

    def build_libraries(self, libraries) -> None:
        os.makedirs(os.path.join(self.build_temp, "csrc", "cpu"), exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(jobs, 1)) as pool:
            for done in [pool.submit(self.build_library, library) for library in libraries]:
                done.result()

    def build_library(self, library) -> None:
        try:
            super().build_libraries([library])
        except CompileError as error:
            # The error's own text is a command line of ten lines; the compiler has said the rest.
            raise CompileError(f"the compiler rejected {library[1]['sources'][0]}") from error


def make_build_ext() -> type[build_ext]:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:
                self.build_temp = persistent_build_folder()

        def run(self) -> None:
            # `build_ext` alone would link whatever libraries an earlier build left behind.
            self.run_command("build_clib")
            if PLAN.reason is not None:
                self.extensions = []
                return
            try:
                super().run()
            except (Exception, SystemExit) as error:
                give_up(self, error)
                self.extensions = []

    return BuildExt


def persistent_build_folder() -> str:
    """Where objects stay between editable installs; setuptools itself would use a temporary one."""
    return os.path.join("build", f"editable.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")


def give_up(command: setuptools.Command, error: BaseException) -> None:
    """Turns a failed compilation into a pure Python installation, or into an error if asked to."""
    reason = f"the compilation failed: {str(error).strip().splitlines()[-1]}"
    if WANT_EXT == "1" or WANT_CUDA == "1":
        fail(f"{reason}\n  see the compiler's message above, or set CONTRASTIVE_OPS_EXT=auto")
    PLAN.reason, PLAN.summary = reason, ""
    command.distribution.ext_modules = []
    command.distribution.libraries = []
    command.get_finalized_command("build_py").write_report(PLAN)
    warn_pure_python(reason)


def build_arguments() -> dict:
    """The arguments of setup() that only a build needs; they cost an import of torch."""
    global PLAN
    PLAN = make_plan()
    commands = {"build_py": BuildPy}
    if PLAN.reason is None:
        print(f"contrastive_ops: building {PLAN.summary}", flush=True)
        return {
            "ext_modules": [make_extension(PLAN)],
            "libraries": make_libraries(PLAN),
            "cmdclass": {**commands, "build_clib": BuildClib, "build_ext": make_build_ext()},
        }
    if WANT_CUDA == "1":
        fail(
            "CONTRASTIVE_OPS_CUDA=1 must be able to build the extension, but "
            f"{PLAN.reason}\n  remove the cause, or unset CONTRASTIVE_OPS_CUDA"
        )
    if WANT_EXT == "1":
        fail(
            f"CONTRASTIVE_OPS_EXT=1 must be able to build the extension, but {PLAN.reason}\n"
            "  remove the cause, or unset CONTRASTIVE_OPS_EXT to install pure Python"
        )
    if WANT_EXT == "0":
        print("contrastive_ops: pure Python, as CONTRASTIVE_OPS_EXT=0 asks", flush=True)
    else:
        warn_pure_python(PLAN.reason)
    return {"cmdclass": commands}


METADATA_COMMANDS = {"egg_info", "dist_info", "sdist", "--name", "--version", "--help"}

setup(
    # `kernels` on its own is another package's import name, hence the mapping.
    packages=[
        *find_packages(include=["contrastive_ops", "contrastive_ops.*"]),
        "contrastive_ops.kernels",
        *(f"contrastive_ops.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"contrastive_ops.kernels": "kernels"},
    **({} if METADATA_COMMANDS & set(sys.argv[1:]) else build_arguments()),
)
