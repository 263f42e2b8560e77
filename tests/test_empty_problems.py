"""Problems of size 0 and 1: every public function, with each of its sizes in turn, answers or says why in our words.

Members are all callables of `contrastive_ops.__all__` and of its namespaces: a new one must come into CALLS, into
`contrastive_ops.testing.LOSSES`, or be named among those that take no tensors.
"""

import inspect
import itertools
import os
import tempfile

import numpy as np
import pytest
import torch
from torch import Tensor

import contrastive_ops as ops
from contrastive_ops import decoding, metrics, mining, moe
from contrastive_ops.ops.router_losses import LOSSES as LOSSES_OF_ROUTERS
from contrastive_ops.testing import LOSSES, draws, leaves

MADE: list[Tensor] = []


def odd(tensor):
    """The same numbers; dimensions of one number have strides that nobody would choose, and may."""
    sizes = enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    strides = [7 + 2 * i if size <= 1 else stride for i, (size, stride) in sizes]
    return tensor.as_strided(tensor.shape, strides)


def rows(*shape):
    MADE.append(torch.randn(*shape, requires_grad=True))
    return odd(MADE[-1])


def ids(*shape, below=1):
    """Numbers below `below`; of none there are none but -1."""
    return odd(torch.randint(below, shape) if below else torch.full(shape, -1))


def fixed(*shape):
    """Numbers without a gradient."""
    return odd(torch.rand(shape))


def lists(n, m):
    """A list of at most one column for each row."""
    return torch.arange(n + 1) * min(m, 1), ids(n * min(m, 1), below=m)


def rules(n, m, d):
    return ops.Pairs(
        diagonal=1,
        differ=(torch.arange(n), torch.arange(1, m + 1)),
        exclude=lists(n, m),
        below=(5.0, 5 + fixed(n), 5 + fixed(1, m), 5 + fixed(n, 1)),
        above=torch.tensor(-9.0),
        guide=ops.ops.Guide(fixed(n, d), fixed(m, d), (3.0, 3 + fixed(n, 1), 3 + fixed(1, m))),
        log_weight=(fixed(2, 2), ids(n), ids(m)),
    )


def reduced(n, m, d, backend, **options):
    return ops.similarity_reduce(rows(n, d), rows(m, d), pairs=rules(n, m, d), backend=backend, **options)


KINDS = ("logsumexp", "max", "sum_softplus", "sum_relu", "sum", "count")


def folds(n, m, d, backend):
    return reduced(n, m, d, backend, reduce=KINDS, dim=(0, 1), row_bias=rows(n), col_bias=rows(m), linear=lists(n, m))


def folds_of_itself(n, d, backend):
    pairs = ops.Pairs(diagonal=0, below=fixed(n), guide=ops.ops.Guide(fixed(n, d), None, 0.1))
    return ops.similarity_reduce(rows(n, d), None, reduce=KINDS, dim=(0, 1), pairs=pairs, backend=backend)


def routed(tokens, experts, backend, k=1, **gating):
    losses = [each for each in LOSSES_OF_ROUTERS if each != "load"]
    return ops.route(
        rows(tokens, experts), k, gating=ops.ops.Gating(**gating), losses=losses, backend=backend, capacity=1.0
    )


def dispatched(tokens, d, backend, then=lambda rows, routing: rows):
    routing = ops.route(rows(tokens, 4), 2)
    return then(ops.ops.dispatch(rows(tokens, d), routing, backend=backend), routing)


def mined(n, m, d, backend, positives=1, **options):
    return ops.mine_hard_negatives(fixed(n, d), fixed(m, d), ids(n, positives, below=m), 2, backend=backend, **options)


def formatted(n, m, positives):
    found = mined(n, m, 4, "auto", positives)
    for each in ("triplet", "n-tuple", "labeled-pair", "labeled-list"):
        found.format(each)
    return found.indices


