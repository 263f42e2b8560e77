"""Builds of the C++ extension for tests of a special kind: one SIMD level alone, in a copy of the sources.

`make mutate`, the sanitizers and the coverage of C++ use them. One level compiles in half a minute, and its functions
are the only ones that tests of that level call.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .objects import Object, compile_all, run

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT))

import setup_cpu  # noqa: E402
import setup_torch  # noqa: E402

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ONCE = ("csrc/cpu/capability.cpp", "csrc/cpu/scratch.cpp")
NOT_OF_C = ("csrc/bindings_cuda.cpp", "csrc/eager.cpp", "csrc/portable.cpp")
EAGER = ("csrc/eager.cpp", "csrc/similarity_loss.cpp")


def usual_level() -> str:
    """A level that every machine of its kind has: faults and sanitizers are the same everywhere."""
    known = list(setup_cpu.levels())
    return "avx2" if "avx2" in known else known[0]


def copy_sources(folder: Path, root: Path = ROOT) -> None:
    """Make a folder that has the files of the clone that git does not ignore, as they are now, and no other source."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    wanted = {name for name in names if name and (root / name).is_file()}
    for place in ("contrastive_ops", "csrc", "kernels", "tests"):
        for path in (folder / place).rglob("*.*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu") and path.relative_to(folder).as_posix() not in wanted:
                path.unlink()
    for name in sorted(wanted):
        source, target = root / name, folder / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)


