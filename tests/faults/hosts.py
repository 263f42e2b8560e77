"""The program that runs the CUDA kernels of a copy on the host, compiled in a process that has the copy's modules.

Kernels are compiled without sanitizers and without optimisation first: that takes a fifth of the time, and most faults
show in numbers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# In the order in which they are tried.
PLAIN, SANITIZED = HOSTS = ("plain", "sanitized")


def choose(host: str) -> None:
    """Has tests of this process, and of those that it starts, run on that program.

    They need no plugin of pytest; to import all that are installed would take most of their time.
    """
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["CUDA_HOST_SANITIZERS"] = str(int(host == SANITIZED))


def build(host: str, tree: Path, stems: Sequence[str], record: Path, is_base: bool) -> int:
    """Compiles what has changed, and links; returns an exit status, and prints what the compiler says.

    Args:
        host: one of `HOSTS`.
        tree: the copy.
        stems: of the CUDA files that are looked at; all where there are none.
        record: a file with the objects of the copy without a fault.
        is_base: whether this is without a fault: writes the record.
    """
    choose(host)
    sys.path.insert(0, str(tree / "tests"))
    import cuda_host

    known = json.loads(record.read_text()) if stems and record.exists() else {}
    compile_all = cuda_host.compile_all

    def compile_some(wanted, folder, at):
        there = {source: path for source, path in known.items() if Path(path).exists()}
        for path in there.values():
            os.utime(path)  # objects that were not used for long are removed when new ones are made
        kept = {each: there[each.source] for each in wanted if each.source in there and _stem(each) not in stems}
        rest = [each for each in wanted if each not in kept]
        found = {**kept, **dict(zip(rest, compile_all(rest, folder, at), strict=True))}
        if is_base:
            record.write_text(json.dumps({each.source: path for each, path in found.items()}))
        return [found[each] for each in wanted]

    cuda_host.compile_all = compile_some
    if is_base and not record.exists():
        (tree / "build" / "cuda_host" / "driver.made_of").unlink(missing_ok=True)
    try:
        cuda_host.driver()
    except RuntimeError as error:
        print(str(error)[-1000:], flush=True)
        return 1
    return 0


def _stem(each) -> str:
    return Path(each.source).stem
