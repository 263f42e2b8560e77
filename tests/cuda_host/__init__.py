"""The CUDA kernels on the processor: compiled by the C++ compiler with sanitizers, called like the extension.

`HostKernels` has the functions of csrc/cuda/functions.h under the names that the extension gives them. They take
tensors on the CPU and write to them; a program of its own runs them (driver.cpp), so that Python needs no sanitizer.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from builds.objects import Object, compile_all, run
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
# "0" leaves sanitizers out, and optimises no kernel, which would take most of the time: `make mutate` changes one after
# the other, and looks at numbers first.
SANITIZED = os.environ.get("CUDA_HOST_SANITIZERS", "1") != "0"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
FLAGS = ("-std=c++17", "-O1", *WARNINGS, *(("-g1", *SANITIZERS) if SANITIZED else ()))
# What contrastive_ops._eager calls is in its process, which has no sanitizer.
LIBRARY_FLAGS = ("-std=c++17", "-O1", *WARNINGS, "-fPIC", "-shared", "-fvisibility=hidden")

# As in csrc/dtype.h.
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.bool: 6,
}


def why_missing() -> str | None:
    """Return None if the kernels can be compiled here, else the reason."""
    return None if _compiler() is not None else "no C++ compiler was found"


def _compiler() -> str | None:
    names = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    return next((name.split()[0] for name in names if name and shutil.which(name.split()[0])), None)


def compile_program(sources: Sequence[Path], program: Path, flags: Sequence[str] = FLAGS) -> None:
    """Compile CUDA files and C++ files for the host, side by side, and link them.

    Raises:
        RuntimeError: with the compiler's message.
    """
    command = (_compiler() or "c++", *flags, f"-I{HERE}", f"-I{SOURCES}")
    folder = program.parent / "objects"
    fast = () if SANITIZED else ("-O0",)
    wanted = [
        Object(os.path.relpath(source, HERE), (*command, *(fast if source.suffix == ".cu" else ()), "-x", "c++"))
        for source in sources
    ]
    run([*command, *compile_all(wanted, folder, HERE), "-o", str(program)], HERE)


def _made(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """A program or library of these sources, compiled once for all processes of this checkout."""
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    read = [path for place in (HERE, SOURCES, SOURCES / "hopper", SOURCES.parent) for path in sorted(place.glob("*.*"))]
    made_of = hashlib.sha256(repr((_compiler(), flags)).encode())
    for path in read:
        made_of.update(path.name.encode() + path.read_bytes())
    program, record = folder / name, folder / f"{name}.made_of"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists() or not record.exists() or record.read_text() != made_of.hexdigest():
            record.unlink(missing_ok=True)
            compile_program(sources, folder / "new", flags)
            (folder / "new").replace(program)  # one that still runs is left alone
            record.write_text(made_of.hexdigest())
    return program


@functools.cache
def driver() -> Path:
    """The program that runs every function."""
    return _made(
        "driver",
        [*sorted(SOURCES.rglob("*.cu")), *(HERE / f"{name}.cpp" for name in ("driver", "cuda_host", "hopper_host"))],
        FLAGS,
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels of whole losses in this process: the functions of library.cpp."""
    kernels = [SOURCES / f"similarity_{name}.cu" for name in ("gradients", "loss", "plain", "reduce")]
    found = ctypes.CDLL(
        str(_made("library.so", [*kernels, HERE / "library.cpp", HERE / "cuda_host.cpp"], LIBRARY_FLAGS))
    )
    found.loss_kernels.restype, found.launches.restype = ctypes.c_void_p, ctypes.c_int64
    return found


class HostKernels:
    """The functions of csrc/cuda/functions.h on tensors of the CPU.

    Args:
        schedule: in which order the threads of a block run: "ascending", "descending" or "shuffled".
        program: the driver; by default the one that has every function.

    Attributes:
        launches: how many grids it has run.
    """

    def __init__(self, schedule: str = "ascending", program: Path | None = None) -> None:
        self.schedule, self.program = schedule, program
        self._process: subprocess.Popen[bytes] | None = None
        self.launches = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda_"):
            raise AttributeError(name)
        return functools.partial(self.call, name.removeprefix("cuda_"))

    def close(self) -> None:
        """End the program."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def call(self, name: str, *arguments: Any) -> None:
        """Run one function; its outputs are among the arguments.

        Raises:
            RuntimeError: what the function, or a sanitizer, says.
        """
        process = self._running()
        message = [_text(name), struct.pack("<I", len(arguments)), *map(_encoded, arguments)]
        try:
            process.stdin.write(b"".join(message))
            process.stdin.flush()
            self._read_answer(arguments)
        except (BrokenPipeError, EOFError):
            self._process = None
            _, said = process.communicate()
            raise RuntimeError(f"{name}: {said.decode()}") from None

    def _running(self) -> Any:
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
            command = [str(self.program or driver()), self.schedule, "1"]
            self._process = subprocess.Popen(command, env=environment, **pipes)
        return self._process

    def _read(self, size: int) -> bytes:
        found = self._running().stdout.read(size)
        if len(found) < size:
            raise EOFError
        return found

    def _read_answer(self, arguments: Sequence[Any]) -> None:
        (failed,) = struct.unpack("<i", self._read(4))
        if failed:
            raise RuntimeError(self._read(struct.unpack("<I", self._read(4))[0]).decode())
        # Position 0 is the stream.
        while (position := struct.unpack("<i", self._read(4))[0]) >= 0:
            tensor = arguments[position - 1]
            content = bytearray(self._read(tensor.numel() * tensor.element_size()))
            if content:
                tensor.copy_(torch.frombuffer(content, dtype=tensor.dtype).view(tensor.shape))
        (self.launches,) = struct.unpack("<q", self._read(8))


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def _tensor(tensor: Tensor) -> bytes:
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a tensor must be contiguous and on the CPU, got {tensor.stride()} on {tensor.device}")
    content = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    sizes = struct.pack(f"<BB{tensor.dim()}q", _DTYPES[tensor.dtype], tensor.dim(), *tensor.shape)
    return sizes + struct.pack("<Q", len(content)) + content


def _encoded(value: Any) -> bytes:
    if value is None:
        return b"n"
    if isinstance(value, Tensor):
        return b"a" + _tensor(value)
    if isinstance(value, float):
        return b"d" + struct.pack("<d", value)
    if isinstance(value, int):
        return b"i" + struct.pack("<q", value)
    if isinstance(value, tuple):
        return b"t" + struct.pack("<I", len(value)) + b"".join(map(_tensor, value))
    if isinstance(value, list) and value and isinstance(value[0], float):
        return b"f" + struct.pack(f"<I{len(value)}d", len(value), *value)
    if isinstance(value, list):
        return b"l" + struct.pack(f"<I{len(value)}q", len(value), *value)
    raise TypeError(f"an argument must be a tensor, a number, a tuple of tensors or a list of numbers, got {value!r}")