@dataclass(frozen=True)
class Build:
    """One level of the extension, linked into the package of a copy of the sources.

    Args:
        tree: the copy.
        objects: the folder of the objects.
        level: the SIMD level.
        flags: for the compiler and the linker, after those of the package.
        eager: whether `_eager` is built too, which includes headers of torch.
        sources: more files of the extension.
    """

    tree: Path
    objects: Path
    level: str = field(default_factory=usual_level)
    flags: tuple[str, ...] = ()
    eager: bool = True
    sources: tuple[str, ...] = ()

    def make(self, stems: Sequence[str] = (), made: Mapping[Object, str] | None = None) -> dict[Object, str]:
        """Compile what has changed, and link.

        Args:
            stems: of the C++ files that are looked at; all where there are none.
            made: the objects of the others.

        Returns:
            All objects.

        Raises:
            RuntimeError: with the message of the compiler.
        """
        self.objects.mkdir(parents=True, exist_ok=True)
        _write_if_other(self.tree / "csrc" / "missing_levels.cpp", self._missing_levels())
        wanted = {"_C": self._of_c()} | ({"_eager": self._of_eager()} if self.eager else {})
        every = [each for objects in wanted.values() for each in objects]
        there = {each: path for each, path in (made or {}).items() if Path(path).exists()}
        for path in there.values():
            os.utime(path)  # objects that were not used for long are removed when new ones are made
        found = {each: path for each, path in there.items() if stems and Path(each.source).stem not in stems}
        rest = [each for each in every if each not in found]
        found.update(zip(rest, compile_all(rest, self.objects, self.tree), strict=True))
        for name, objects in wanted.items():
            self._link(name, [found[each] for each in objects])
        return found

    def _link(self, name: str, objects: list[str]) -> None:
        target = self.tree / "contrastive_ops" / f"{name}{SUFFIX}"
        made_of = self.objects / f"{name}.linked"
        if target.exists() and made_of.exists() and made_of.read_text() == "\n".join(objects):
            return
        libraries = ["-ldl"]
        if name == "_eager":
            arguments = setup_torch.torch_arguments("_eager")
            libraries = [f"-L{path}" for path in arguments["library_dirs"]]
            libraries += [f"-Wl,-rpath,{path}" for path in arguments["library_dirs"]]
            libraries += [f"-l{library}" for library in arguments["libraries"]]
        new = target.with_suffix(".new")
        run([*compiler(), "-shared", *self.flags, *objects, *libraries, "-o", str(new)], self.tree)
        new.replace(target)  # a process that has the old one keeps it
        made_of.write_text("\n".join(objects))

    def _called_levels(self) -> dict[str, set[str]]:
        """Which functions of which levels are called: those of this level, and of lower ones those that it names."""
        stems = {stem for _, stem in self._primitives()}
        found = {self.level: stems}
        below = dict(setup_cpu.LEVEL_MACROS[self.level]).get("LEVEL_BELOW")
        if below is not None:
            text = "".join(path.read_text() for path in sorted((self.tree / "csrc" / "cpu").glob("*.cpp")))
            found[below.removeprefix("level_")] = set(re.findall(r"LEVEL_BELOW::(\w+)\(\)", text))
        return found

    def _primitives(self) -> list[tuple[str, str]]:
        text = (self.tree / "csrc" / "primitives.h").read_text()
        return re.findall(r"^ *use\((\w+), (\w+)\)", text, re.MULTILINE)

    def _missing_levels(self) -> str:
        """A file with the functions of the levels that are not built; nobody calls them."""
        called = self._called_levels()
        lines = ["#include <cstdlib>", '#include "primitives.h"', "namespace contrastive_ops {"]
        for level in setup_cpu.levels():
            for functions, stem in self._primitives():
                if stem not in called.get(level, ()):
                    lines.append(f"namespace level_{level} {{ {functions} {stem}() {{ std::abort(); }} }}")
        return "\n".join([*lines, "}  // namespace contrastive_ops", ""])

    def _of_c(self) -> list[Object]:
        command = self._command(sysconfig.get_path("include"))
        sources = sorted(path.relative_to(self.tree).as_posix() for path in (self.tree / "csrc").glob("*.cpp"))
        found = [Object(source, command) for source in (*sources, *ONCE, *self.sources) if source not in NOT_OF_C]
        for level, stems in self._called_levels().items():
            macros = tuple(f"-D{name}={value}" for name, value in setup_cpu.level_macros(level))
            of_level = (*command, *setup_cpu.levels()[level], *macros)
            found += [Object(f"csrc/cpu/{stem}.cpp", of_level) for stem in sorted(stems)]
        return found

    def _of_eager(self) -> list[Object]:
        arguments = setup_torch.torch_arguments("_eager")
        command = self._command(*arguments["include_dirs"], sysconfig.get_path("include"), system=True)
        macros = tuple(f"-D{name}={value}" for name, value in arguments["define_macros"])
        return [Object(source, (*command, *macros)) for source in EAGER]

    def _command(self, *includes: str, system: bool = False) -> tuple[str, ...]:
        """How files are compiled; headers of a system are not looked at when objects are to be renewed."""
        flags = ["-O1" if flag == "-O2" else flag for flag in setup_cpu.COMMON_FLAGS]
        macros = [
            f"-D{name}={value}" for name, value in (*setup_cpu.amx_macro(), *setup_cpu.has_macros(setup_cpu.levels()))
        ]
        places = [word for path in includes for word in (("-isystem", path) if system else (f"-I{path}",))]
        return (*compiler(), *flags, *self.flags, *macros, *places)


@functools.cache
def compiler() -> tuple[str, ...]:
    found = setup_cpu.find_compiler()
    if found is None:
        raise RuntimeError("a C++ compiler must be found")
    return tuple(found)


@functools.cache
def runs(level: str, tree: Path) -> bool:
    """Whether this processor has a level: asks the extension of a copy, in a process of its own."""
    ask = "from contrastive_ops.core import extension; print(extension.functions('cpu').capability_detected())"
    kept = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", ask], cwd=tree, env=kept, capture_output=True, text=True, check=True)
    known = list(setup_cpu.levels())
    return known.index(level) <= known.index(done.stdout.split()[-1])


def _write_if_other(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def environment(level: str, **variables: str) -> dict[str, str]:
    """Variables for a process that runs the copy in its folder, at a level."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    passive = {"OMP_WAIT_POLICY": "passive", "CONTRASTIVE_OPS_CPU_CAPABILITY": level}
    return {**kept, **passive, **variables}
