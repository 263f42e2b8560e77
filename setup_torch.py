"""The part of setup.py that finds torch: that of the interpreter which gets the package, whatever hides it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension

from setup_cpu import COMMON_FLAGS, NAME_HEADERS, PORTABLE, architecture, portable_arguments
from setup_says import compilers

MIN_TORCH = (2, 6)
EAGER = "csrc/eager.cpp"  # the one file with torch headers

# What an interpreter finds when nobody has changed its paths.
ASK = """
import importlib.util, json, os, sys
spec = importlib.util.find_spec("torch")
origin = spec.origin if spec else None
path = [entry for entry in sys.path if entry]
print(json.dumps([*path, os.path.dirname(os.path.dirname(origin))] if origin else []))
"""


class NoTorch(Exception):
    """Why there is no torch to build against."""


def hidden_path() -> list[str]:
    """Where this interpreter finds torch and what it needs, without the paths of an isolated build.

    pip runs isolated builds in the interpreter that it installs for, and only replaces its path. uv and `build` make an
    environment of their own, of which nothing leads back.
    """
    # By these pip hides what is installed, the second also in the user's own folder.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", ASK]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=sys.prefix)
    return json.loads(run.stdout) if run.returncode == 0 else []


def import_torch() -> ModuleType:
    """The torch that is going to load the extension, imported together with its part for builds."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise NoTorch(f"the one of {sys.executable} cannot be imported: {error}") from error
        # Behind the rest: setuptools stays the one of the build.
        sys.path += [entry for entry in hidden_path() if entry not in sys.path]
    try:
        import torch
        import torch.utils.cpp_extension
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise NoTorch(f"{sys.executable} has none") from error
        raise NoTorch(f"the one of {sys.executable} cannot be imported: {type(error).__name__}: {error}") from error
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        raise NoTorch(f"the one of {sys.executable} is {version}")
    return torch


def torch_arguments(name: str) -> dict[str, list]:
    """What an extension of this name needs that includes headers of torch."""
    import torch
    from torch.utils import cpp_extension

    # Wheels before 2.7 have the older ABI of std::string.
    new_abi = getattr(torch, "compiled_with_cxx11_abi", lambda: True)()
    return {
        "include_dirs": cpp_extension.include_paths(),
        "library_dirs": cpp_extension.library_paths(),
        "libraries": ["c10", "torch", "torch_cpu", "torch_python"],
        "define_macros": [
            ("TORCH_EXTENSION_NAME", name),
            ("CONTRASTIVE_OPS_TORCH_VERSION", f'"{torch.__version__}"'),
            ("_GLIBCXX_USE_CXX11_ABI", str(int(new_abi))),
        ],
    }


def make_eager(root: Path, is_wheel: bool) -> list[Extension]:
    """The module with torch headers, which is for one torch; everything works without it."""
    foreign = architecture() not in (platform.machine(), "universal2")  # its headers are of another torch
    if foreign or not (root / EAGER).exists():
        return []
    options = {
        "extra_compile_args": [*COMMON_FLAGS, *NAME_HEADERS],
        "extra_link_args": portable_arguments() if is_wheel else [],
        "language": "c++",
        "optional": True,
        **torch_arguments("_eager"),
    }
    own = [EAGER, "csrc/similarity_loss.cpp", *([PORTABLE] if is_wheel else [])]
    return [Extension("contrastive_ops._eager", own, **options)]


def advice() -> str:
    """What to do where there is no torch."""
    oldest = ".".join(map(str, MIN_TORCH))
    if compilers.is_musl():
        return (
            "  torch has no wheels for musl, the C library of Alpine: take an image with glibc (python:3.12-slim)\n"
            "  CONTRASTIVE_OPS_EXT=0 installs without the extension, which needs a torch all the same"
        )
    return (
        f'  run: {sys.executable} -m pip install "torch>={oldest}", and then the same command again\n'
        "  where the build gets an environment of its own (uv, build), let it see yours:\n"
        "  uv pip install --no-build-isolation, python -m build --no-isolation\n"
        "  CONTRASTIVE_OPS_EXT=0 installs without the extension, which is slower"
    )
