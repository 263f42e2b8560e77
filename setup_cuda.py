"""The part of setup.py that knows nvcc: which toolkit, for which GPUs, and compiling csrc/cuda/**/*.cu.

Kernel files include no torch header, so they are compiled by nvcc alone into objects of one static library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Code for 8.0 runs on every GPU of 8.x, that for 9.0a on 9.0. Newer GPUs compile the PTX when a kernel is first used;
# TORCH_CUDA_ARCH_LIST="10.0a" (or 12.0, ...) makes code for them.
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"
OLDEST = (8, 0)

# Subnormal float32 numbers become 0: an exponential, of which kernels take one or two per pair, is then 2 instructions
# and not 5. Probabilities below 1e-38 are lost; those of 16 bits stay as they are.
FLAGS = ["-std=c++17", "-O3", "-ftz=true", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas=-v"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-fno-lto"]
RUNTIME_HEADER = "cuda_runtime_api.h"

# What -Xptxas=-v adds: for the file beside the object, not for whoever installs.
RESOURCES = re.compile(
    r"ptxas info +: (Compiling entry function|Function properties|Used \d+ registers|Compile time|\d+ bytes )"
    r"| +\d+ bytes (stack frame|cumulative stack)"
)


class NoCuda(Exception):
    """Why CUDA kernels cannot be built."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its version, and where headers are that the host's compiler needs."""

    home: Path
    version: str
    include_dirs: tuple[str, ...]

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin" / "nvcc")


# ---- Which toolkit


def what_torch_is_for(version) -> str:
    """What a torch is built for that is not built for CUDA, and what that means; `version` is torch.version."""
    if getattr(version, "hip", None):
        return 'is built for AMD GPUs (ROCm), where backend "triton" serves; the CUDA kernels are for NVIDIA\'s'
    if getattr(version, "xpu", None):
        return "is built for Intel GPUs (XPU), for which there are no kernels; the reference runs on them"
    return "is not built with CUDA; install one that is"


def find_toolkit(needed: str) -> Toolkit:
    """The toolkit of CUDA_HOME, else of the nvcc on PATH, else of the usual folder.

    Args:
        needed: the version of CUDA that torch is built with; the major versions must agree.
    """
    major = needed.partition(".")[0]
    nvcc, home = _find_nvcc(major)
    said = _ask(nvcc, "--version")
    found = re.search(r"release ([\d.]+)(?:, V([\d.]+))?", said)
    if found is None:
        raise NoCuda(f"{nvcc} does not say its version: {said.strip()[-200:]}")
    version = found[2] or found[1]
    if version.partition(".")[0] != major:
        raise NoCuda(
            f"torch is built with CUDA {needed}, but {nvcc} is of CUDA {version}; set CUDA_HOME to one of {major}"
        )
    # nvcc on PATH can be a script that starts another one, so its folder tells nothing.
    plan = _ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
    if home is None:
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        home = Path(top[1].strip()) if top else Path(nvcc).parent.parent
    home = Path(os.path.realpath(home))
    if shutil.which(home / "bin" / "nvcc") is None:
        raise NoCuda(f"{nvcc} says that its toolkit is {home}, where there is no bin/nvcc; set CUDA_HOME")
    inside = [str(home / "include"), *re.findall(r'"?-I([^"\s]+)', plan)]
    return Toolkit(home, version, tuple(_with_runtime_header(inside)))


def _find_nvcc(major: str) -> tuple[str, Path | None]:
    """The command, and the toolkit's folder if it is known."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [chosen] if chosen else ["/usr/local/cuda", f"/usr/local/cuda-{major}", "/opt/cuda"]
    if not chosen and (nvcc := shutil.which("nvcc")):
        return nvcc, None
    for home in homes:
        if nvcc := shutil.which("nvcc", path=os.path.join(home, "bin")):
            return nvcc, Path(home)
    looked = f"CUDA_HOME={chosen}" if chosen else f"PATH, {', '.join(homes)}"
    raise NoCuda(
        f"no CUDA toolkit with nvcc was found (looked at {looked}); "
        f"install CUDA toolkit {major} and set CUDA_HOME to its folder"
    )


def _ask(nvcc: str, *arguments: str) -> str:
    try:
        run = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoCuda(f"{nvcc} does not run: {error}") from error
    return run.stdout + run.stderr


def _with_runtime_header(folders: Iterable[str]) -> list[str]:
    """The first folder that has CUDA's runtime headers; a toolkit without them is completed by pip's packages."""
    site = [Path(sysconfig.get_path(name)) / "nvidia" for name in ("purelib", "platlib")]
    pip = [str(path) for folder in dict.fromkeys(site) for path in sorted(folder.glob("*/include"))]
    for folder in [*folders, *pip]:
        if Path(folder, RUNTIME_HEADER).exists():
            return [os.path.normpath(folder)]
    return []  # the compiler's own folders may have them


def runtime_library(home: Path) -> list[str]:
    """What to link: the runtime that torch has loaded into this process, so that there is no second one."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for line in lines:
        path = line.split()[-1]
        if re.match(r"libcudart[.\-\w]*\.so", os.path.basename(path)):
            return [path]
    folders = [folder for name in ("lib64", "lib") if (folder := home / name).is_dir()]
    return [*(f"-L{folder}" for folder in folders), "-lcudart"]


