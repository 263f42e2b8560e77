"""maxsim: values and derivatives against dense formulas, ragged sets, ties, edges, memory, registration.

Products of small integers are exact in any order of summation, so there backends agree on every winner.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from pairwise import pairwise
from torch.nn.functional import normalize

from contrastive_ops.ops import TokenSets, maxsim, maxsim_pairs
from contrastive_ops.testing import TOLERANCE, relative_error, saved_bytes
from contrastive_ops.testing.compare import check_derivatives

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORWARD = torch.ops.contrastive_ops.maxsim_forward
BACKWARD = torch.ops.contrastive_ops.maxsim_backward
INF = float("inf")


def score(query, document, k=1, reduce="sum"):
    """Of two matrices of tokens, as the docstring says."""
    if len(query) == 0:
        return query.new_zeros(())
    if len(document) == 0:
        return query.new_full((), -INF)
    best = (query @ document.T).topk(min(k, len(document)), dim=1).values.sum(1)
    return best.sum() if reduce == "sum" else best.mean()


def dense(queries, documents, **options):
    """All scores of two lists of matrices."""
    rows = [torch.stack([score(q, d, **options) for d in documents]) for q in queries if documents]
    return torch.stack(rows) if rows else torch.zeros(len(queries), len(documents))


class Sets:
    """Random sets of these lengths, as leaves in both layouts, with masked tokens in between and padding behind."""

    def __init__(self, lengths, depth, dtype=torch.float64, integers=False, unmasked=False):
        self.lengths = lengths
        kept, rows = [], max(lengths, default=0) + (0 if unmasked else 3)
        self.mask = torch.zeros(len(lengths), rows, dtype=torch.bool)
        for b, length in enumerate(lengths):
            place = torch.arange(length) if unmasked else torch.randperm(rows)[:length].sort().values
            self.mask[b, place] = True
            kept.append(place)
        shape = (len(lengths), rows, depth)
        values = torch.randint(-2, 3, shape) if integers else torch.randn(shape, dtype=torch.float64)
        self.padded = values.to(dtype).requires_grad_()
        self.packed = self.padded.detach()[self.mask].requires_grad_()
        self.offsets = torch.tensor([0, *itertools.accumulate(lengths)])

    def as_padded(self):
        return TokenSets(self.padded, self.mask)

    def as_packed(self):
        return TokenSets(self.packed, offsets=self.offsets)

    def matrices(self, dtype=torch.float64):
        """A list of leaves of the truth."""
        return [part.detach().to(dtype).requires_grad_() for part in self.packed.split(self.lengths)]


def gradients(value, leaves, upstream):
    """Of the finite entries of `value`."""
    total = (torch.where(value.isfinite(), value, 0.0) * upstream).sum()
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def check(function, q, d, truth_of, tolerance, packed=(False, True)):
    """Values and gradients of `function(queries, documents)` in the layouts asked for."""
    left, right = q.matrices(), d.matrices()
    truth = truth_of(left, right)
    upstream = torch.randn_like(truth)
    expected = [torch.cat([s.packed.detach()[:0].double(), *gradients(truth, part, upstream)])
                for s, part in ((q, left), (d, right))]  # fmt: skip
    for layout in packed:
        sets = [s.as_packed() if layout else s.as_padded() for s in (q, d)]
        value = function(*sets)
        assert value.dtype == (torch.float64 if q.packed.dtype == torch.float64 else torch.float32)
        assert relative_error(value, truth) <= tolerance
        found = gradients(value, [s.tokens for s in sets], upstream.to(value.dtype))
        for s, gradient, wanted in zip((q, d), found, expected, strict=True):
            assert gradient.dtype == s.packed.dtype
            if not layout:
                assert (gradient[~s.mask] == 0).all()
                gradient = gradient[s.mask]
            assert relative_error(gradient, wanted) <= tolerance


# Lengths of queries, of documents, and the depth: tiles, panels and chunks that end early, sets that span several.
SHAPES = {
    "one": ([1], [1], 1),
    "empty sets": ([4, 0, 3], [5, 1, 0, 9], 7),
    "panels": ([33, 2, 17, 15], [16, 17, 1, 40], 64),
    "short sets": ([3] * 40, [2] * 90, 20),
    "chunks": ([5, 70], [128, 300, 1, 127, 129], 12),
    "blocks of query tokens": ([2100, 40, 0, 300], [3, 150], 4),
    "one long document": ([6], [700], 130),
}


# ---- Values and gradients --------------------------------------------------------------------------------------------


@pairwise(dtype=DTYPES, shape=SHAPES, k=[1, 3])
def test_values_and_gradients_are_those_of_dense_formulas(shape, dtype, k, backend):
    *sides, depth = SHAPES[shape]
    q, d = (Sets(lengths, depth, dtype) for lengths in sides)
    check(
        lambda left, right: maxsim(left, right, k=k, backend=backend),
        q,
        d,
        lambda left, right: dense(left, right, k=k),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_sets(seed, backend):
    torch.manual_seed(seed)
    count = torch.randint(0, 8, (2,))
    lengths = [(torch.randint(0, 14, (n,)) * (torch.rand(n) < 0.8)).tolist() for n in count.tolist()]
    depth, k = (int(torch.randint(1, high, ())) for high in (40, 5))
    reduce = "mean" if seed % 3 == 0 else "sum"
    q, d = (Sets(each, depth) for each in lengths)
    options = {"k": k, "reduce": reduce}
    check(
        lambda left, right: maxsim(left, right, **options, backend=backend),
        q,
        d,
        lambda left, right: dense(left, right, **options).double(),
        1e-11,
    )
    size = int(torch.randint(0, 12, ())) if all(lengths) else 0
    pairs = tuple(torch.randint(0, max(len(each), 1), (size,)) for each in lengths)
    check(
        lambda left, right: maxsim_pairs(left, right, pairs, **options, backend=backend),
        q,
        d,
        lambda left, right: torch.stack(
            [score(left[i], right[j], **options) for i, j in zip(*(p.tolist() for p in pairs), strict=True)]
            or [torch.zeros((), dtype=torch.float64)]
        )[:size],
        1e-11,
    )


@pytest.mark.parametrize("layout", ["one each", "lists", "no lists"])
def test_own_documents(layout, backend):
    queries = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    shape = {"one each": (5,), "lists": (5, 3), "no lists": (5, 0)}[layout]
    documents = torch.randn(*shape, 7, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(*shape, 7) < 0.7
    mask[..., 0] = True
    value = maxsim_pairs(queries, TokenSets(documents, mask), backend=backend)
    similarity = torch.einsum("nad,n...bd->n...ab", queries, documents).masked_fill(~mask[..., None, :], -INF)
    truth = similarity.amax(-1).sum(-1)
    torch.testing.assert_close(value, truth)
    upstream = torch.randn_like(truth)
    for got, expected in zip(
        *(torch.autograd.grad(v, [queries, documents], upstream) for v in (value, truth)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_pairs_are_entries_of_all_scores_bit_by_bit(backend):
    q, d = Sets([3, 0, 20, 5], 24, torch.float32), Sets([9, 200, 0, 31, 1], 24, torch.float32)
    pairs = torch.randint(0, 4, (50,)), torch.randint(0, 5, (50,))
    whole = maxsim(q.as_packed(), d.as_padded(), k=2, backend=backend)
    if backend == "cpu":
        assert torch.equal(maxsim_pairs(q.as_padded(), d.as_packed(), pairs, k=2, backend=backend), whole[pairs])
    else:
        torch.testing.assert_close(
            maxsim_pairs(q.as_padded(), d.as_packed(), pairs, k=2, backend=backend), whole[pairs]
        )


def test_the_formula_of_pylate(backend):
    """PyLate multiplies masked similarities by 0, which is the same as long as every best similarity is positive."""
    queries, documents = (normalize(torch.rand(n, length, 16), dim=-1) for n, length in ((4, 8), (6, 20)))
    query_mask, document_mask = (torch.arange(size) < torch.randint(1, size, (n, 1)) for n, size in ((4, 8), (6, 20)))
    scores = torch.einsum("ash,bth->abst", queries, documents)
    scores = scores * query_mask.unsqueeze(1).unsqueeze(3)
    scores = scores * document_mask.unsqueeze(0).unsqueeze(2)
    expected = scores.max(axis=-1).values.sum(axis=-1)
    got = maxsim(TokenSets(queries, query_mask), TokenSets(documents, document_mask), backend=backend)
    torch.testing.assert_close(got, expected)


def test_a_symmetric_mean(backend):
    x, y = Sets([3, 5, 2], 8), Sets([4, 1, 6], 8)
    options = {"reduce": "mean", "backend": backend}
    one, other = (maxsim(a.as_packed(), b.as_packed(), **options) for a, b in ((x, y), (y, x)))
    both = (one + other.T) / 2
    for i, j in itertools.product(range(3), range(3)):
        cosine = x.matrices()[i] @ y.matrices()[j].T
        torch.testing.assert_close(both[i, j], (cosine.amax(1).mean() + cosine.amax(0).mean()) / 2)


# ---- Derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_gradcheck_and_gradgradcheck(k, backend):
    q, d = Sets([2, 0, 3], 3), Sets([4, 1, 0, 2], 3)
    finite = torch.tensor([True, True, False, True])

    def function(queries, documents):
        sets = TokenSets(queries, q.mask), TokenSets(documents, offsets=d.offsets)
        return maxsim(*sets, k=k, reduce="mean", backend=backend)[:, finite]

    leaves = (q.padded, d.packed)
    check_derivatives(function, leaves)


@pytest.mark.parametrize("k", [1, 2])
def test_gradcheck_and_gradgradcheck_of_pairs(k, backend):
    q, d = Sets([2, 0, 3], 3), Sets([4, 1, 2], 3)
    pairs = torch.tensor([2, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])

    def function(queries, documents):
        sets = TokenSets(queries, offsets=q.offsets), TokenSets(documents, d.mask)
        return maxsim_pairs(*sets, pairs, k=k, backend=backend)

    leaves = (q.packed, d.padded)
    check_derivatives(function, leaves)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("paired", [False, True])
def test_every_subset_of_inputs_may_require_a_gradient(needs, paired, backend):
    tensors = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    results = []
    for wanted in (needs, (True, True)):
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
        value = (maxsim_pairs if paired else maxsim)(*leaves, backend=backend)
        assert value.requires_grad == any(wanted)
        if any(wanted):
            value.square().sum().backward()
        results.append([t.grad for t in leaves])
    for got, expected, need in zip(*results, needs, strict=True):
        assert (got is not None) == need
        if need:
            assert torch.equal(got, expected)


def test_second_derivative_by_scores_alone(backend):
    queries, documents = torch.randn(2, 3, 4).double(), torch.randn(3, 5, 4).double().requires_grad_()
    upstream = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    value = maxsim(queries, documents, backend=backend)
    (first,) = torch.autograd.grad(value, documents, upstream, create_graph=True)
    weight = torch.randn_like(first)
    (second,) = torch.autograd.grad((first * weight).sum(), upstream)
    winner = torch.einsum("nad,mbd->nmab", queries, documents).argmax(3)
    for n, m in itertools.product(range(2), range(3)):
        torch.testing.assert_close(second[n, m], (queries[n] * weight[m, winner[n, m]]).sum())


# ---- Which token wins ------------------------------------------------------------------------------------------------


def forward(queries, documents, backend, k=1, query_mask=None, document_mask=None):
    """Scores and winners of padded sets."""
    offsets = [torch.arange(t.shape[0] + 1) * t.shape[1] for t in (queries, documents)]
    masks = [None if mask is None else mask.flatten() for mask in (query_mask, document_mask)]
    rows = [t.flatten(0, 1) for t in (queries, documents)]
    return FORWARD(*rows, *offsets, *masks, None, None, 0, k, True, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 5, 300])
def test_equal_products_go_to_the_first_token(dtype, k, backend):
    queries, documents = (torch.randint(-1, 2, (n, length, 3)).to(dtype) for n, length in ((3, 7), (4, 270)))
    mask = torch.rand(4, 270) < 0.5
    mask[1, 20:] = False
    mask[2] = False
    scores, winners = forward(queries, documents, backend, k, document_mask=mask)
    products = torch.einsum("nad,mbd->mnab", queries.double(), documents.double()).flatten(1, 2)
    for m in range(4):
        place = mask[m].nonzero().squeeze(1)
        order = products[m][:, place].sort(dim=1, descending=True, stable=True).indices[:, :k]
        expected = torch.full((21, k), -1)
        expected[:, : order.shape[1]] = place[order]
        assert torch.equal(winners[m], expected.int())
    best = products.gather(2, winners.long().clamp_min(0)).masked_fill(winners < 0, 0.0).sum(2)
    expected = best.view(4, 3, 7).sum(2).T.masked_fill(~mask.any(1), -INF)
    assert torch.equal(scores.double(), expected)


@pytest.mark.parametrize("k", [1, 3])
def test_products_of_minus_infinity_are_products_of_tokens(k, backend):
    queries, documents = torch.ones(1, 2, 3), torch.full((2, 4, 3), -INF)
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    scores, winners = forward(queries, documents, backend, k, document_mask=mask)
    assert (scores == -INF).all()
    assert winners[0, 0].tolist() == [1, 2, -1][:k] and (winners[1] == -1).all()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("place", [0, 5, 140])
def test_nan_wins_and_stays_in_its_scores(k, place, backend):
    queries, documents = torch.randn(3, 18, 8), torch.randn(4, 150, 8)
    documents[2, place, 3] = torch.nan
    documents[2, 145] = torch.nan
    scores, winners = forward(queries, documents, backend, k)
    assert scores[:, 2].isnan().all() and scores[:, [0, 1, 3]].isfinite().all()
    assert (winners[2, :, 0] == place).all()
    if k == 2:
        assert (winners[2, :, 1] == 145).all()
    queries[1, 4, 0] = torch.nan
    scores, _ = forward(queries, documents, backend, k)
    assert scores[1].isnan().all() and scores[0, 0].isfinite()


def test_infinity_wins(backend):
    queries, documents = torch.rand(2, 3, 4) + 0.1, torch.randn(3, 200, 4)
    documents[1, 77] = INF
    scores, winners = forward(queries, documents, backend)
    assert (scores[:, 1] == INF).all() and (winners[1] == 77).all() and scores[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, INF])
@pytest.mark.parametrize("paired", [False, True])
def test_masked_tokens_and_tokens_of_no_set_reach_nothing(poison, paired, backend):
    q, d = Sets([4, 3, 7], 9, torch.float32), Sets([5, 130, 2], 9, torch.float32)
    function = maxsim_pairs if paired else maxsim

    def evaluate(*sets):
        value = function(*sets, backend=backend)
        return value, *torch.autograd.grad(value.square().sum(), [s.tokens for s in sets])

    clean = evaluate(q.as_packed(), d.as_packed())
    poisoned = [s.padded.detach().masked_fill(~s.mask[..., None], poison).requires_grad_() for s in (q, d)]
    found = evaluate(*(TokenSets(t, s.mask) for t, s in zip(poisoned, (q, d), strict=True)))
    assert torch.equal(found[0], clean[0])
    for gradient, expected, s in zip(found[1:], clean[1:], (q, d), strict=True):
        assert (gradient[~s.mask] == 0).all()
        assert torch.equal(gradient[s.mask], expected)
    outside = torch.full((3, 9), poison)
    around = [torch.cat([outside, s.packed.detach(), outside]).requires_grad_() for s in (q, d)]
    found = evaluate(*(TokenSets(t, offsets=s.offsets + 3) for t, s in zip(around, (q, d), strict=True)))
    assert torch.equal(found[0], clean[0])
    for gradient, expected in zip(found[1:], clean[1:], strict=True):
        assert torch.equal(gradient[3:-3], expected) and (gradient[:3] == 0).all() and (gradient[-3:] == 0).all()


# ---- Edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_sets_without_tokens(k, reduce, backend):
    q, d = Sets([0, 2], 5), Sets([3, 0, 0], 5)
    value = maxsim(q.as_padded(), d.as_padded(), k=k, reduce=reduce, backend=backend)
    assert (value[0] == 0).all() and value[1, 0].isfinite() and (value[1, 1:] == -INF).all()
    for gradient, s in zip(torch.autograd.grad(value.sum(), [q.padded, d.padded]), (q, d), strict=True):
        assert gradient.isfinite().all() and (gradient[~s.mask] == 0).all()


@pytest.mark.parametrize("sizes", list(itertools.product([0, 2], repeat=5)), ids=str)
def test_empty_dimensions(sizes, backend):
    n, length, m, other, depth = sizes
    queries, documents = torch.randn(n, length, depth).requires_grad_(), torch.randn(m, other, depth).requires_grad_()
    value = maxsim(queries, documents, backend=backend)
    expected = 0.0 if length == 0 else -INF if other == 0 else None
    assert value.shape == (n, m)
    assert (value == expected).all() if expected is not None else value.isfinite().all()
    for gradient, t in zip(torch.autograd.grad(value.sum(), [queries, documents]), (queries, documents), strict=True):
        assert gradient.shape == t.shape and gradient.isfinite().all()
    if n == m:
        assert torch.equal(maxsim_pairs(queries, documents, backend=backend), value.diagonal())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, backend):
    queries, documents = (torch.randint(-2, 3, (n, length, 6)).to(dtype) for n, length in ((3, 4), (5, 9)))
    expected = maxsim(queries, documents, backend=backend)
    variants = {
        "transposed": [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (queries, documents)],
        "parts": [torch.cat([t, t], 1)[:, : t.shape[1]] for t in (queries, documents)],
        "every other number": [t.repeat_interleave(2, 2)[..., ::2] for t in (queries, documents)],
        "rows apart": [torch.cat([t, t], 2)[..., :6] for t in (queries, documents)],
    }
    for name, inputs in variants.items():
        assert torch.equal(maxsim(*inputs, backend=backend), expected), name
    one = documents[:1].expand(4, -1, -1)
    assert torch.equal(maxsim(queries, one, backend=backend), expected[:, :1].expand(3, 4))


def test_expanded_gradient(backend):
    queries, documents = torch.randn(3, 4, 8, requires_grad=True), torch.randn(5, 6, 8, requires_grad=True)
    value = maxsim(queries, documents, backend=backend)
    first = torch.autograd.grad(value.sum(), [queries, documents], retain_graph=True)
    second = torch.autograd.grad(value, [queries, documents], torch.ones(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strides_beyond_32_bits(backend):
    """Tokens that lie more than 2^31 numbers apart, in memory of which only their pages are touched."""
    far = 2**31 + 40
    space = torch.empty(2 * far + 4096, dtype=torch.bfloat16)
    tokens = torch.randint(-2, 3, (3, 6)).to(torch.bfloat16)
    apart = space.as_strided((3, 6), (far, 1))
    apart.copy_(tokens)
    offsets = torch.tensor([0, 1, 3])
    results = []
    for rows in (apart, tokens):
        leaves = [rows.detach().requires_grad_(), tokens.detach().requires_grad_()]
        value = maxsim(*(TokenSets(t, offsets=offsets) for t in leaves), backend=backend)
        results.append((value, torch.autograd.grad(value.sum(), leaves[1])[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- Invariance ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_any_number_of_threads_gives_the_same_bits(dtype, k, threads):
    q, d = Sets([32] * 40 + [1500], 40, dtype), Sets([1, 90, 300] * 20, 40, dtype)
    pairs = torch.randint(0, 41, (200,)), torch.randint(0, 60, (200,))
    first = None
    for count in (1, 2, 3, 16, 2):
        threads(count)
        found = []
        for value in (
            maxsim(q.as_packed(), d.as_packed(), k=k, backend="cpu"),
            maxsim_pairs(q.as_packed(), d.as_packed(), pairs, k=k, backend="cpu"),
        ):
            found += [value.detach(), *torch.autograd.grad(value.square().mean(), [q.packed, d.packed])]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_has_the_same_bits_in_any_batch_and_layout(dtype):
    q, d = Sets([32, 5, 0, 70], 40, dtype), Sets([1, 90, 300, 17], 40, dtype)
    whole = maxsim(q.as_packed(), d.as_packed(), backend="cpu")
    assert torch.equal(maxsim(q.as_padded(), d.as_padded(), backend="cpu"), whole)
    assert torch.equal(maxsim(q.as_packed(), d.as_padded(), backend="cpu"), whole)
    for n, m in itertools.product(range(4), range(4)):
        parts = (TokenSets(s.packed, offsets=s.offsets[i : i + 2]) for s, i in ((q, n), (d, m)))
        assert torch.equal(maxsim(*parts, backend="cpu"), whole[n : n + 1, m : m + 1])


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_kept_are_the_tokens_and_the_winners(k, backend):
    queries, documents = torch.randn(8, 32, 16, requires_grad=True), torch.randn(20, 180, 16, requires_grad=True)
    size, value = saved_bytes(lambda: maxsim(queries, documents, k=k, backend=backend))
    assert value.requires_grad
    assert size == queries.nbytes + documents.nbytes + 8 * (9 + 21) + 4 * 8 * 32 * 20 * k
    size, _ = saved_bytes(lambda: maxsim_pairs(queries, documents[:16].view(8, 2, 180, 16), k=k, backend=backend))
    assert size == queries.nbytes + documents.nbytes + 8 * (9 + 17 + 2 * 16) + 4 * 32 * 16 * k
    with torch.no_grad():
        size, _ = saved_bytes(lambda: maxsim(queries, documents, k=k, backend=backend))
    assert size == 0


CHILD = """
import torch
from contrastive_ops.ops import maxsim
from contrastive_ops.testing import reset_peak, resident_bytes

