"""Objects of C and C++ files, compiled again only where the command or a file that the compiler read has changed.

What was read is known by its contents, not by its time: a file that is changed and changed back has its old object.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KEPT = 4  # objects of one file and command


@dataclass(frozen=True)
class Object:
    """A file and the command that compiles it, but for -c and -o."""

    source: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its objects in a folder begin with."""
        digest = hashlib.sha256(shlex.join((*self.command, self.source)).encode()).hexdigest()[:12]
        return f"{Path(self.source).name}-{digest}"

    def _made_of(self, read: Path, at: Path) -> Path | None:
        """The object made of the files as they are now; None if the compiler has not yet said which it reads."""
        if not read.exists():
            return None
        digest = hashlib.sha256()
        for file in read.read_text().partition(":")[2].replace("\\\n", " ").split():
            if not (at / file).exists():
                return None
            digest.update((at / file).read_bytes())
        return read.with_name(f"{self.name}-{digest.hexdigest()[:16]}.o")

    def compile(self, folder: Path, at: Path) -> Path:
        """The object, in a folder; the command runs in the folder `at`."""
        read = folder / f"{self.name}.d"
        found = self._made_of(read, at)
        if found is not None and found.exists():
            os.utime(found)
            return found
        new = folder / f"{self.name}-{os.getpid()}.new"
        run([*self.command, "-MMD", "-MF", str(read), "-c", self.source, "-o", str(new)], at)
        found = self._made_of(read, at)
        if found is None:
            raise RuntimeError(f"{self.source}: the compiler did not say which files it read")
        new.replace(found)
        for old in sorted(folder.glob(f"{self.name}-*.o"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
        return found


def run(command: Sequence[str], at: Path) -> None:
    """Run a compiler or a linker in a folder.

    Raises:
        RuntimeError: with its message.
    """
    done = subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def compile_all(objects: Iterable[Object], folder: Path, at: Path) -> list[str]:
    """The objects, compiled side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        return [str(path) for path in pool.map(lambda each: each.compile(folder, at), objects)]
