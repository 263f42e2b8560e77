"""What docstrings say about memory, at the shapes that are worst for it: one long list, one row, rows of many features.

`public` finds every sentence about memory in the docstrings of what the package exports. Each is held by an entry of
`memory_claims.CLAIMS`, which is measured here, or by a test of the square shape over `contrastive_ops.testing.LOSSES`
(test_memory.py). A docstring that begins to speak of memory fails until there is an entry for it.
"""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
from memory_claims import CLAIMS

import contrastive_ops as co
from contrastive_ops import decoding, losses, metrics, mining, moe, nn, ops
from contrastive_ops.testing import LOSSES

MIB = 1 << 20
# "A few MiB" of tiles and chunks; autograd of small operations; the allocator's own.
SLACK = 48 * MIB
SENTENCE = re.compile(r"\b[Mm]emory\b(?!_| bank|-mapped|, |\.$)|\bMiB\b")

# Docstrings that say it by naming what another one says, or that are measured elsewhere.
ELSEWHERE = {
    "stream_rows": "similarity_reduce and others on the reference backend, which are made of it",
    "MemoryBank.topk": "MemoryBank",
    "TopKState.all_merge": "lists of (N, k) from each process, test_distributed_memory.py",
    "capture": "the memory of a CUDA graph",
    "similarity_histogram": "chunks of rows, as stream_rows",
    "nn": "modules hand their arguments to functions",
}
SQUARE = {case.function.__name__ for case in LOSSES.values()}


def public():
    """Every exported function and class, and methods, whose docstring has a sentence about memory."""
    found = set()
    for module in (co, losses, ops, mining, moe, nn, metrics, decoding):
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing):
                continue
            members = [("", thing)]
            if inspect.isclass(thing):
                members += [(f".{key}", each) for key, each in vars(thing).items() if inspect.isfunction(each)]
            for suffix, each in members:
                note = re.split(r"\n\s*\n", inspect.getdoc(each) or "")
                if any(SENTENCE.search(part) for part in note if not part.startswith("Args:")):
                    found.add(name + suffix)
    return sorted(found)


@pytest.mark.parametrize("name", public())
def test_every_sentence_about_memory_is_measured(name):
    assert name in CLAIMS or name in SQUARE or name in ELSEWHERE, name


def measured(backend):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "memory_claims.py"), backend, *CLAIMS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def peaks():
    """One process for all: torch is imported once."""
    return measured("auto")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable peak")
@pytest.mark.parametrize("name", CLAIMS)
def test_peak_at_the_worst_shape(name, peaks):
    """At most four times what the docstring counts, and a few MiB."""
    own = [each for each in peaks if each["name"] == name]
    assert len(own) == len(CLAIMS[name])
    for each in own:
        assert each["peak"] <= 4 * each["counted"] + SLACK, each


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable peak")
@pytest.mark.slow
def test_peak_of_the_reference_at_the_worst_shape():
    for each in measured("reference"):
        assert each["peak"] <= 4 * each["counted"] + 4 * SLACK, each
