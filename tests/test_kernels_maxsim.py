"""The Triton kernels of maxsim against the reference. Without a GPU they run interpreted.

Products of small integers are exact in any order of summation, so there both agree on every winner and every bit.
"""

import pytest
import torch

from contrastive_ops.core import triton_kernels
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, TOLERANCE, relative_error

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not (triton_kernels.interprets() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from contrastive_ops.kernels import maxsim as launchers
from contrastive_ops.ops import TokenSets, maxsim, maxsim_pairs

DEVICE = "cpu" if triton_kernels.interprets() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUERIES, DOCUMENTS = (5, 0, 18), (9, 20, 0, 2)
PAIRS = [2, 0, 0, 1, 2], [0, 1, 3, 0, 2]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Sets:
    """Random sets of these lengths in both layouts, with masked tokens that hold NaN."""

    def __init__(self, lengths, depth, dtype, integers=True):
        rows = max(lengths) + 2
        shape = (len(lengths), rows, depth)
        values = torch.randint(-2, 3, shape).float() if integers else torch.randn(shape)
        self.mask = torch.zeros(shape[:2], dtype=torch.bool)
        for b, length in enumerate(lengths):
            self.mask[b, torch.randperm(rows)[:length]] = True
        self.mask = self.mask.to(DEVICE)
        padded = values.to(DEVICE, dtype).masked_fill(~self.mask[..., None], torch.nan)
        self.packed = padded[self.mask].requires_grad_()
        self.padded = padded.requires_grad_()
        self.offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)

    def tokens(self, layout):
        return (
            (self.padded, TokenSets(self.padded, self.mask))
            if layout == "padded"
            else (
                self.packed,
                TokenSets(self.packed, offsets=self.offsets),
            )
        )


def evaluate(sides, layout, backend, pairs=None, k=1, dtype=None):
    """Scores, and gradients for whole numbers that arrive at those that are finite."""
    leaves, given = zip(*(side.tokens(layout) for side in sides), strict=True)
    if pairs is None:
        scores = maxsim(*given, k=k, backend=backend)
    else:
        scores = maxsim_pairs(*given, tuple(torch.tensor(side, device=DEVICE) for side in pairs), k=k, backend=backend)
    upstream = (torch.arange(scores.numel(), device=DEVICE) % 5 - 2).view_as(scores).to(scores.dtype)
    return scores.detach(), *torch.autograd.grad(
        (scores.masked_fill(scores == -torch.inf, 0.0) * upstream).sum(), leaves
    )


CASES = [
    ("padded", None, 1, DTYPES[1]), ("packed", None, 3, DTYPES[2]), ("padded", PAIRS, 3, DTYPES[0]),
    ("packed", PAIRS, 1, DTYPES[1]),
]  # fmt: skip


@pytest.mark.parametrize("layout, pairs, k, dtype", CASES, ids=str)
def test_scores_winners_and_gradients(monkeypatch, layout, pairs, k, dtype):
    """Also in several launches, with ties everywhere."""
    monkeypatch.setattr(launchers, "BEST_BYTES", 4 * 40)
    sides = Sets(QUERIES, 18, dtype), Sets(DOCUMENTS, 18, dtype)
    found, expected = (evaluate(sides, layout, backend, pairs, k) for backend in ("triton", "reference"))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numbers_of_any_size(dtype):
    sides = Sets(QUERIES, 21, dtype, integers=False), Sets(DOCUMENTS, 21, dtype, integers=False)
    found, expected = (evaluate(sides, "padded", backend) for backend in ("triton", "reference"))
    finite = expected[0] != -torch.inf
    assert relative_error(found[0][finite], expected[0][finite]) <= TOLERANCE[torch.float32]
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert relative_error(a, b) <= (1e-6 if dtype == torch.float32 else GRADIENT_ERROR_16_BIT)


def test_layouts_and_batches_have_the_same_bits():
    sides = Sets(QUERIES, 7, DTYPES[0], integers=False), Sets(DOCUMENTS, 7, DTYPES[0], integers=False)
    padded, packed = (evaluate(sides, layout, "triton")[0] for layout in ("padded", "packed"))
    assert torch.equal(padded, packed)
    some = evaluate(sides, "packed", "triton", PAIRS)[0]
    assert torch.equal(some, padded[tuple(torch.tensor(side, device=DEVICE) for side in PAIRS)])


def test_what_is_no_number_wins_and_reaches_only_its_winner():
    queries, documents = torch.zeros(1, 3, 2, device=DEVICE), torch.zeros(1, 4, 2, device=DEVICE)
    queries[0, :, 0] = torch.tensor([1.0, torch.nan, 2.0])
    documents[0, :, 0] = torch.tensor([3.0, 1.0, 5.0, -torch.inf])
    for leaves in ((queries, documents), (queries.nan_to_num(1.0), documents.masked_fill(documents == 5.0, torch.nan))):
        results = []
        for backend in ("triton", "reference"):
            own = [leaf.clone().requires_grad_() for leaf in leaves]
            scores = maxsim(*own, backend=backend)
            results.append((scores.detach(), *torch.autograd.grad(scores.sum(), own)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


def test_offsets_that_do_not_fit_address_no_other_memory():
    """Offsets on a GPU are not read in advance."""
    x, y = torch.ones(4, 3, device=DEVICE), torch.ones(6, 3, device=DEVICE)
    bad = torch.tensor([0, 99], device=DEVICE), torch.tensor([-5, 4, 2, 77], device=DEVICE)
    scores, winners = launchers.forward(x, y, *bad, None, None, None, None, 0, 1, True)
    assert scores.shape == (1, 3) and int(winners.max()) < 6
    assert all(
        g.isfinite().all() for g in launchers.backward(x, y, *bad, None, None, winners, scores.nan_to_num(0.0, 0, 0), 3)
    )
