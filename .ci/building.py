"""Runs a command that compiles the extension, and says every few seconds how far it is: pip is silent until it ends.

python .ci/building.py COMMAND...
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 5.0  # seconds


def newer(folder: Path, began: float) -> int:
    """How many objects were compiled since."""
    return sum(path.stat().st_mtime >= began for path in folder.rglob("*.o"))


def main(command: list[str], folder: Path = ROOT / "build", every: float = EVERY) -> int:
    """The exit status of the command."""
    began = time.time()
    print("contrastive_ops: building; what is not compiled yet takes some minutes on two cores", flush=True)
    running = subprocess.Popen(command)
    while True:
        try:
            status = running.wait(timeout=every)
            break
        except subprocess.TimeoutExpired:
            print(f"  {time.time() - began:4.0f} s, {newer(folder, began)} files compiled", flush=True)
    print(f"contrastive_ops: {'built' if status == 0 else 'not built'} in {time.time() - began:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
