"""The doors of the extension: numbers that Python and C++ share, tensors without a torch header, what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from contrastive_ops import Fold, Pairs, route, similarity_reduce, similarity_topk
from contrastive_ops.core import extension
from contrastive_ops.core.problem import KINDS, ScaleOf
from contrastive_ops.core.rules import STATISTICS, Slot

ROOT = Path(__file__).resolve().parent.parent
MODULE = extension.load()
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)

needs_extension = pytest.mark.skipif(MODULE is None, reason="no compiled extension")


# ---- Numbers that Python and C++ share


@pytest.fixture(scope="module")
def slots() -> str:
    path = ROOT / "csrc" / "slots.h"
    if not path.exists():
        pytest.skip("needs the source checkout")
    return path.read_text()


def enumerators(text: str, name: str) -> dict[str, int]:
    body = re.search(rf"enum class {name} : int \{{(.*?)\}}", text, re.DOTALL)
    assert body is not None
    return {word: int(number) for word, number in re.findall(r"(\w+) = (\d+)", body[1])}


def test_slots_are_those_of_python(slots: str) -> None:
    names = re.findall(r"^  use\((\w+), (?:set|problem), (?:ids|numbers), \w+\)", slots, re.MULTILINE)
    # The last is asked of operators, never of kernels.
    assert [*names, "unit"] == [slot.name.lower() for slot in sorted(Slot)]
    assert [int(slot) for slot in sorted(Slot)] == list(range(len(Slot)))


def test_kinds_of_folds_and_scales_are_those_of_python(slots: str) -> None:
    kinds = re.search(r"define CONTRASTIVE_OPS_FOLDS\(use\) (.*)", slots)
    assert kinds is not None and re.findall(r"use\((\w+)\)", kinds[1]) == list(KINDS)
    assert enumerators(slots, "ScaleOf") == {each.name.lower(): int(each) for each in ScaleOf}
    assert f"kScaleKinds = {len(ScaleOf)};" in slots


def test_rules_that_are_counted_are_those_of_python(slots: str) -> None:
    rules = re.search(r"enum class Rule : int \{ (.*), size \};", slots)
    assert rules is not None and ("eligible", "higher", *rules[1].split(", ")) == STATISTICS


# ---- Tensors


@needs_extension
def test_the_extension_needs_no_symbol_of_torch() -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    command = ["nm", "-DC", "--undefined-only", MODULE.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "PyTuple" in symbols
    assert not re.findall(r"\b(?:at|c10|torch|caffe2)::.*", symbols)


@pytest.fixture(params=["functions of DLPack", "attributes"])
def reading(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to read tensors: that of newer releases of torch, and that of all."""
    if MODULE is None:
        pytest.skip("no compiled extension")
    if request.param == "attributes":
        MODULE.read_tensors_by(None)
    elif EXCHANGE is None:
        pytest.skip(f"torch {torch.__version__} has none")
    yield
    MODULE.read_tensors_by(EXCHANGE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_both_ways_to_read_tensors(reading: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 14).to(dtype)[:, ::2].requires_grad_()
    y = torch.randn(7, 11).to(dtype).T.requires_grad_()
    pairs = Pairs(differ=(torch.arange(9), torch.arange(11)), above=-2.0)
    folds = ("logsumexp", Fold("max", pairs=pairs), Fold("sum_relu", negate=True))
    found = {}
    for backend in ("cpu", "reference"):
        reduced = similarity_reduce(x, y, reduce=folds, dim=(0, 1), scale=0.5, backend=backend)
        total = sum(each.sum() for each in (*reduced.rows, *reduced.cols))
        best = similarity_topk(x.detach(), y.detach(), k=3, backend=backend)
        found[backend] = (total, *torch.autograd.grad(total, (x, y)), best.values, best.indices)
        assert best.indices.dtype == torch.int64 and found[backend][1].dtype == dtype
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found["cpu"], found["reference"], **tolerance)


def test_outputs_are_on_the_cpu_whatever_the_default_device_is(reading: None) -> None:
    x = torch.randn(4, 8)
    with torch.device("meta"):
        values = similarity_reduce(x, x, backend="cpu")
    assert values.device.type == "cpu" and values.isfinite().all()


def test_outputs_may_be_empty_and_parameters_are_tensors(reading: None) -> None:
    x = torch.nn.Parameter(torch.randn(0, 8))
    values = similarity_reduce(x, torch.nn.Parameter(torch.randn(3, 8)), backend="cpu")
    assert values.shape == (0,)
    values.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 8)
    assert route(torch.randn(0, 4), 2, backend="cpu").experts.shape == (0, 2)


# ---- What is refused


def test_arguments_of_other_types_are_refused(reading: None) -> None:
    order = extension.functions("similarity_topk").order
    values, indices = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    assert order(values, indices, 2)[0].shape == (2, 2)
    for arguments, kind, message in (
        ((values, indices), TypeError, "it takes 3 arguments, got 2"),
        (([1.0], indices, 2), TypeError, "an argument must be a tensor, got list"),
        ((None, indices, 2), TypeError, "an argument must be a tensor, got NoneType"),
        ((values, indices, "2"), TypeError, "str"),
        ((values, indices.int(), 2), TypeError, "indices must have dtype int64, got int32"),
        ((values, indices[:, :2], 2), ValueError, r"indices must have shape \(2, 3\), got \(2, 2\)"),
        ((values[None, None, None], indices, 2), ValueError, "at most 4 dimensions, got 5"),
        ((values.to("meta"), indices, 2), ValueError, "a tensor must be on a CPU or a GPU"),
    ):
        with pytest.raises(kind, match=message):
            order(*arguments)


@needs_extension
def test_threads_are_those_of_torch() -> None:
    assert (MODULE.build_config()["openmp"] == "yes") == torch.backends.openmp.is_available()


@needs_extension
def test_kernels_are_offered_to_other_modules() -> None:
    assert '"contrastive_ops._C.kernels"' in repr(MODULE.kernels())
