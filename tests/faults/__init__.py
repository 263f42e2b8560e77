"""Small faults planted into a copy of the sources, one at a time: do the tests notice?

`make mutate` applies each fault of `FAULTS`, builds what it concerns, and runs the tests that ought to notice. A fault
that no test notices survives: somebody could make it by accident. Each is one line that is replaced; `test_faults.py`
sees to it that every line is still there, once.

Faults are in files by the code that they are in: `in_cpu.py` (csrc, one SIMD level), `in_cuda.py`
(csrc/cuda, executed on the host), `in_hopper.py` (csrc/cuda/hopper, the same), `in_triton.py` (kernels, in the
interpreter), `in_python.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Fault:
    """A line that is replaced, and the tests that ought to notice.

    Args:
        name: what is wrong.
        file: in the project.
        old: a part of a line, or whole lines, that the file has once.
        new: what stands there instead.
        tests: files and options for pytest; options may contain spaces.
        level: the SIMD level that it is in, where it is not in all.
        stems: the C++ or CUDA files whose objects the tests need; without, all that include the file.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    level: str | None = None
    stems: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """In which language it is, and so what has to be built."""
        if self.file.startswith("csrc/cuda/"):
            return "cuda"
        if self.file.startswith("csrc/"):
            return "cpu"
        return "triton" if self.file.startswith("kernels/") else "python"

    @property
    def on_host(self) -> bool:
        """Whether its tests execute CUDA kernels on the host."""
        return self.file.startswith(("csrc/cuda/", "contrastive_ops/cuda/"))

    @property
    def digest(self) -> str:
        """Changes with the fault and its list of tests."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def state(self, root: Path) -> str:
        """Changes also with the files that it and its tests are in."""
        files = [self.file, *(word for word in self.tests if word.startswith("tests/"))]
        content = b"".join((root / file).read_bytes() for file in files)
        return f"{self.digest}-{hashlib.sha256(content).hexdigest()[:12]}"

    def planted(self, text: str) -> str:
        """The text of the file with the fault.

        Raises:
            ValueError: if the file does not have the old text exactly once.
        """
        found = text.count(self.old)
        if found != 1 or self.old == self.new:
            raise ValueError(f"{self.file}: {self.name}: {self.old!r} must be there once, got {found} times")
        return text.replace(self.old, self.new)


def all_faults() -> list[Fault]:
    """Every fault of the project."""
    from . import in_cpu, in_cuda, in_hopper, in_python, in_triton

    return [*in_python.FAULTS, *in_triton.FAULTS, *in_hopper.FAULTS, *in_cuda.FAULTS, *in_cpu.FAULTS]
