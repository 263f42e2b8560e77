"""The model of many ranks: its limits are products alone and messages alone, and its numbers are labelled."""

import math

import pytest

from benchmarks import processes
from benchmarks.processes import Rates

ROWS, DEPTH = 2048, 768
PRODUCTS = ROWS * ROWS * DEPTH / 1e12


def test_without_a_network_a_step_is_its_products():
    free = Rates(1e12, math.inf, 0.0, 4)
    for ranks in processes.RANKS:
        assert free.gather(ranks, ROWS, DEPTH) == pytest.approx(8 * ranks * PRODUCTS)
        assert free.ring(ranks, ROWS, DEPTH) == pytest.approx(10 * ranks * PRODUCTS)


def test_a_ring_hides_what_a_gather_waits_for():
    """Rows take a tenth of a block's products to travel: only the last hop is left."""
    rates = Rates(1e12, ROWS * DEPTH * 4 / (0.2 * PRODUCTS), 0.0, 4)
    for ranks in (2, 64):
        waited = rates.gather(ranks, ROWS, DEPTH) - 8 * ranks * PRODUCTS
        hidden = rates.ring(ranks, ROWS, DEPTH) - 10 * ranks * PRODUCTS
        assert waited == pytest.approx((ranks - 1) * 0.4 * PRODUCTS, rel=0.01)
        assert hidden == pytest.approx(0.4 * PRODUCTS, rel=0.15)


def test_rates_explain_what_was_measured():
    measured = {processes.HALF: 0.5, processes.MOVED: 0.1}
    rates = processes.rates_of(measured, 2 * ROWS, DEPTH)
    steady = Rates(rates.operations, rates.bandwidth, 0.0, rates.width)
    assert steady.gather(2, ROWS, DEPTH) == pytest.approx(0.6, rel=1e-3)


def test_given_rates_are_modelled_and_labelled(capsys):
    options = ["--rate", "4e14", "--bandwidth", "5e10", "--latency", "2e-5", "--dtype-bytes", "2", "--rows", "16384"]
    assert processes.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == processes.LABEL and lines[0].startswith("MODELLED")
    assert [int(line.split()[0]) for line in lines[4:]] == list(processes.RANKS)