def searched_file(n, m, d):
    """A corpus in a file, found again in a checkpoint. A file of no bytes cannot be mapped."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = np.zeros((m, d), dtype=np.float32)
        if corpus.size:
            corpus = np.memmap(os.path.join(folder, "corpus"), dtype=np.float32, mode="w+", shape=(m, d))
        query, checkpoint = fixed(n, d), os.path.join(folder, "checkpoint")
        return [mining.search(query, corpus, 2, checkpoint=checkpoint) for _ in range(2)]


def states(n, m, d, backend):
    query = fixed(n, d)
    state, other = (ops.mining.TopKState(query, 2, backend=backend, count_above=torch.zeros(n)) for _ in range(2))
    state.update(fixed(m, d), 0)
    other.load_state_dict(state.state_dict())
    return other.finalize(), list(other.statistics.values())


def banked(filled, n, d, backend):
    bank = ops.mining.MemoryBank(4, max(d, 1))
    bank.enqueue(fixed(filled, max(d, 1)), torch.arange(filled))
    return bank.topk(rows(n, max(d, 1)), 2, ids=torch.arange(n), max_age=1, backend=backend), bank.entries(1)


def measured(queries, k, documents):
    found = ids(queries, k, below=max(documents, 1))
    indptr, indices = lists(queries, documents)
    return ops.metrics.retrieval_metrics(found, (indptr, indices, torch.ones(len(indices))), k=(1,))


def paired(n, m, d, backend):
    return torch.tensor(
        list(ops.metrics.pair_recall(fixed(n, d), fixed(m, d), ids(n), ids(m), backend=backend).values())
    )


def searched(batch, candidates, length, d):
    cache = decoding.ContrastiveCache(fixed(batch, length, d))
    given = fixed(batch, candidates, d), fixed(batch, candidates)
    first = decoding.contrastive_search(*given, fixed(batch, length, d))
    cache.append(fixed(batch, d))
    return first, decoding.contrastive_search(*given, cache)


def running_denominator(n):
    case = LOSSES["sog_clr"]
    return case(case.inputs(n, 4))


def attended(n, m, d, v, backend):
    return ops.ops.similarity_values(rows(n, d), rows(m, d), rows(m, v), pairs=rules(n, m, d), backend=backend)


def distilled(n, m, d, t, backend, divergence, dim):
    student, teacher = (rows(n, d), rows(m, d)), (fixed(n, t), fixed(m, t))
    return ops.ops.similarity_distill(*student, *teacher, divergence=divergence, dim=dim, backend=backend)


def prefixes(n, m, d, backend, normalize):
    dims = sorted({1, max(d, 1)})
    given = {"dims": dims, "dim": (0, 1), "normalize": normalize, "backend": backend}
    return ops.ops.similarity_prefix(rows(n, d), rows(m, d), pairs=ops.Pairs(diagonal=0), **given)


def language(n, v, d, backend="auto", **options):
    hidden, head = rows(n, d), rows(v, d)
    labels = ids(n, below=v).masked_fill_(torch.tensor(v == 0), -100)
    return ops.losses.linear_log_prob(hidden, head, labels, bias=rows(v), backend=backend, **options)


def heads(n, v, h, d, backend):
    hidden, weight = rows(n, d), rows(v, h, d)
    labels = ids(n * h, below=v).masked_fill_(torch.tensor(v == 0), -100).view(n, h)
    options = {"bias": rows(v, h), "z_loss": 0.1, "reduction": "sum", "backend": backend}
    return [ops.losses.linear_cross_entropy(hidden, weight, labels, softcap=cap, **options) for cap in (None, 2.0)]


def layer(make):
    """A layer of experts on tokens (B, L, D)."""

    def call(b, t, d, backend):
        out = make(max(d, 1))(rows(b, t, max(d, 1)), backend=backend)
        return out if isinstance(out, Tensor) else (out[0], out[1].gates)

    return call


# Sizes that are tried one by one as 0 and as 1, and all together; then the call.
CALLS = {
    "collapse": ({"n": 3, "k": 4, "m": 5}, lambda n, k, m: mining.collapse(ids(n, k, below=m), ids(m, below=3))),
    "csls": (
        {"n": 3, "m": 4, "d": 5},
        lambda n, m, d, backend: mining.csls(fixed(n, d), fixed(m, d), 2, backend=backend),
    ),
    "mixtures": (
        {"n": 3, "k": 2, "d": 5},
        lambda n, k, d: mining.mixtures(rows(4, d), ids(n, k, 2, below=4), 0.3),
    ),
    "ratio_margin": (
        {"n": 3, "m": 4, "d": 5},
        lambda n, m, d, backend: mining.ratio_margin(fixed(n, d), fixed(m, d), 2, backend=backend),
    ),
    "first_of_each": ({"n": 3, "k": 4}, lambda n, k: mining.first_of_each(ids(n, k, below=3))),
    "SparseMoE": ({"b": 2, "t": 3, "d": 4}, layer(lambda d: moe.SparseMoE(d, 4, 3, 2))),
    "ExpertChoice": ({"b": 2, "t": 3, "d": 4}, layer(lambda d: moe.ExpertChoice(d, 4, 3))),
    "SoftMoE": ({"b": 2, "t": 3, "d": 4}, layer(lambda d: moe.SoftMoE(d, 4, 3))),
    "similarity_reduce": ({"n": 3, "m": 4, "d": 5}, folds),
    "similarity_reduce itself": ({"n": 3, "d": 5}, folds_of_itself),
    "similarity_topk": (
        {"n": 3, "m": 4, "d": 5},
        lambda n, m, d, backend: ops.similarity_topk(rows(n, d), rows(m, d), 2, pairs=rules(n, m, d), backend=backend),
    ),
    "merge_lse": ({"n": 3}, lambda n: ops.ops.merge_lse(rows(n), rows(n))),
    "similarity_prefix": ({"n": 3, "m": 4, "d": 5}, lambda **sizes: prefixes(**sizes, normalize=False)),
    "similarity_prefix normalised": ({"n": 3, "m": 4, "d": 5}, lambda **sizes: prefixes(**sizes, normalize=True)),
    "similarity_values": ({"n": 3, "m": 4, "d": 5, "v": 2}, attended),
    "stream_rows": (
        {"n": 3, "m": 4, "d": 5},
        lambda n, m, d: ops.ops.stream_rows(lambda logits, part: logits.sum(1), rows(n, d), rows(m, d)),
    ),
    "maxsim": (
        {"a": 2, "s": 3, "b": 4, "t": 5, "d": 6},
        lambda a, s, b, t, d, backend: ops.ops.maxsim(rows(a, s, d), rows(b, t, d), backend=backend),
    ),
    "maxsim_pairs": (
        {"n": 2, "s": 3, "b": 4, "t": 5, "d": 6},
        lambda n, s, b, t, d, backend: ops.ops.maxsim_pairs(rows(n, s, d), rows(n, b, t, d), backend=backend),
    ),
    "xtr": (
        {"a": 2, "s": 3, "b": 4, "t": 5, "d": 6},
        lambda a, s, b, t, d, backend: ops.ops.xtr(rows(a, s, d), rows(b, t, d), 3, backend=backend),
    ),
    "TokenSets": (
        {"a": 2, "t": 3, "d": 4},
        lambda a, t, d, backend: ops.ops.maxsim(
            ops.ops.TokenSets(rows(a * t, d), offsets=torch.arange(a + 1) * t), rows(2, 3, d), k=2, backend=backend
        ),
    ),
    "route": ({"tokens": 5, "experts": 4}, routed),
    "route groups": ({"tokens": 5}, lambda **s: routed(**s, experts=8, expert_groups=4, kept_groups=2)),
    "dispatch": ({"tokens": 5, "d": 3}, dispatched),
    "combine": (
        {"tokens": 5, "d": 3},
        lambda tokens, d, backend: dispatched(tokens, d, backend, lambda r, g: ops.ops.combine(r, g, backend=backend)),
    ),
    "expert_choice": (
        {"tokens": 5, "experts": 4},
        lambda tokens, experts, backend: ops.ops.expert_choice(rows(tokens, experts), 2, backend=backend),
    ),
    "grouped_matmul": (
        {"t": 5, "d": 3, "f": 4},
        lambda t, d, f, backend: ops.ops.grouped_matmul(
            rows(t, d), rows(2, d, f), torch.tensor([0, t // 2, t]), rows(2, f), backend=backend
        ),
    ),
    "Experts": (
        {"t": 5, "d": 3},
        lambda t, d, backend: moe.Experts(max(d, 1), 4, 2)(
            rows(t, max(d, 1)), torch.tensor([0, t // 2, t]), backend=backend
        ),
    ),
    "Router": ({"t": 5}, lambda t: moe.Router(4, 3, 2)(rows(t, 4)).gates),
    "balanced_bias": ({"t": 5}, lambda t: moe.balanced_bias(torch.zeros(3), torch.zeros(t, 3))),
    "mine_hard_negatives": ({"n": 3, "m": 9, "d": 4, "positives": 2}, mined),
    "mine_hard_negatives drawn": (
        {"n": 3, "m": 9, "d": 4, "positives": 2},
        lambda **s: mined(
            **s,
            rules=mining.NegativeRules(absolute_margin=0.0, relative_margin=0.1, near_duplicate=0.9),
            sampling=mining.Sampling("softmax"),
        ),
    ),
    "mine_hard_negatives formats": ({"n": 3, "m": 9, "positives": 2}, formatted),
    "search file": ({"n": 3, "m": 9, "d": 4}, searched_file),
    "search": ({"n": 3, "m": 9, "d": 4}, lambda n, m, d: mining.search(fixed(n, d), fixed(m, d), 2)),
    "TopKState": ({"n": 3, "m": 9, "d": 4}, states),
    "still_exact": (
        {"n": 3, "m": 9, "d": 4},
        lambda n, m, d: mining.still_exact(
            ops.similarity_topk(q := fixed(n, d), fixed(m, d), 2), q, q + 0.01, corpus_shift=0.1
        ),
    ),
    "MemoryBank": ({"filled": 3, "n": 2, "d": 4}, banked),
    "UnigramSampler": ({"n": 4, "v": 5}, lambda n, v: ops.losses.UnigramSampler(torch.ones(v))(ids(n, below=v), 2)),
    "RunningCentre": (
        {"n": 3, "k": 4, "d": 2},
        lambda n, k, d: ops.losses.RunningCentre(max(k, 1))(fixed(n, d), fixed(max(k, 1), d)),
    ),
    "sinkhorn": ({"b": 2, "n": 3, "k": 4}, lambda b, n, k: ops.sinkhorn(fixed(b, n, k))),
    "RunningDenominator": ({"n": 3}, running_denominator),
    "RunningPrototypes": (
        {"n": 3, "c": 4, "d": 2},
        lambda n, c, d: ops.losses.RunningPrototypes(max(c, 1), max(d, 1))(
            fixed(n, max(d, 1)), ids(n, below=max(c, 1))
        ),
    ),
    "RunningCovariance": ({"n": 3, "d": 2}, lambda n, d: ops.losses.RunningCovariance(d)(rows(n, d))),
    "linear_log_prob": ({"n": 3, "v": 5, "d": 4}, language),
    "linear_log_prob entropy": ({"n": 3, "v": 5, "d": 4}, lambda **sizes: language(**sizes, entropy=True)),
    "linear_log_prob capped": (
        {"n": 3, "v": 5, "d": 4},
        lambda **sizes: [language(**sizes, entropy=choice, softcap=2.0) for choice in (False, True)],
    ),
    "linear_cross_entropy heads": ({"n": 3, "v": 5, "h": 2, "d": 4}, heads),
    "linear_kl capped": (
        {"n": 3, "v": 5, "h": 2, "d": 4, "e": 2},
        lambda n, v, h, d, e: ops.losses.linear_kl(rows(n, d), rows(v, h, d), fixed(n, e), fixed(v, h, e), softcap=2.0),
    ),
    "linear_kl": (
        {"n": 3, "v": 5, "d": 4, "e": 2},
        lambda n, v, d, e: ops.losses.linear_kl(rows(n, d), rows(v, d), fixed(n, e), fixed(v, e)),
    ),
    "kl_estimate": ({"n": 3}, lambda n: ops.losses.kl_estimate(rows(n), fixed(n))),
    "log_odds": ({"n": 3}, lambda n: ops.losses.log_odds(-rows(n).square())),
    "uniformity": ({"n": 3, "m": 2, "d": 4}, lambda n, m, d, backend: ops.losses.uniformity(rows(n, d), rows(m, d))),
    "uniformity itself": ({"n": 3, "d": 4}, lambda n, d, backend: ops.losses.uniformity(rows(n, d), backend=backend)),
    "sparsity": (
        {"n": 3, "d": 4},
        lambda n, d: tuple(ops.losses.sparsity(rows(n, d), kind=kind) for kind in ("flops", "l1")),
    ),
    "cosent": ({"n": 3, "d": 4}, lambda n, d: ops.losses.cosent(rows(n, d), rows(n, d), fixed(n))),
    "angle": ({"n": 3, "d": 4}, lambda n, d: ops.losses.angle(rows(n, 2 * d), rows(n, 2 * d), fixed(n))),
    "batch_contrastive": ({"n": 4, "d": 3}, lambda n, d: ops.losses.batch_contrastive(rows(n, d), ids(n, below=2))),
    "lifted_structure": ({"n": 4, "d": 3}, lambda n, d: ops.losses.lifted_structure(rows(n, d), ids(n, below=2))),
    "spectral_contrastive": ({"n": 3, "d": 4}, lambda n, d: ops.losses.spectral_contrastive(rows(n, d), rows(n, d))),
    "group_whiten": ({"n": 9, "d": 4}, lambda n, d: ops.losses.group_whiten(rows(n, d), 1)),
    "variance_hinge": ({"n": 9, "d": 4}, lambda n, d: ops.losses.variance_hinge(rows(n, d))),
    "covariance_penalty": ({"n": 9, "d": 4}, lambda n, d: ops.losses.covariance_penalty(rows(n, d))),
    "vicreg": ({"n": 9, "d": 4}, lambda n, d: ops.losses.vicreg(rows(n, d), rows(n, d))),
    "barlow_twins": ({"n": 9, "d": 4}, lambda n, d: ops.losses.barlow_twins(rows(n, d), rows(n, d))),
    "log_det": ({"n": 9, "d": 4}, lambda n, d: ops.losses.log_det(rows(n, d))),
    "effective_rank": ({"n": 9, "d": 4}, lambda n, d: ops.losses.effective_rank(rows(n, d), centre=True)),
    "isotropy": ({"n": 9, "d": 4}, lambda n, d: metrics.isotropy(rows(n, d), ids(n, below=2))),
    "similarity_histogram": (
        {"n": 3, "m": 4, "d": 5},
        lambda n, m, d: metrics.similarity_histogram(rows(n, d), rows(m, d)),
    ),
    "iso_score": ({}, lambda: metrics.iso_score(rows(4, 3))),
    "contrast_accuracy": ({"n": 3}, lambda n: metrics.contrast_accuracy(rows(n, 2, 2))),
    "hubness": (
        {"n": 4, "k": 2, "columns": 5},
        lambda n, k, columns: metrics.hubness(ids(n, k, below=columns), columns),
    ),
    "retrieval_metrics": ({"queries": 3, "k": 2, "documents": 5}, measured),
    "spearman": ({"n": 3}, lambda n: metrics.spearman(fixed(n), fixed(n))),
    "auc": ({"n": 3}, lambda n: metrics.auc(fixed(n), torch.arange(n) % 2)),
    "cka": ({"n": 3, "d": 4, "e": 2}, lambda n, d, e: metrics.cka(fixed(n, d), fixed(n, e))),
    "pair_recall": ({"n": 3, "m": 4, "d": 2}, paired),
    "table": ({"n": 3}, lambda n: torch.tensor(len(metrics.table({"a": {"ndcg@10": fixed(n)}})))),
    "contrastive_search": ({"batch": 2, "candidates": 3, "length": 4, "d": 5}, searched),
    "batch_semi_hard_triplet": (
        {"n": 3, "d": 4},
        lambda n, d, backend: ops.losses.batch_semi_hard_triplet(
            rows(n, d), torch.arange(n) % 2, target=(torch.arange(n) + 1) % max(n, 1), backend=backend
        ),
    ),
}
CALLS |= {
    f"similarity_topk {dtype}": (
        {"n": 3, "m": 4, "d": 5},
        lambda n, m, d, backend, dtype=dtype: ops.similarity_topk(
            rows(n, d), rows(m, d), 2, pairs=rules(n, m, d), coarse=dtype, backend=backend
        ),
    )
    for dtype in (torch.bfloat16, torch.int8)
}
CALLS |= {
    f"similarity_topk {metric}": (
        {"n": 3, "m": 4, "d": 5},
        lambda n, m, d, backend, metric=metric: ops.similarity_topk(
            rows(n, d), rows(m, d), 2, metric=metric, pairs=rules(n, m, d), backend=backend
        ),
    )
    for metric in ("cosine", "sqeuclidean")
}
CALLS |= {
    f"similarity_distill {kind} {dim}": (
        {"n": 3, "m": 4, "d": 5, "t": 2},
        lambda n, m, d, t, backend, kind=kind, dim=dim: distilled(n, m, d, t, backend, kind, dim),
    )
    for kind, dim in itertools.product(("kl", "ce", "reverse_kl", "js"), (0, (0, 1)))
}
# What holds options or results, and what is neither a function of tensors.
NO_PROBLEM = {
    "capture",
    "Capacity",
    "Coarse",
    "ContrastiveCache",
    "ContrastiveChoice",
    "CrossEntropy",
    "Diagnostics",
    "Entries",
    "Fold",
    "Gating",
    "Guide",
    "HardNegatives",
    "LogProb",
    "NegativeRules",
    "Pairs",
    "PrefixFolds",
    "Reduced",
    "RefreshSchedule",
    "RouterLoss",
    "Routing",
    "Sampling",
    "TopK",
}


PLACES = (ops, ops.losses, ops.ops, mining, moe, metrics, decoding)


def test_every_public_function_is_tried():
    public = {name for place in PLACES for name in place.__all__ if callable(getattr(place, name))}
    known = {name.split()[0] for name in (*CALLS, *LOSSES)}
    assert public - known - NO_PROBLEM == set()
    assert {name for name in NO_PROBLEM if not any(hasattr(place, name) for place in PLACES)} == set()


def cases():
    for name, (sizes, call) in CALLS.items():
        backends = ("reference", "cpu") if takes_backend(call) else (None,)
        for backend in backends:
            yield pytest.param(sizes, call, backend, id=f"{name}-{backend}" if backend else name)


def takes_backend(call):
    names = inspect.signature(call).parameters
    return "backend" in names or any(p.kind == p.VAR_KEYWORD for p in names.values())


def small(sizes):
    """Each size as 0 and as 1, and all of them."""
    for value in (0, 1):
        for name in sizes:
            yield {**sizes, name: value}
        yield dict.fromkeys(sizes, value)


def tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
    elif hasattr(value, "gates"):
        yield from tensors([value.gates, *value.losses.values()])


def outcome(call, sizes, backend):
    """Whether each floating result and each input that has a gradient elsewhere has one; the sum of the results."""
    MADE.clear()
    found = list(tensors(call(**sizes, backend=backend) if backend else call(**sizes)))
    wanting = [value.requires_grad for value in found]
    total = sum(value.sum() for value in found if value.requires_grad)
    if any(wanting):
        total.backward()
    given = [leaf.grad is not None for leaf in MADE]
    finite = all(bool(leaf.grad.isfinite().all()) for leaf in MADE if leaf.grad is not None)
    return wanting, given, finite or not bool(torch.as_tensor(total).isfinite())


@pytest.mark.parametrize("sizes,call,backend", cases())
def test_a_size_of_none_or_one(sizes, call, backend):
    usual = outcome(call, sizes, backend)
    answers = 0
    for each in small(sizes):
        try:
            assert outcome(call, each, backend) == usual, each
            answers += 1
        except (ValueError, TypeError, NotImplementedError) as error:
            assert ours(error), (each, error)
    assert answers


def ours(error):
    """Whether the message begins with a public name: `function: argument must ...`."""
    name = str(error).split(":")[0].split(".")[0]
    return any(hasattr(place, name) for place in PLACES)


# Rows, depth, and how many columns there are beside those of the rows.
SMALL = [(0, 8, 1), (0, 8, 0), (1, 8, 1), (1, 8, 0), (3, 0, 2), (3, 1, 2), (0, 0, 0), (1, 1, 0)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_losses_of_none_or_one(name, backend, monkeypatch):
    case = LOSSES[name]
    for rows, depth, more in SMALL:
        monkeypatch.setattr(draws, "MORE_COLUMNS", more)
        inputs = case.inputs(rows, depth)
        try:
            value = case(inputs, case.reductions[0], backend)
            value.sum().backward()
        except (ValueError, TypeError, NotImplementedError) as error:
            assert ours(error), (rows, depth, more, error)
            continue
        assert all(leaf.grad is not None for leaf in leaves(inputs)), (rows, depth, more)
        assert all(leaf.grad.isfinite().all() for leaf in leaves(inputs)), (rows, depth, more)


def test_search_of_no_candidates_says_so():
    with pytest.raises(ValueError, match=r"contrastive_search: candidates must be one or more .* got \(2, 0, 4\)"):
        decoding.contrastive_search(torch.ones(2, 0, 4), torch.ones(2, 0), torch.ones(2, 3, 4))


@pytest.mark.parametrize("function", [ops.losses.group_whiten, ops.losses.effective_rank])
def test_what_linear_algebra_refuses_is_nan(function):
    x = torch.randn(6, 4)
    x[2, 1] = torch.nan
    assert function(x.requires_grad_()).isnan().all()


def test_tokens_of_no_set(backend):
    """Offsets that begin no set: all tokens are beside them, and have no gradient."""
    for queries, documents in (([2], [1, 3, 5]), ([0, 2], [4]), ([5], [0])):
        leaves = [torch.randn(6, 4).requires_grad_() for _ in "qd"]
        sets = (
            ops.ops.TokenSets(leaf, offsets=torch.tensor(o))
            for leaf, o in zip(leaves, (queries, documents), strict=True)
        )
        value = ops.maxsim(*sets, backend=backend)
        assert value.shape == (len(queries) - 1, len(documents) - 1)
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(value.sum(), leaves))
