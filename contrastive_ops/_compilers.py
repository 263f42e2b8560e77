"""C++ compilers of this machine, and what helps where none of them built the extension.

This file imports nothing of the package: setup.py runs it for what a build prints, and `info` says the same later.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

# Older ones lack C++20 or AVX-512; these are compiled with by `make matrix`.
OLDEST = {"GCC": 11, "Clang": 14}
PACKAGES = {  # of a C++ compiler, and of the headers of Python, by the command that installs them
    "apt-get": ("apt-get install g++", "apt-get install python3-dev"),
    "dnf": ("dnf install gcc-c++", "dnf install python3-devel"),
    "yum": ("yum install gcc-c++", "yum install python3-devel"),
    "zypper": ("zypper install gcc-c++", "zypper install python3-devel"),
    "pacman": ("pacman -S gcc", "pacman -S python"),
    "apk": ("apk add g++", "apk add python3-dev"),
    "conda": ("conda install -c conda-forge cxx-compiler", "conda install -c conda-forge python"),
}


def version(command: list[str]) -> str | None:
    """What a compiler says that it is; None if it does not run, as the c++ of a Mac without its tools."""
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.splitlines()[0].strip() if run.returncode == 0 and run.stdout.strip() else None


def is_too_old(said: str) -> bool:
    """Whether a compiler that says this is known to be older than the oldest that will do."""
    if found := re.search(r"clang version (\d+)", said):
        return int(found[1]) < OLDEST["Clang"]
    if found := re.search(r"\b[gc]\+\+[^()]*(?:\(.*\))?\s(\d+)\.\d+", said):
        return int(found[1]) < OLDEST["GCC"]
    return False


def installed() -> Iterator[tuple[str, str]]:
    """Each C++ compiler on PATH that is new enough, by its name, and what it says that it is."""
    names: set[str] = set()
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        try:
            names.update(name for name in os.listdir(folder or ".") if re.fullmatch(r"(clang|g|c)\+\+(-\d+)?", name))
        except OSError:
            continue
    seen = set()
    # Names with a version first, which stay what they are; of these GCC's, and the newest.
    number = {name: int((re.findall(r"\d+", name) or [0])[0]) for name in names}
    for name in sorted(names, key=lambda name: (not number[name], not name.startswith("g"), -number[name], name)):
        said = version([name]) if shutil.which(name) else None
        # One compiler has several names: the rest of what it says is the same.
        what = said and said.partition(" ")[2]
        if said is None or is_too_old(said) or what in seen:
            continue
        seen.add(what)
        yield name, said


def package(index: int) -> str:
    """The command that installs a C++ compiler (0) or the headers of Python (1) on this system."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    manager = next((name for name in PACKAGES if shutil.which(name)), None)
    return PACKAGES[manager or "apt-get"][index] if manager else f"for example: {PACKAGES['apt-get'][index]}"


def remedies(reason: str) -> tuple[list[str], str | None]:
    """What to do about the reason of a build without an extension, in sentences; and the compiler to name with CXX."""
    if "Python.h" in reason:
        return [f"install the headers of {sys.executable}: {package(1)}"], None
    if re.search(r"\bKilled\b|out of memory|cannot allocate memory", reason, re.IGNORECASE):
        return ["a compiler ran out of memory: compile one file at a time, with MAX_JOBS=1"], None
    failed = re.search(r"(?:failed: )?([^:]*) rejected ", reason)
    if failed is None and "C++ compiler" not in reason:
        return [], None
    said = failed[1].strip() if failed else ""
    oldest = " or ".join(f"{name} {number}" for name, number in OLDEST.items())
    if said and is_too_old(said):
        why = [f"{said} is too old: {oldest} or newer is needed"]
    else:
        why = []
    for name, other in installed():
        if other.partition(" ")[2] != said.partition(" ")[2]:
            return [*why, f"take another compiler, which is installed here: CXX={name} ({other})"], name
    return [*why, f"install {'another' if said else 'a'} C++ compiler ({oldest} or newer): {package(0)}"], None


def is_musl() -> bool:
    """Whether this Python is of a system such as Alpine, for which torch has no wheels."""
    return sys.platform == "linux" and "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE") or "")
