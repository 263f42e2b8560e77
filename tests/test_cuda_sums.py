"""Sums over millions by the CUDA kernels: parts merge without a loss. Without a GPU the kernels run on the host."""

import contextlib

import cuda_host
import pytest
import sums_cases
import torch
from expert_routing_cases import Subject

from contrastive_ops import Pairs
from contrastive_ops.core import cuda_kernels
from contrastive_ops.cuda import _chunks, _products, expert_routing

HAS_GPU = torch.cuda.is_available() and cuda_kernels.why_missing() is None
if not HAS_GPU and cuda_host.why_missing() is not None:
    pytest.skip(f"CUDA kernels need a GPU, or: {cuda_host.why_missing()}", allow_module_level=True)

DEVICE = "cuda" if HAS_GPU else "cpu"
# A rule that drops nothing, for the kernels of calls with rules.
RULES = [None, Pairs(above=torch.tensor(-100.0))]


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    host = contextlib.nullcontext() if HAS_GPU else contextlib.closing(cuda_host.HostKernels("shuffled"))
    with host as functions, contextlib.nullcontext() if HAS_GPU else cuda_kernels.on_host(functions):
        yield


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Parts of one chunk, or of chunks one after another."""
    if request.param == "many chunks":
        monkeypatch.setattr(_chunks, "CHUNK_ROWS", 512)
        monkeypatch.setattr(_products, "CHUNK_BYTES", 4 * 512 * 2)


# By the direction; tiles have 256 columns, and here 8 rows.
LONG = {0: sums_cases.Long(2048, 8), 1: sums_cases.Long(16_000, 256)}


@pytest.mark.parametrize("dim", LONG)
@pytest.mark.parametrize("kind,pairs", [("sum", None), ("sum_relu", None), *(("sum_softplus", each) for each in RULES)])
def test_folds(kind, pairs, dim, chunks):
    sums_cases.check_folds("cuda", DEVICE, LONG[dim], kind, dim, pairs=pairs)


@pytest.mark.parametrize("dim", LONG)
@pytest.mark.parametrize("pairs", RULES)
@pytest.mark.parametrize("logits", ["equal_and_small", "rising"])
def test_logsumexp(logits, pairs, dim):
    sums_cases.check_logsumexp("cuda", DEVICE, getattr(LONG[dim], logits)(), dim, pairs=pairs)


@pytest.mark.parametrize("part", [1, 512])
def test_lists(part, monkeypatch):
    """In one chunk, where a lane adds up a thousand numbers; and in chunks, whose sums are added up."""
    if part > 1:
        monkeypatch.setattr(_products, "CHUNK_BYTES", 4 * part * 2)
    sums_cases.check_lists("cuda", DEVICE, sums_cases.Long(32_000, part))


@pytest.mark.parametrize("dim", LONG)
@pytest.mark.parametrize("pairs", RULES)
def test_gradients(pairs, dim, chunks):
    sums_cases.check_gradients("cuda", DEVICE, LONG[dim], dim, pairs=pairs)


# After so many steps the table of a warp goes into sums of float64: sooner where the warp has several tokens. Large
# numbers fill the first table; one that went on would lose what comes then.
STEPS = {True: {"first": 32, "then": 80, "square": 2.0}, False: {"first": 128, "then": 200, "square": 0.6}}


# Experts, and how many tokens a block has at a time.
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("experts,at_once", [(3, 128), (60, 16), (600, 4), (1500, 1)])
def test_routers(experts, at_once, segments, monkeypatch):
    monkeypatch.setattr(expert_routing, "PARTS", 1)
    scores, several = Subject("cuda", DEVICE).scores, at_once > 4
    sums_cases.check_router(scores, DEVICE, experts, at_once, segments, **STEPS[several])


@pytest.mark.parametrize("columns", [64, 63])  # by packs, and one by one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_took_is_given_back(dtype, columns):
    """To rows with a partner that exists, along it."""
    torch.manual_seed(0)
    gradient, other = torch.randn(5, columns, device=DEVICE), torch.randn(4, columns, device=DEVICE).to(dtype)
    residual = torch.randn(5, dtype=torch.float64, device=DEVICE)
    partner = torch.tensor([2, -1, 0, 4, 3], device=DEVICE)
    expected = gradient.clone()
    for row, mate in ((0, 2), (2, 0), (4, 3)):
        expected[row] += residual[row].float() * other[mate].float()
    cuda_kernels.kernels().cuda_similarity_reduce_give_back(gradient, residual, partner, other, 5, columns, 4)
    torch.testing.assert_close(gradient, expected)
