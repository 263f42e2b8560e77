"""Errors by dtype and temperature are those that docs/numerics.md shows."""

import pytest
import torch

from benchmarks import numerics
from contrastive_ops.core import extension

STORED = numerics.stored()
# Another processor rounds elsewhere; what is exact on one is at most some units of the last place on another.
UNITS = {"float32": 4e-7, "bfloat16": 8e-3, "float16": 1e-3}


def test_all_losses_with_a_temperature_are_stored():
    assert set(STORED["errors"]) == set(numerics.CASES) and len(numerics.CASES) > 40
    assert STORED["temperatures"] == list(numerics.TEMPERATURES)


@pytest.mark.skipif(extension.load() is None, reason=str(extension.why_missing()))
@pytest.mark.parametrize("name", sorted(numerics.CASES))
def test_no_error_has_grown(name):
    """At the ends; all that is stored takes a minute."""
    for kind, dtype in list(numerics.DTYPES.items())[:2]:
        for temperature in (0.005, 10.0):
            at = numerics.TEMPERATURES.index(temperature)
            for found, stored in zip(
                numerics.errors(name, dtype, temperature), STORED["errors"][name][kind][at], strict=True
            ):
                assert found <= 4 * stored + UNITS[kind], (kind, temperature, found, stored)


def test_what_is_wrong_is_seen():
    one = torch.ones(3)
    assert numerics._relative(one, one) == 0 and numerics._relative(one * torch.nan, one) == float("inf")
    assert numerics._relative(one * 1.01, one) == pytest.approx(0.01, rel=1e-3)
    assert numerics._relative(one, one * 0) == 1