# ---- For which GPUs


def architectures(text: str | None = None) -> list[str]:
    """What nvcc calls the entries of a list as torch writes it: 9.0a is sm_90a, +PTX adds compute_90.

    An entry of its own features, 9.0a, makes code for 9.0 needless, so of 9.0+PTX beside it only the PTX is left.
    """
    text = text or os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHITECTURES
    codes: list[str] = []
    for entry in filter(None, re.split(r"[;,\s]+", text)):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise NoCuda(f"TORCH_CUDA_ARCH_LIST must list numbers such as 9.0, 9.0a or 9.0+PTX, got {entry!r}")
        major, minor, features, ptx = found.groups()
        if (int(major), int(minor)) < OLDEST:
            continue  # lists of whole distributions have GPUs that torch knows and the kernels do not
        number = f"{major}{minor}{features}"
        codes += [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
    if not codes:
        raise NoCuda(f"TORCH_CUDA_ARCH_LIST must have an entry of 8.0 or newer, got {text!r}")
    own = {code[:-1] for code in codes if code.startswith("sm_") and code[-1] in "af"}
    return [code for code in dict.fromkeys(codes) if code not in own]


def gencode(codes: Iterable[str]) -> list[str]:
    """The flags of nvcc for a list of sm_XY (code) and compute_XY (PTX)."""
    return [f"-gencode=arch=compute_{code.rpartition('_')[2]},code={code}" for code in codes]


# ---- Compiling


@dataclass(frozen=True)
class Nvcc:
    """One command that compiles every kernel file.

    Attributes:
        toolkit: whose nvcc runs.
        codes: sm_XY and compute_XY to make.
        compiler: the C++ compiler's command, of which nvcc takes the last word ("ccache g++").
        threads: how many of the codes are made side by side.
    """

    toolkit: Toolkit
    codes: Sequence[str]
    compiler: Sequence[str] = ()
    threads: int = 1

    @property
    def what(self) -> str:
        """What is compiled; the extension says it at run time."""
        return f"{self.toolkit.version} for {' '.join(self.codes)}"

    def extension_arguments(self) -> dict[str, list]:
        """What the kernels add to the extension that is linked with them."""
        return {
            "sources": ["csrc/bindings_cuda.cpp"],
            "define_macros": [("CONTRASTIVE_OPS_CUDA", f'"{self.what}"')],
            "include_dirs": list(self.toolkit.include_dirs),
            # Behind the libraries: a linker that drops what nobody has asked for yet would drop the runtime.
            "extra_link_args": runtime_library(self.toolkit.home),
        }

    def command(self, source: str, target: str) -> list[str]:
        chosen = " ".join(os.environ.get(f"NVCC_{name}", "") for name in ("CCBIN", "PREPEND_FLAGS", "APPEND_FLAGS"))
        own_choice = os.environ.get("NVCC_CCBIN") or "-ccbin" in chosen or "--compiler-bindir" in chosen
        host = [] if own_choice or not self.compiler else ["-ccbin", self.compiler[-1]]
        return [
            *(self.toolkit.nvcc, *host, *FLAGS, *gencode(self.codes)),
            f"-Xcompiler={','.join(HOST_FLAGS)}",
            *(f"-I{folder}" for folder in self.toolkit.include_dirs),
            *(f"--threads={self.threads}", "-c", source, "-o", target),
        ]

    def is_current(self, source: str, target: str, depends: Iterable[str]) -> bool:
        """Whether an object was made by the command for it and is newer than its files."""
        record = Path(f"{target}.command")
        if not is_current(target, [source, *depends]) or not record.exists():
            return False
        return record.read_text() == self._made_by(self.command(source, target))

    def _made_by(self, command: Sequence[str]) -> str:
        """What decides about an object beside its files; threads change none."""
        return "\n".join([self.toolkit.version, *(word for word in command if not word.startswith("--threads"))])

    def compile(self, source: str, target: str, depends: Iterable[str]) -> bool:
        """Makes the object unless it is current; returns whether it did. What nvcc said is in the file X.o.said."""
        if self.is_current(source, target, depends):
            return False
        command, record = self.command(source, target), Path(f"{target}.command")
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        print(f"contrastive_ops: {' '.join(command)}", flush=True)
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        output = (run.stdout + run.stderr).strip()
        Path(f"{target}.said").write_text(output)
        if heard := "\n".join(line for line in output.splitlines() if not RESOURCES.match(line)):
            print(heard, file=sys.stderr, flush=True)
        if run.returncode:
            errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
            raise NoCuda(f"nvcc rejected {source}: {errors[0] if errors else f'exit status {run.returncode}'}")
        record.write_text(self._made_by(command))
        return True


def is_current(target: str, depends: Iterable[str]) -> bool:
    """Whether a file exists and is newer than all that it is made of."""
    if not os.path.exists(target):
        return False
    made = os.path.getmtime(target)
    return all(os.path.getmtime(path) <= made for path in depends)
