"""Where a number comes from: machine, versions, commit. Every CSV row carries it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# Written by the suite itself: a run must not call the tree dirty because the last one had results.
GENERATED = ("benchmarks/results", "README.md", "docs")


def _cpu_fields() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def device_name(device: str = "cpu") -> str:
    """The processor as its vendor names it; virtual machines hide the model, the family tells."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return name


def core_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_kind(device: str = "cpu") -> str:
    """A file name for machines like this one, e.g. ``amd-epyc-family-26-model-2-2-cores``."""
    words = device_name(device)
    if device == "cpu":
        words += f" {core_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def version(package: str) -> str:
    """The installed version of a distribution, or an empty string."""
    if package == "contrastive_ops":
        # A checkout on the path has no distribution, but it has a version.
        try:
            import contrastive_ops
        except ImportError:
            return ""
        return str(getattr(contrastive_ops, "__version__", ""))
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _dirty() -> str:
    if not _git("rev-parse", "HEAD"):
        return ""
    status = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in GENERATED))
    return "yes" if status else "no"


def capability(device: str = "cpu") -> str:
    """The level the compiled extension uses, e.g. ``avx512_bf16``, or ``no extension``."""
    if device != "cpu":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    try:
        from contrastive_ops.core import extension
    except ImportError:
        return "no extension"
    module = extension.load()
    return "no extension" if module is None else str(module.cpu_capability())


def now() -> str:
    """The time in UTC, to the second; sorts as text."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def gather(device: str = "cpu") -> dict[str, str]:
    """The provenance columns of one run."""
    return {
        "date": now(),
        "device": device_name(device),
        "cores": str(core_count()),
        "threads": str(torch.get_num_threads()),
        "capability": capability(device),
        "torch": torch.__version__,
        "contrastive_ops": version("contrastive_ops"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": _dirty(),
    }
