"""Build of the optional extension ``contrastive_ops._C``; everything else is in pyproject.toml.

The extension is ``csrc/*.cpp``, which know Python and no torch header, linked with static libraries, one per SIMD level
and one of CUDA kernels, because setuptools knows one set of flags per extension only. So it loads with every torch of
its Python. Four environment variables steer the build:

    CONTRASTIVE_OPS_EXT   auto (default): build the extension, or install pure Python and warn where
                          there is no compiler for it; 1: fail if it cannot be built; 0: pure Python
    CONTRASTIVE_OPS_CUDA  auto (default): CUDA kernels where torch is a CUDA build and a toolkit of
                          its major version is found, else CPU only; 1: fail without them; 0: CPU only
    CONTRASTIVE_OPS_WHEEL auto (default): for this machine; 1: one extension for every Python from 3.10 on and
                          for every Linux from glibc 2.28 on (`make wheel`)
    CONTRASTIVE_OPS_NATIVE auto (default): everything; 1: what is compiled soonest (`make demo`): one SIMD level, that
                          of this processor, and not ``_eager``, without which small batches take longer

CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the GPUs (see ``setup_cuda.py``). The torch is that
of the interpreter that gets the package, in an isolated build too (see ``setup_torch.py``).
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build front ends do not import from the source folder

import setup_cuda  # noqa: E402
from setup_cpu import (  # noqa: E402
    COMMON_FLAGS,
    LIMITED_API,
    NAME_HEADERS,
    PORTABLE,
    amx_macro,
    extension_objects,
    find_compiler,
    has_macros,
    level_macros,
    levels,
    library_objects,
    native_levels,
    portable_arguments,
    say_first_error,
)
from setup_says import checkout, choice, compilers, fail, fixes, warn_cpu_only, warn_pure_python  # noqa: E402
from setup_torch import EAGER, NoTorch, advice, import_torch, make_eager  # noqa: E402

MIN_SETUPTOOLS = 77  # the first that reads the license expression in pyproject.toml
REPORT = "_build_report.json"  # read when the package is imported: pip hides build output
CUDA_LIBRARY = "contrastive_ops_cuda"

if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
    fail(
        f"setuptools must be at least {MIN_SETUPTOOLS}, got {setuptools.__version__}\n"
        f'  run: python -m pip install -U "setuptools>={MIN_SETUPTOOLS}"'
    )

WANT_EXT = choice("CONTRASTIVE_OPS_EXT", "unset it to build the extension wherever a compiler is found")
WANT_CUDA = choice("CONTRASTIVE_OPS_CUDA", "unset it to build CUDA kernels where a toolkit is found")
IS_WHEEL = choice("CONTRASTIVE_OPS_WHEEL", "unset it to build for this machine alone") == "1"
IS_NATIVE = choice("CONTRASTIVE_OPS_NATIVE", "unset it to build every SIMD level") == "1" and not IS_WHEEL


@dataclass
class Plan:
    """What is going to be built, or why nothing is."""

    reason: str | None = None  # why there is no extension
    compiler: str = ""
    cpu: str = ""  # what the extension is made of
    levels: dict[str, list[str]] = field(default_factory=dict)
    macros: list[tuple[str, str]] = field(default_factory=list)
    cuda: setup_cuda.Nvcc | None = None
    why_no_cuda: str | None = None
    torch: str | None = None  # which one contrastive_ops._eager is for

    @property
    def summary(self) -> str:
        if self.reason is not None:
            return ""
        if self.cuda is None:
            return f"{self.cpu}; no CUDA kernels"
        return f"{self.cpu}; CUDA {self.cuda.what}"

    def report(self) -> dict[str, str | None]:
        return {
            "summary": self.summary,
            "why_no_extension": self.reason,
            "why_no_cuda": self.why_no_cuda,
            "torch": self.torch,
            "sources": checkout.sources_digest(ROOT),
        }


def find_cuda(torch, compiler: list[str]) -> setup_cuda.Nvcc:
    """How to compile CUDA kernels; NoCuda if that cannot be done or was not asked for."""
    if WANT_CUDA == "0":
        raise setup_cuda.NoCuda("CONTRASTIVE_OPS_CUDA=0 was set when the package was built")
    if sys.platform != "linux":
        raise setup_cuda.NoCuda(f"CUDA kernels are built on Linux, got {sys.platform}")
    if torch.version.cuda is None:
        raise setup_cuda.NoCuda(f"torch {torch.__version__} {setup_cuda.what_torch_is_for(torch.version)}")
    codes = setup_cuda.architectures()
    toolkit = setup_cuda.find_toolkit(torch.version.cuda)
    threads = min(len(codes), max(1, jobs() // len(sources("csrc/cuda/**/*.cu"))))
    return setup_cuda.Nvcc(toolkit, codes, compiler, threads)


def without_cuda(plan: Plan, why: str) -> None:
    """Goes on with the CPU only, or stops the build if CUDA kernels were asked for."""
    if WANT_CUDA == "1":
        fail(
            f"CONTRASTIVE_OPS_CUDA=1 must be able to build CUDA kernels, but {why}\n"
            "  remove the cause, or set CONTRASTIVE_OPS_CUDA=0"
        )
    plan.cuda, plan.why_no_cuda = None, why


def make_plan() -> Plan:
    if WANT_EXT == "0":
        return Plan(reason="CONTRASTIVE_OPS_EXT=0 was set when the package was built")
    if sys.platform not in ("linux", "darwin"):
        hint = "; Windows has a Linux of its own, WSL" if sys.platform == "win32" else ""
        return Plan(reason=f"the extension is built on Linux and macOS, got {sys.platform}{hint}")
    if not (ROOT / "csrc" / "bindings.cpp").exists():
        return Plan(reason="csrc/bindings.cpp is missing from the source folder")
    compiler = find_compiler()
    if compiler is None:
        looked = os.environ.get("CXX") or "c++, g++ and clang++"
        return Plan(reason=f"no C++ compiler was found (looked for {looked})")
    torch = import_torch()
    name = compilers.version(compiler) or compiler[0]
    cpuinfo = Path("/proc/cpuinfo")
    built = native_levels(cpuinfo.read_text() if cpuinfo.exists() else "") if IS_NATIVE else levels()
    cpu = f"CPU extension with levels {', '.join(built)}; {name}"
    plan = Plan(compiler=name, cpu=cpu, levels=built, macros=amx_macro(), torch=str(torch.__version__))
    try:
        plan.cuda = find_cuda(torch, compiler)
    except setup_cuda.NoCuda as why:
        without_cuda(plan, str(why))
    return plan


def jobs() -> int:
    """How many compilers run side by side."""
    return max(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1), 1)


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def make_libraries(plan: Plan) -> list[tuple[str, dict]]:
    """One static library per SIMD level, the choice between them, their memory, and the CUDA kernels."""
    once = ("csrc/cpu/capability.cpp", "csrc/cpu/scratch.cpp")
    stems = [path for path in sources("csrc/cpu/*.cpp") if path not in once]
    flags = [*COMMON_FLAGS, *NAME_HEADERS]
    # The linker reads archives once and in this order: who calls comes before who is called.
    libraries = [
        (
            "contrastive_ops_capability",
            {"sources": [once[0]], "cflags": flags, "macros": [*plan.macros, *has_macros(plan.levels)]},
        )
    ]
    for level, level_flags in reversed(plan.levels.items()):  # a level calls those below it
        info = {
            "sources": stems,
            "cflags": [*flags, *level_flags],
            "macros": [*plan.macros, *level_macros(level)],
        }
        libraries.append((f"contrastive_ops_{level}", info))
    scratch = {"sources": ["csrc/cpu/scratch.cpp"], "cflags": flags, "macros": plan.macros}
    libraries.append(("contrastive_ops_scratch", scratch))
    if plan.cuda is not None:
        depends = [*sources("csrc/*.h"), *sources("csrc/cuda/**/*.h"), "setup_cuda.py"]
        libraries.append((CUDA_LIBRARY, {"sources": sources("csrc/cuda/**/*.cu"), "obj_deps": {"": depends}}))
    return libraries


def make_extension(plan: Plan) -> Extension:
    cuda = plan.cuda.extension_arguments() if plan.cuda is not None else {}
    others = ("csrc/bindings_cuda.cpp", EAGER, *([] if IS_WHEEL else [PORTABLE]))
    own = [path for path in sources("csrc/*.cpp") if path not in others]
    return Extension(
        "contrastive_ops._C",
        sources=[*own, *cuda.pop("sources", [])],
        define_macros=[*plan.macros, *cuda.pop("define_macros", []), *LIMITED_API],
        extra_compile_args=[*COMMON_FLAGS, *NAME_HEADERS],
        libraries=["dl"] if sys.platform == "linux" else [],
        language="c++",
        py_limited_api=IS_WHEEL and bool(LIMITED_API),
        extra_link_args=[*(portable_arguments() if IS_WHEEL else []), *cuda.pop("extra_link_args", [])],
        **cuda,
    )


PLAN = Plan()


class BuildPy(build_py):
    """Also writes the build report, because pip hides build output."""

    def run(self) -> None:
        super().run()
        self.write_report(PLAN)

    def write_report(self, plan: Plan) -> None:
        folder = Path(self.get_package_dir("contrastive_ops"))
        if not self.editable_mode:
            folder = Path(self.build_lib, "contrastive_ops")
        if plan.reason is not None:
            # An extension left from an earlier build would be imported in spite of this one.
            for name in (*checkout.EXTENSIONS, checkout.EAGER):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).write_text(json.dumps(plan.report(), indent=1) + "\n")


class BuildClib(build_clib):
    """Compiles the levels side by side and never lets a compiler error stop the installation."""

    editable_mode = False  # set by setuptools on every build command that has it

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode or IS_WHEEL:
            self.build_temp = self.build_clib = persistent_build_folder()

    def run(self) -> None:
        try:
            super().run()
        except (Exception, SystemExit) as error:
            give_up(self, error)

    def build_libraries(self, libraries) -> None:
        say_first_error(self.compiler, PLAN.compiler)
        with ThreadPoolExecutor(jobs()) as pool:
            # The slowest first, and files of the extensions among them, or one of these would be left over.
            kernels = [
                pool.submit(self.build_kernels, s, i) for n, i in libraries if n == CUDA_LIBRARY for s in i["sources"]
            ]
            python = self.get_finalized_command("build_ext").include_dirs
            for extension in reversed(self.distribution.ext_modules):
                objects = [item.start(pool, self, PLAN.compiler) for item in extension_objects(extension, python)]
                required = [] if extension.optional else objects
            cpu = {
                name: [item.start(pool, self, PLAN.compiler) for item in library_objects(name, info)]
                for name, info in libraries
                if name != CUDA_LIBRARY
            }
            try:
                for done in required:
                    done.result()  # without the headers of Python there is no use in the rest
                for name, objects in cpu.items():
                    self.archive(name, [done.result() for done in objects])
                made = [done.result() for done in kernels]
            except setup_cuda.NoCuda as why:
                pool.shutdown(cancel_futures=True)
                self.drop_cuda(str(why))
            except Exception:
                pool.shutdown(cancel_futures=True)  # the others would take minutes
                raise
        if PLAN.cuda is not None:
            self.archive(CUDA_LIBRARY, made)

    def archive(self, name: str, objects: list[str]) -> None:
        # ar adds to an archive that exists, which may hold objects of sources that are gone.
        Path(self.build_clib, self.compiler.library_filename(name)).unlink(missing_ok=True)
        self.compiler.create_static_lib(objects, name, output_dir=self.build_clib, debug=self.debug)

    def build_kernels(self, source: str, info: dict) -> str:
        """Compiles one CUDA file; returns the object."""
        target = os.path.join(self.build_temp, os.path.splitext(source)[0] + ".cu.o")
        PLAN.cuda.compile(source, target, info["obj_deps"][""])
        return target

    def drop_cuda(self, why: str) -> None:
        """Takes the kernels out of what is still going to be built."""
        added = PLAN.cuda.extension_arguments()
        without_cuda(PLAN, why)
        warn_cpu_only(why)
        self.libraries[:] = [library for library in self.libraries if library[0] != CUDA_LIBRARY]
        linker = self.get_finalized_command("build_ext")
        linker.libraries = [name for name in linker.libraries if name != CUDA_LIBRARY]
        for extension in self.distribution.ext_modules[:1]:
            for name, values in added.items():
                setattr(extension, name, [value for value in getattr(extension, name) if value not in values])
        self.get_finalized_command("build_py").write_report(PLAN)


class BuildExt(build_ext):
    """Compiles what was edited and links it with the libraries of BuildClib."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # to link: setuptools knows no edited kernel
        if self.editable_mode or IS_WHEEL:
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

    def build_extensions(self) -> None:
        say_first_error(self.compiler, PLAN.compiler)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor(jobs()) as pool:  # for what BuildClib has not started
            made = [item.start(pool, self, PLAN.compiler) for item in extension_objects(ext, self.include_dirs)]
            ext.extra_objects = [done.result() for done in made]
        ext.sources, whole = [], ext.sources
        super().build_extension(ext)
        ext.sources = whole


