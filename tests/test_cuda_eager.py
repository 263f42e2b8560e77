"""Whole losses on a GPU whose launches are started from C++ (csrc/eager_cuda.h), against the reference in float64.

Without a GPU the kernels run on the processor: in this process, where csrc/eager_cuda.h calls them, and under
sanitizers, where a test makes the same calls one by one.
"""

import contextlib
import functools
import re
from pathlib import Path

import cuda_host
import pytest
import torch

from contrastive_ops import Pairs, clip, info_nce, siglip
from contrastive_ops.core import cuda_kernels, eager
from contrastive_ops.core.problem import Layout, LogitSet
from contrastive_ops.core.rules import Slot
from contrastive_ops.cuda import _chunks, _products
from contrastive_ops.losses import _eager
from contrastive_ops.reference.row_losses import FOLDS, KINDS
from contrastive_ops.testing import TOLERANCE, clustered_pairs, relative_error

if eager.reason() is not None:
    pytest.skip(eager.reason(), allow_module_level=True)
ON_GPU = torch.cuda.is_available() and cuda_kernels.why_missing() is None
if not ON_GPU and cuda_host.why_missing() is not None:
    pytest.skip(cuda_host.why_missing(), allow_module_level=True)

DEVICE = "cuda" if ON_GPU else "cpu"
SCHEDULES = {"ascending": 0, "descending": 1, "shuffled": 2}
# Sums of float32 in another order than the reference's, of numbers that may cancel; as for the kernels of
# similarity_reduce.
ERROR = {torch.float32: 2e-5, torch.bfloat16: TOLERANCE[torch.bfloat16], torch.float16: TOLERANCE[torch.float16]}


@pytest.fixture(autouse=True)
def library():
    """The kernels that C++ calls."""
    torch.manual_seed(0)
    if ON_GPU:
        yield None
        return
    found = cuda_host.library()
    found.set_schedule(SCHEDULES["shuffled"], 1)
    eager.on_host(found.loss_kernels())
    yield found
    eager.on_host(0)


