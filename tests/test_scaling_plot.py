"""The figure of time and memory against the batch: what it shows is in the rows, and only that."""

from pathlib import Path

import pytest

from benchmarks import results, scaling_plot

ROOT = Path(__file__).parent.parent


def row(case: str, provider: str, **values: str) -> dict[str, str]:
    shapes = "N=1 M=1 D=512"
    known = {"run": "1", "case": case, "provider": provider, "status": "ok", "shapes": shapes, "dtype": "fp32"}
    return {**dict.fromkeys(results.COLUMNS, ""), **known, "device": "a machine", **values}


def case(n: int) -> str:
    return f"clip-scaling-fp32-N{n}-D512"


def test_rows_of_memory_alone_draw_that_panel_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(case(n), "contrastive_ops", peak_extra_mib=str(n)) for n in (512, 1024)]
    rows += [row(case(512), "torch eager", peak_extra_mib="7.5")]
    found = scaling_plot.curves(rows, "clip-scaling", "contrastive_ops", "peak_extra_mib")
    assert {name: sorted(points) for name, points in found.items()} == {
        "contrastive_ops": [512, 1024],
        "torch eager": [512],
    }
    out = tmp_path / "figure.svg"
    assert not scaling_plot.draw(rows, out) and not out.exists()  # no times
    assert scaling_plot.draw(rows, out, ["memory"]) and "<svg" in out.read_text()


def test_the_figure_in_the_readme_has_rows() -> None:
    assert "docs/images/scaling.svg" in (ROOT / "README.md").read_text()
    rows = results.read()
    for op, ours, _ in scaling_plot.MACHINES:
        found = scaling_plot.curves(rows, op, ours, "peak_extra_mib")
        assert all(found.values()), (op, found)