def persistent_build_folder() -> str:
    """Where objects stay between editable installs; setuptools itself would use a temporary one."""
    return os.path.join("build", f"editable.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")


def give_up(command: setuptools.Command, error: BaseException) -> None:
    """Turns a failed compilation into a pure Python installation, or into an error if asked to."""
    if isinstance(error, SystemExit) and str(error).startswith("\ncontrastive_ops: "):
        raise error  # has said everything
    reason = f"the compilation failed: {str(error).strip().splitlines()[-1]}"
    if WANT_EXT == "1" or WANT_CUDA == "1":
        fail(f"{reason}\n{fixes(reason)}  see the compiler's message above, or set CONTRASTIVE_OPS_EXT=auto")
    PLAN.reason, PLAN.why_no_cuda = reason, None
    command.distribution.ext_modules = []
    command.distribution.libraries = []
    command.get_finalized_command("build_py").write_report(PLAN)
    warn_pure_python(reason)


def build_arguments() -> dict:
    """The arguments of setup() that only a build needs; they cost an import of torch."""
    global PLAN
    try:
        PLAN = make_plan()
    except NoTorch as why:
        fail(f"torch must be installed before the extension is built against it, but {why}\n{advice()}")
    commands = {"build_py": BuildPy}
    if PLAN.reason is None:
        print(f"contrastive_ops: building {PLAN.summary}", flush=True)
        return {
            "ext_modules": [make_extension(PLAN), *([] if IS_NATIVE else make_eager(ROOT, IS_WHEEL))],
            "libraries": make_libraries(PLAN),
            "cmdclass": {**commands, "build_clib": BuildClib, "build_ext": BuildExt},
        }
    if WANT_CUDA == "1":
        fail(
            "CONTRASTIVE_OPS_CUDA=1 must be able to build the extension, but "
            f"{PLAN.reason}\n  remove the cause, or unset CONTRASTIVE_OPS_CUDA"
        )
    if WANT_EXT == "1":
        fail(
            f"CONTRASTIVE_OPS_EXT=1 must be able to build the extension, but {PLAN.reason}\n{fixes(PLAN.reason)}"
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
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if IS_WHEEL and WANT_EXT != "0" else {},
    **({} if METADATA_COMMANDS & set(sys.argv[1:]) else build_arguments()),
)