queries, documents = torch.randn(32, 32, 64, requires_grad=True), torch.randn(512, 180, 64, requires_grad=True)
queries.grad, documents.grad = torch.zeros_like(queries), torch.zeros_like(documents)
maxsim(queries[:2], documents[:8]).sum().backward()
base = reset_peak()
value = maxsim(queries, documents)
print(resident_bytes("VmHWM") - base)
reset_peak()
value.sum().backward()
print(resident_bytes("VmHWM") - base)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable peak")
def test_peak_resident_set():
    """The products alone would take 360 MiB; the gradient of the documents takes 22.5 and the winners 2."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    forward_peak, backward_peak = (int(line) / 2**20 for line in done.stdout.split())
    assert forward_peak <= 12 and backward_peak <= 40, (forward_peak, backward_peak)


# ---- Registration ----------------------------------------------------------------------------------------------------


def arguments(paired, masked, backend, k=2):
    """Of the operators: the sets, their masks, and the rest."""
    q, d = Sets([2, 0, 3], 3), Sets([4, 1], 3)
    masks = [torch.rand(len(s.packed)) < 0.8 if masked else None for s in (q, d)]
    pairs = [torch.tensor([2, 0, 0]), torch.tensor([1, 1, 0])] if paired else [None, None]
    return [q.packed, d.packed, q.offsets, d.offsets], masks, pairs, (3 if paired else 0, k, True, backend)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_forward(paired, masked, backend):
    sets, masks, pairs, rest = arguments(paired, masked, backend)
    torch.library.opcheck(FORWARD, (*sets, *masks, *pairs, *rest))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("needs", [1, 2, 3])
def test_opcheck_backward(paired, needs, backend):
    sets, masks, pairs, rest = arguments(paired, False, backend)
    scores, winners = FORWARD(*sets, *masks, *pairs, *rest)
    upstream = torch.randn_like(scores).requires_grad_()
    torch.library.opcheck(
        BACKWARD,
        (*sets, *pairs, winners, upstream, needs, backend),
        # Second derivatives recompute through the reference; AOT tracing of them is not promised.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def padded_step(queries, documents, query_mask, document_mask):
    sets = TokenSets(queries, query_mask), TokenSets(documents, document_mask)
    return maxsim(*sets, k=2, reduce="mean").square().sum() + maxsim_pairs(*sets).sum()


def packed_step(queries, documents, query_offsets, document_offsets):
    sets = TokenSets(queries, offsets=query_offsets), TokenSets(documents, offsets=document_offsets)
    return maxsim(*sets, reduce="mean").square().sum()


@pytest.mark.parametrize("step", [padded_step, packed_step])
def test_compiles_without_graph_break_or_recompilation(step):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for n in (5, 7, 12):
        q, d = Sets([3] * n, 8, torch.float32), Sets([6] * n, 8, torch.float32)
        if step is padded_step:
            inputs = (q.padded, d.padded, q.mask, d.mask)
        else:
            inputs = (q.packed, d.packed, q.offsets, d.offsets)
        value, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(value, expected)
        for got, wanted in zip(*(torch.autograd.grad(v, inputs[:2]) for v in (value, expected)), strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1


def test_packed_queries_of_pairs_cannot_be_traced():
    q, d = Sets([2, 3], 4), Sets([1, 2], 4)

    @torch.compile(backend="eager", fullgraph=True)
    def step(queries, documents):
        return maxsim_pairs(TokenSets(queries, offsets=q.offsets), TokenSets(documents, offsets=d.offsets))

    with pytest.raises(Exception, match="queries must be padded in a traced program"):
        step(q.packed, d.packed)


def test_meta_tensors():
    queries, documents = torch.empty(3, 4, 8, device="meta"), torch.empty(6, 5, 8, device="meta")
    value = maxsim(queries, documents)
    assert value.shape == (3, 6) and value.device.type == "meta"
    assert maxsim_pairs(queries, documents.view(3, 2, 5, 8)).shape == (3, 2)


def test_autocast_is_the_score_of_bfloat16_tokens(backend):
    queries, documents = torch.randn(3, 4, 16, requires_grad=True), torch.randn(5, 9, 16, requires_grad=True)
    rounded = [t.detach().bfloat16().requires_grad_() for t in (queries, documents)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = maxsim(queries, documents, backend=backend)
    expected = maxsim(*rounded, backend=backend)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    found, truth = (torch.autograd.grad(v.sum(), t) for v, t in ((value, [queries, documents]), (expected, rounded)))
    for got, wanted in zip(found, truth, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got.bfloat16(), wanted)


# ---- Bad input -------------------------------------------------------------------------------------------------------

Q, D = torch.randn(2, 3, 4), torch.randn(5, 6, 4)
FLAT, OFFSETS = torch.randn(9, 4), torch.tensor([0, 4, 9])
BAD = [
    (lambda: maxsim([1.0], D), TypeError, "maxsim: queries must be a tensor or TokenSets, got list"),
    (lambda: maxsim(TokenSets([1.0]), D), TypeError, "maxsim: queries.tokens must be a tensor, got list"),
    (lambda: maxsim(Q, D[0]), ValueError, "documents must have shape (B, L, D), or (T, D) with offsets, got (6, 4)"),
    (lambda: maxsim(Q, D[None]), ValueError, "documents must have shape (B, L, D), or (T, D) with offsets, got (1, 5"),
    (
        lambda: maxsim_pairs(Q, D[0]),
        ValueError,
        "maxsim_pairs: documents must have shape (B, L, D) or (N, K, L, D), or (T, D) with offsets, got (6, 4)",
    ),
    (lambda: maxsim(Q.long(), D), TypeError, "queries must be float32, float64, bfloat16 or float16, got torch.int64"),
    (lambda: maxsim(Q, D.double()), TypeError, "documents must have the same dtype as queries, got torch.float64 and"),
    (lambda: maxsim(Q, D[..., :3]), ValueError, "documents must have the same last dimension as queries, got 3 and 4"),
    (lambda: maxsim(Q, D.to("meta")), ValueError, "documents must be on the same device as queries"),
    (
        lambda: maxsim(TokenSets(Q, torch.ones(2, 3).long()), D),
        TypeError,
        "queries.mask must be bool, got torch.int64\n  convert it: mask.bool()",
    ),
    (
        lambda: maxsim(TokenSets(Q, torch.ones(3, 2).bool()), D),
        ValueError,
        "queries.mask must have shape (2, 3), got (3, 2)",
    ),
    (lambda: maxsim(TokenSets(Q, [True]), D), TypeError, "queries.mask must be a tensor, got list"),
    (
        lambda: maxsim(Q, TokenSets(FLAT, torch.ones(5).bool(), OFFSETS)),
        ValueError,
        "documents.mask must have shape (9,), got (5,)",
    ),
    (
        lambda: maxsim(Q, TokenSets(FLAT, offsets=OFFSETS.float())),
        TypeError,
        "documents.offsets must be int64, got torch.float32",
    ),
    (
        lambda: maxsim(Q, TokenSets(FLAT, offsets=OFFSETS[:0])),
        ValueError,
        "documents.offsets must have shape (B + 1,), got (0,)",
    ),
    (
        lambda: maxsim(Q, TokenSets(FLAT, offsets=torch.tensor([0, 5, 4, 9]))),
        ValueError,
        "documents.offsets must ascend, got 4 at index 2 after 5",
    ),
    (
        lambda: maxsim(Q, TokenSets(FLAT, offsets=OFFSETS + 1)),
        ValueError,
        "documents.offsets must be within [0, 9], got 10",
    ),
    (
        lambda: maxsim(Q, TokenSets(FLAT, offsets=OFFSETS - 1)),
        ValueError,
        "documents.offsets must be within [0, 9], got -1",
    ),
    (
        lambda: maxsim(Q, TokenSets(D, offsets=OFFSETS)),
        ValueError,
        "maxsim: documents must have two dimensions (rows, D), got (5, 6, 4)",
    ),
    (lambda: maxsim(Q, D, k=0), ValueError, "maxsim: k must be at least 1, got 0"),
    (lambda: maxsim(Q, D, k=1.5), TypeError, "maxsim: k must be an int, got float"),
    (lambda: maxsim(Q, D, reduce="max"), ValueError, "maxsim: reduce must be one of 'sum', 'mean', got 'max'"),
    (
        lambda: maxsim(Q, D, backend="gpu"),
        ValueError,
        "maxsim: backend must be one of 'auto', 'reference', 'cpu'",
    ),
    (
        lambda: maxsim_pairs(Q, D),
        ValueError,
        "maxsim_pairs: documents must be as many as queries, one or one list each, got 5 and 2",
    ),
    (
        lambda: maxsim_pairs(Q, D, torch.tensor([0])),
        TypeError,
        "maxsim_pairs: pairs must be a tuple of 2 tensors, got Tensor",
    ),
    (
        lambda: maxsim_pairs(Q, D, (torch.tensor([0]), torch.tensor([0, 1]))),
        ValueError,
        "pairs of the documents must have shape (1,), got (2,)",
    ),
    (
        lambda: maxsim_pairs(Q, D, (torch.tensor([2]), torch.tensor([0]))),
        ValueError,
        "pairs of the queries must be in [0, 2), got 2",
    ),
    (
        lambda: maxsim_pairs(Q, D, (torch.tensor([0]), torch.tensor([-1]))),
        ValueError,
        "pairs of the documents must be in [0, 5), got -1",
    ),
    (
        lambda: maxsim_pairs(Q, torch.randn(2, 2, 3, 4), (torch.tensor([0]), torch.tensor([0]))),
        ValueError,
        "maxsim_pairs: documents must have shape (B, L, D) where pairs are given, got lists",
    ),
]


@pytest.mark.parametrize("call,kind,message", BAD, ids=[message for *_, message in BAD])
def test_bad_input(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_the_extension_checks_what_addresses_memory():
    """Offsets and pairs on another path than the public functions, such as a traced one."""
    sets, masks, pairs, rest = arguments(True, False, "cpu")
    falling = [sets[0], sets[1], torch.tensor([0, 4, 2, 5]), sets[3]]
    with pytest.raises(ValueError, match=r"maxsim: offsets must ascend within \[0, 5\], got 2 at 2"):
        FORWARD(*falling, *masks, *pairs, *rest)
    with pytest.raises(ValueError, match=r"pairs must name queries in \[0, 3\) and documents in \[0, 2\), got 0 and 2"):
        FORWARD(*sets, *masks, torch.tensor([0]), torch.tensor([2]), *rest)
    with pytest.raises(ValueError, match="a query must not have more than 1 tokens, the longest that was given"):
        FORWARD(*sets, *masks, *pairs, 1, *rest[1:])
    scores, winners = FORWARD(*sets, *masks, *pairs, *rest)
    with pytest.raises(ValueError, match="winners must come from forward"):
        BACKWARD(*sets, *pairs, winners[:2], scores, 3, "cpu")
    far = torch.full_like(winners, 2**30)
    found = BACKWARD(*sets, *pairs, far, torch.ones_like(scores), 3, "cpu")
    assert all((gradient == 0).all() for gradient in found)
