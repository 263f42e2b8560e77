"""Triton kernels between products of the library against the reference in float64: values and every gradient.

similarity_values, similarity_prefix and similarity_distill. Without a GPU they run interpreted.
"""

import pytest
import torch
from torch.nn.functional import normalize

from contrastive_ops import Pairs
from contrastive_ops.core import triton_kernels
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, relative_error

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not (triton_kernels.interprets() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from contrastive_ops.core.backends import NEVER_ON_A_DEVICE, by_name, choose
from contrastive_ops.kernels import _stored
from contrastive_ops.losses import distance_distillation
from contrastive_ops.ops import Guide, similarity_distill, similarity_prefix, similarity_values
from contrastive_ops.ops.similarity_values import BACKENDS

DEVICE = "cpu" if triton_kernels.interprets() else "cuda"
N, M = 35, 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Two chunks, two tiles of each, the last of them cut off."""
    monkeypatch.setattr(_stored, "CHUNK_BYTES", 4 * 32 * M)


def ids(values, size):
    return torch.arange(size, device=DEVICE) % values


def lists():
    listed = torch.rand(N, M) < 0.3
    listed[2] = True
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    return indptr.to(DEVICE), listed.nonzero()[:, 1].to(DEVICE)


RULES = {
    "none": lambda: None,
    "ids": lambda: Pairs(same=(ids(3, N), ids(2, M)), diagonal=1),  # rows of id 2 have no partner
    "bounds": lambda: Pairs(below=0.5, above=torch.full((N,), -0.3, device=DEVICE)),
    "lists": lambda: Pairs(exclude=lists()),
    "guide": lambda: Pairs(guide=Guide(unit(N, 3), unit(M, 3), 0.2)),
}


def unit(size, depth):
    return normalize(torch.randn(size, depth), dim=1).to(DEVICE)


def compare(function, dtype, *leaves, options=(), constants=(), twice=False):
    """Results and gradients of all leaves for given cotangents, of both backends; equal bits of two runs if `twice`.

    Leaves are rounded to the dtype; `options` are float32 leaves behind them.
    """
    found = []
    runs = [("triton", dtype)] * (1 + twice)
    for backend, to in (*runs, ("reference", torch.float64)):
        own = [t.to(dtype).to(to).detach().requires_grad_() for t in leaves]
        own += [
            t.to(torch.float64 if backend == "reference" else torch.float32).detach().requires_grad_() for t in options
        ]
        fixed = [t.to(dtype).to(to) for t in constants]
        results = [t for t in function(*own, *fixed, backend=backend) if t is not None]
        shown = [t.masked_fill(t == -torch.inf, 0.0) for t in results]
        total = sum((t * torch.linspace(-1, 1, t.numel(), device=DEVICE).view_as(t)).sum() for t in shown)
        gradients = torch.autograd.grad(total, own)
        found.append(([t.detach() for t in results], gradients))
    (values, gradients), *others, (truth, true_gradients) = found
    for again, gradients_again in others:
        assert all(map(torch.equal, (*values, *gradients), (*again, *gradients_again)))
    for value, expected in zip(values, truth, strict=True):
        assert torch.equal(value == -torch.inf, expected == -torch.inf)
        finite = expected != -torch.inf
        limit = 2e-5 if dtype == torch.float32 else 4e-3
        assert relative_error(value[finite], expected[finite]) <= limit
    for gradient, expected in zip(gradients, true_gradients, strict=True):
        limit = 4e-5 if gradient.dtype == torch.float32 == dtype else GRADIENT_ERROR_16_BIT
        assert relative_error(gradient, expected) <= limit


CASES = [("none", DTYPES[0]), ("ids", DTYPES[1]), ("bounds", DTYPES[2]), ("lists", DTYPES[1]), ("guide", DTYPES[0])]


@pytest.mark.parametrize("rules, dtype", CASES, ids=str)
def test_values(rules, dtype):
    pairs = RULES[rules]()
    scale = torch.linspace(2, 9, N) if rules in ("ids", "guide") else torch.tensor(6.0)
    bias = torch.linspace(-1, 1, M)
    if rules == "none":
        bias[3] = -torch.inf

    def function(x, y, values, scale, bias, backend):
        return (similarity_values(x, y, values, scale=scale, col_bias=bias, pairs=pairs, backend=backend),)

    leaves = unit(N, 19), unit(M, 19), torch.randn(M, 5).to(DEVICE)
    compare(function, dtype, *leaves, options=(scale.to(DEVICE), bias.to(DEVICE)), twice=rules == "none")


PREFIXES = [(False, DTYPES[0], False), (False, DTYPES[1], True), (True, DTYPES[2], True), (True, DTYPES[0], False)]


@pytest.mark.parametrize("itself, dtype, normalized", PREFIXES, ids=str)
def test_prefixes(itself, dtype, normalized):
    size = N if itself else M
    pairs = Pairs(differ=(ids(30, N), ids(30, size)), diagonal=0)
    target = None if itself else (torch.arange(N, device=DEVICE) * 7) % M

    def function(x, *rest, backend):
        *y, scale = rest
        return similarity_prefix(
            x, *y, dims=(3, 16, 18), dim=1 if itself else (0, 1), scale=scale, normalize=normalized, target=target,
            pairs=pairs, backend=backend,
        )  # fmt: skip

    leaves = [torch.randn(s, 19).to(DEVICE) / 2 for s in ((N,) if itself else (N, M))]
    compare(function, dtype, *leaves, options=(torch.tensor(3.0, device=DEVICE),), twice=itself and normalized)


DISTILL = [
    ("kl", "none", DTYPES[0], (0, 1)), ("kl", "ids", DTYPES[1], 1), ("reverse_kl", "bounds", DTYPES[1], (0, 1)),
    ("ce", "lists", DTYPES[2], 0), ("js", "guide", DTYPES[0], (0, 1)), ("js", "none", DTYPES[2], 1),
]  # fmt: skip


@pytest.mark.parametrize("kind, rules, dtype, dim", DISTILL, ids=str)
def test_divergences(kind, rules, dtype, dim):
    pairs = RULES[rules]()
    scale = torch.linspace(1, 3, N) if rules == "none" else torch.tensor(2.0)

    def function(x, y, scale, teacher_x, teacher_y, backend):
        found = similarity_distill(
            x, y, teacher_x, teacher_y, divergence=kind, dim=dim, scale=scale, teacher_scale=3.0, pairs=pairs,
            backend=backend,
        )  # fmt: skip
        return (found,) if isinstance(dim, int) else (found.rows, found.cols)

    leaves, teacher = (unit(N, 19), unit(M, 19)), (unit(N, 7), unit(M, 7))
    compare(function, dtype, *leaves, options=(scale.to(DEVICE),), constants=teacher, twice=kind == "ce")


def test_student_that_agrees_with_its_teacher():
    """Divergences and gradients near 0 are not the rounding of large numbers."""
    x, y = unit(N, 19), unit(M, 19)
    for kind in ("kl", "reverse_kl", "js"):
        student = x.clone().requires_grad_()
        found = similarity_distill(student, y, x, y, divergence=kind, scale=20.0, teacher_scale=20.0, backend="triton")
        assert found.abs().max() < 1e-10
        assert torch.autograd.grad(found.sum(), student)[0].abs().max() < 1e-5


def test_distances():
    """Pairwise kinds, through the loss that compares distances."""

    def function(x, teacher, backend):
        return (distance_distillation(x, teacher, backend=backend).reshape(1),)

    compare(function, torch.float32, torch.randn(N, 9).to(DEVICE), constants=(torch.randn(N, 5).to(DEVICE),))


def test_what_holds_no_number_stays_in_its_row():
    x, y, values = unit(N, 8), unit(M, 8), torch.randn(M, 3, device=DEVICE)
    x[3, 1] = torch.nan
    assert similarity_values(x, y, values, backend="triton").isnan().any(1).nonzero().flatten().tolist() == [3]
    folds = similarity_prefix(x, y, dims=(1, 8), backend="triton")
    assert folds.rows.isnan().nonzero().tolist() == [[1, 3]]
    found = similarity_distill(x, y, x.nan_to_num(0.0), y, backend="triton")
    assert found.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("n, m, depth", [(0, 5, 3), (5, 0, 3), (1, 1, 1), (4, 5, 0)])
def test_no_rows_columns_or_dimensions(n, m, depth):
    x, y = (torch.randn(size, depth, device=DEVICE, requires_grad=True) for size in (n, m))
    values = torch.randn(m, 2, device=DEVICE, requires_grad=True)
    calls = [
        lambda backend: similarity_values(x, y, values, backend=backend),
        lambda backend: similarity_distill(x, y, x.detach() + 1, y.detach(), dim=0, backend=backend),
    ]
    if depth:
        calls.append(
            lambda backend: similarity_prefix(x, y, dims=(1, depth) if depth > 1 else (1,), backend=backend)[0]
        )
    for call in calls:
        found, expected = call("triton"), call("reference")
        torch.testing.assert_close(found, expected)
        shown = found.masked_fill(found == -torch.inf, 0.0).sum()
        if shown.requires_grad:
            gradients = torch.autograd.grad(shown, (x, y), allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in gradients)


def test_target_that_does_not_exist_is_nan():
    from contrastive_ops.kernels import similarity_prefix as launchers

    x, target = unit(N, 4), torch.full((N,), M, device=DEVICE)
    _, _, logit = launchers.forward(
        x, unit(M, 4), torch.ones((), device=DEVICE), target, None, None, [4], None, False, 1
    )
    assert logit.isnan().all()


def test_never_run_on_a_device_is_taken_by_name_only():
    """ "auto" passes it by, says why, and `backends` has nothing against it where it is named."""
    reasons = by_name()
    stored = ("maxsim", "similarity_values", "similarity_prefix", "similarity_distill")
    fused = ("similarity_reduce", "similarity_loss")
    assert {name: list(found) for name, found in reasons.items() if found} == {
        **dict.fromkeys(stored, ["triton"]),
        **dict.fromkeys(fused, ["triton_persistent", "hopper"]),
        "similarity_topk": ["hopper"],
        "expert_routing": ["cuda"],
    }
    assert reasons["similarity_values"]["triton"] == NEVER_ON_A_DEVICE
    x = torch.empty(3, 4, device="meta")
    fake = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
    assert (
        choose("similarity_values", {name: BACKENDS[name] for name in ("reference", "triton")}, fake, "auto")
        == "reference"
    )
    assert choose("similarity_values", BACKENDS, torch.zeros(2, 2, device=DEVICE), "triton") == "triton"
    assert BACKENDS["triton"].unsupported(x.double()) != []