@pytest.fixture
def calls(monkeypatch):
    """How many calls went to C++, and how many of them it has done."""
    found, loss = [], _eager._LOSS

    def counted(*arguments):
        result = loss(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(_eager, "_LOSS", counted)
    return found


def sides(N, M, D, dtype):
    """Pairs that belong together in the first rows."""
    x, y = clustered_pairs(max(N, M), D, 0.3, dtype=dtype)
    return x[:N].to(DEVICE), y[:M].to(DEVICE)


def step(loss, tensors, backend, upstream=1.0, **options):
    """(loss, gradients of all tensors) of leaves with these numbers."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    x, y, *_ = leaves.values()
    others = {name: t for name, t in leaves.items() if name not in "xy"}
    options = {"normalize": False, **options}
    value = loss(x, y, **others, **options, backend=backend)
    return value.detach(), *torch.autograd.grad(value * upstream, list(leaves.values()))


def check(calls, loss, tensors, upstream=1.0, **options):
    dtype = tensors["x"].dtype
    got = step(loss, tensors, "cuda", upstream, **options)
    assert calls[-1]
    exact = {name: t.double() for name, t in tensors.items()}
    expected = step(loss, exact, "reference", upstream, **options)
    assert got[0].dtype == torch.float32 and relative_error(got[0], expected[0]) <= ERROR[torch.float32]
    for g, e, t in zip(got[1:], expected[1:], tensors.values(), strict=True):
        assert g.dtype == t.dtype and g.shape == t.shape
        assert relative_error(g, e) <= ERROR[dtype]


LOSSES = {"clip": clip, "info_nce": info_nce, "siglip": siglip}
SIZES = [(1, 1, 4), (8, 8, 5), (37, 37, 33), (257, 257, 8)]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("N,M,D", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(calls, name, N, M, D, dtype):
    x, y = sides(N, M, D, dtype)
    tensors = {"x": x, "y": y, "scale": torch.tensor(5.0, device=DEVICE)}
    if name == "siglip":
        tensors["bias"] = torch.tensor([-3.0], device=DEVICE)
    check(calls, LOSSES[name], tensors, upstream=3.0)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("N,M", [(5, 300), (40, 41), (12, 9)])
def test_targets_that_are_given(calls, N, M, dtype):
    x, y = sides(N, M, 24, dtype)
    target = torch.randint(0, M, (N,), device=DEVICE)
    check(calls, info_nce, {"x": x, "y": y, "temperature": torch.tensor(0.2, device=DEVICE)}, target=target)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_options(calls, name, normalize, reduction, dtype):
    x, y = sides(20, 20, 12, dtype)
    x, y = (x * torch.linspace(0.5, 3, 20, dtype=dtype, device=DEVICE)[:, None], y) if normalize else (x, y)
    options = {"reduction": reduction, "normalize": normalize}
    check(calls, LOSSES[name], {"x": x, "y": y}, **options)
    check(calls, LOSSES[name], {"x": x, "y": y, "temperature": torch.tensor(0.3, device=DEVICE)}, **options)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_rows_of_length_zero_and_of_any_length(calls, dtype):
    x, y = sides(9, 9, 12, dtype)
    size = torch.tensor([1e-4, 1e-2, 0.3, 1.0, 1.5, 7.0, 40.0, 90.0, 200.0], device=DEVICE)[:, None]
    x, y = (x * size).to(dtype), (y * size.flip(0)).to(dtype)
    check(calls, clip, {"x": x, "y": y}, normalize=True, temperature=0.3)
    x[2] = 0.0
    value, dx, dy = step(clip, {"x": x, "y": y}, "cuda", normalize=True, temperature=0.3)
    assert value.isfinite() and dy.isfinite().all() and dx[torch.arange(9) != 2].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wanted", ["x", "y", "scale", ""])
def test_gradients_that_are_wanted(calls, name, wanted):
    x, y = sides(20, 20, 12, torch.bfloat16)
    tensors = {"x": x, "y": y, "scale": torch.tensor(5.0, device=DEVICE)}
    _, *every = step(LOSSES[name], tensors, "cuda")
    leaves = {key: t.detach().clone().requires_grad_(key == wanted) for key, t in tensors.items()}
    loss = LOSSES[name](leaves["x"], leaves["y"], scale=leaves["scale"], normalize=False, backend="cuda")
    assert calls[-1] and loss.requires_grad == bool(wanted)
    if wanted:
        (got,) = torch.autograd.grad(loss, [leaves[wanted]])
        assert torch.equal(got, every[list(tensors).index(wanted)])


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(name, dtype):
    leaves = [t.requires_grad_() for t in sides(20, 20, 12, dtype)]
    loss = LOSSES[name](*leaves, normalize=False, backend="cuda")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    for gradient in first:
        gradient.zero_()
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), copies))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_orders_of_threads_agree_bitwise(library, name):
    tensors = dict(zip("xy", sides(264, 264, 16, torch.float16), strict=True))
    found = []
    for schedule in [2] if ON_GPU else SCHEDULES.values():
        for seed in (1, 2):
            if not ON_GPU:
                library.set_schedule(schedule, seed)
            found.append(step(LOSSES[name], tensors, "cuda"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_upstream_gradients_of_zero_and_of_float16_scalers(calls):
    for dtype in ERROR:
        tensors = dict(zip("xy", sides(20, 20, 12, dtype), strict=True))
        for loss in LOSSES.values():
            _, *zero = step(loss, tensors, "cuda", 0.0)
            assert not any(g.any() for g in zero)
            _, *large = step(loss, tensors, "cuda", 2.0**12)
            _, *usual = step(loss, tensors, "cuda")
            for a, b in zip(large, usual, strict=True):
                assert relative_error(a, b.double() * 2**12) <= ERROR[dtype]


def test_second_derivatives():
    x, y = (t.requires_grad_() for t in sides(6, 6, 5, torch.float32))
    found = []
    for backend in ("cuda", "cpu" if DEVICE == "cpu" else "reference"):
        (first,) = torch.autograd.grad(clip(x, y, backend=backend), [x], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, y]))
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= 1e-5


# ---- Which calls -----------------------------------------------------------------------------------------------------

REFUSED = {
    "auto": {"backend": "auto"},
    "rules": {"pairs": Pairs(diagonal=1)},
    "rows": {"reduction": "none"},
    "weights": {"weight": torch.rand(20)},
    "no memory for the products": {"memory_budget": 0},
}


@pytest.mark.parametrize("why", REFUSED)
def test_other_calls_go_through_python(monkeypatch, why):
    """What has not run on a GPU yet has to be named."""
    x, y = sides(20, 20, 12, torch.float32)
    options = {"backend": "cuda", **REFUSED[why]}
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    started = []
    forward = _eager._LOSS

    def seen(*arguments):
        loss = forward(*arguments)
        started.append(loss is not None)
        return loss

    monkeypatch.setattr(_eager, "_LOSS", seen)
    launches = 0 if ON_GPU else cuda_host.library().launches()
    with contextlib.suppress(NotImplementedError):  # without a GPU the others have no kernels here
        clip(x, y, **options)
    if not ON_GPU:
        assert cuda_host.library().launches() == launches
    elif why != "rules":
        assert not started[-1]


def test_more_than_one_chunk_goes_through_python(calls):
    x, y = torch.randn(4097, 2, device=DEVICE), torch.randn(4097, 2, device=DEVICE)
    with contextlib.suppress(NotImplementedError):
        clip(x, y, backend="cuda")
    assert calls == [False]


def test_the_variable_names_a_backend_too(calls, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "cuda")
    clip(*sides(20, 20, 12, torch.float32))
    assert calls == [True]


def test_constants_are_those_of_python():
    source = Path(cuda_host.SOURCES.parent / "eager_cuda.h").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"\b(k[A-Z]\w+) = (\d+)", source)}
    assert numbers["kChunkRows"] == _chunks.CHUNK_ROWS and numbers["kTileColumns"] == _chunks.TILE_COLUMNS
    assert re.search(r"kChunkBytes = int64_t\{(\d+)\} << 20", source)[1] == str(_products.CHUNK_BYTES >> 20)
    tiles = numbers["kMostTileRows"], numbers["kLeastTileRows"], numbers["kBlocks"]
    assert tiles == (_chunks.TILE_ROWS, _chunks.LEAST_TILE_ROWS, _chunks.BLOCKS)
    assert numbers["kPad"] == _chunks.PAD and _chunks.COLUMN_STEP == _chunks.TILE_COLUMNS


# ---- The same calls under sanitizers ---------------------------------------------------------------------------------


class OneByOne:
    """The launches of csrc/eager_cuda.h for a step with an upstream gradient of `factor`, made from here."""

    def __init__(self, host, kind, x, y, scale, bias, factor, unit):
        self.host, self.x, self.y, self.factor = host, x, y, torch.tensor([factor])
        self.narrow, self.half = x.dtype != torch.float32, x.dtype == torch.float16
        N, M, folds = len(x), len(y), len(FOLDS[kind])
        pitch = _chunks.padded(M)
        chunk = _chunks.Chunk(slice(0, N), slice(0, M), torch.empty(N * pitch), None, False)
        self.across, self.down = -(-M // _chunks.TILE_COLUMNS), -(-N // chunk.tile_rows)
        self.scale, self.target, ticket = (
            torch.empty(1),
            torch.empty(N, dtype=torch.int64),
            torch.empty(1, dtype=torch.int32),
        )
        row_bias = None if bias is None else torch.empty(N)
        self.lengths = torch.empty(2 * (N + M)) if unit else None
        rows = (torch.empty_like(x), torch.empty_like(y)) if unit else (None, None)
        host.cuda_similarity_loss_prepare(
            scale, 0.0, False, bias, 0.0, N, self.scale, row_bias, self.target, ticket, x, y, M, x.shape[1], *rows,
            self.lengths,
        )  # fmt: skip
        self.x, self.y = x, y = rows if unit else (x, y)
        _products.inner_products(x, y, chunk.matrix(chunk.dots))
        data = {}
        if unit and self.narrow:
            row_factor, col_factor = (part.clone() for part in (self.lengths[N : 2 * N], self.lengths[2 * N + M :]))
            host.cuda_similarity_loss_multiply(chunk.dots, N, M, pitch, row_factor, col_factor)
            data = {Slot.ROW_FACTOR: row_factor, Slot.COL_FACTOR: col_factor}
        pair_data, spec = Layout((LogitSet(data=data),), FOLDS[kind]).encode()
        problem = (tuple(pair_data), spec, self.scale, row_bias, None, self.target, N, M)
        parts = torch.empty(2 * (self.across * N + self.down * M))
        host.cuda_similarity_reduce_fold(chunk.dots, None, chunk.numbers(), *problem, parts, None)
        values, slopes, self.loss = torch.empty(folds * N), torch.empty((folds + 1) * N), torch.empty(1)
        self.norm = torch.empty(1) if self.half else None
        sums = torch.empty(2 * -(-N // 256), dtype=torch.float64)
        host.cuda_similarity_loss_rows(
            chunk.dots, chunk.numbers(), *problem, parts, KINDS.index(kind), float(N), ticket, sums, values, slopes,
            self.loss, self.norm,
        )  # fmt: skip
        self._weigh(chunk, problem, values, slopes, folds * N, kind == "softmax_both", bias is not None)

    def _weigh(self, chunk, problem, values, slopes, of_folds, two_pass, has_bias):
        N, M = chunk.shape
        residuals = [0, -1, 0, 0, 0, -1, 1, 0] if self.narrow else []
        sums = [*residuals, 2, 0, 0, 0, *([1, -1, 0, 0] if has_bias else [])]
        rows = bool(residuals) + 1 + has_bias
        parts = torch.empty(rows * self.across * N + bool(residuals) * self.down * M)
        early = self.factor if two_pass and not self.narrow and self.lengths is None else None
        weights = torch.empty(N * chunk.pitch, dtype=self.x.dtype)
        self.host.cuda_similarity_reduce_weigh(
            chunk.dots, None, chunk.numbers(), *problem, values, None, slopes, slopes[of_folds:], None,
            self.norm if self.half else early, weights, sums, parts, None,
        )  # fmt: skip
        dx, dy, matrix = torch.empty(self.x.shape), torch.empty(self.y.shape), chunk.matrix(weights)
        _products.set_or_add(dx, matrix, self.y, add=False)
        _products.set_or_add(dy, matrix.T, self.x, add=False)
        begins = [(bool(residuals) + k) * self.across * N for k in range(1 + has_bias)]
        totals = torch.empty(len(begins))
        places = (0, rows * self.across * N) if self.narrow else (-1, -1)
        left = [dx, dy] if early is None else [None, None]
        to = [
            None if each is None else torch.empty_like(rows) for each, rows in zip(left, (self.x, self.y), strict=True)
        ]
        self.host.cuda_similarity_loss_finish(
            *left, self.x, self.y, self.lengths, N, M, dx.shape[1], self.norm, self.factor, parts, *places, self.across,
            self.down, self.target, None, *to, begins, None, totals,
        )  # fmt: skip
        self.gradients = [*(to if early is None else [dx, dy]), totals]


@functools.cache
def sanitized():
    return cuda_host.HostKernels("shuffled")


@pytest.mark.skipif(ON_GPU, reason="the kernels run on the GPU")
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(
    "kind,unit", [("softmax_both", False), ("softmax_both", True), ("softmax", True), ("sigmoid", False)]
)
def test_the_launches_from_python_have_the_same_bits(kind, unit, dtype):
    x, y = sides(*((20, 300) if kind == "softmax" else (260, 260)), 9, dtype)
    scale, bias = torch.tensor(4.0), torch.tensor(-2.0) if kind == "sigmoid" else None
    tensors = {"x": x, "y": y, "scale": scale, **({} if bias is None else {"bias": bias})}
    loss = {"softmax_both": clip, "softmax": info_nce, "sigmoid": siglip}[kind]
    value, *gradients = step(loss, tensors, "cuda", 3.0, normalize=unit)
    made = OneByOne(sanitized(), kind, x, y, scale.view(1), None if bias is None else bias.view(1), 3.0, unit)
    assert torch.equal(made.loss[0], value)
    dx, dy, totals = made.gradients
    for got, expected in zip(gradients, [dx, dy, *totals], strict=True):
        assert torch.equal(got, expected)
