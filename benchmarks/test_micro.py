"""The micro level: every fast case at a shape of milliseconds, through pytest-benchmark.

    python -m pytest benchmarks/test_micro.py --benchmark-group-by=param:case

What it shows is overhead a call, not throughput: compare two commits with ``--benchmark-autosave``
and ``--benchmark-compare``. Nothing here asserts a time.
"""

from __future__ import annotations

import pytest

from benchmarks.errors import errors
from benchmarks.registry import all_cases, representatives

# Several registered cases shrink to one shape; each is measured once, under its shrunk name.
TIMED = representatives(c for c in all_cases().values() if c.device == "cpu" and "time" in c.measure)
SHRUNK = {name: case.shrunk() for name, case in TIMED.items()}
PAIRS = [
    pytest.param(name, provider.name, id=f"{name}-{provider.name}".replace(" ", "_"))
    for name, case in SHRUNK.items()
    for provider in case.providers
    if not provider.optional
]


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_micro(benchmark, case, provider):
    """Times one provider after checking it."""
    chosen = SHRUNK[case]
    inputs = chosen.make_inputs(chosen)
    try:
        step = chosen.provider(provider).build(inputs)
    except ImportError as error:
        pytest.skip(f"{chosen.provider(provider).package} is not installed: {error}")
    answer = step()
    if answer is not None:
        assert errors(answer, chosen.truth(inputs)).worst <= chosen.tolerance
    benchmark(step)
