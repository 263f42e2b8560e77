"""Lists of ids are sets or say what a repeat does, and an id is any int64 or an error, in every function with ids.

`LISTS` is held against a search: every public function whose docstring describes an argument that is a list of indices
for each row must be in it. `IDS` is: every public function with an argument that is compared with equality.
"""

import inspect
import re

import pytest
import torch
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import Pairs, decoding, losses, metrics, mining, moe, nn, ops
from contrastive_ops.core import lists
from contrastive_ops.mining import (
    HardNegatives,
    MemoryBank,
    NegativeRules,
    Sampling,
    TopKState,
    collapse,
    first_of_each,
)

DOUBLE = torch.float64
LAST = (1 << 63) - 1


def public():
    """Every public function and class, by name."""
    found = {}
    for module in (co, losses, ops, mining, moe, metrics, decoding):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and not (inspect.isclass(thing) and issubclass(thing, torch.nn.Module) and module is nn):
                found.setdefault(name, thing)
    return found


def arguments(thing):
    """{argument: its description}, of the docstring of a function, or of a class and its methods."""
    members = (
        [thing, *(m for _, m in inspect.getmembers(thing, inspect.isfunction))] if inspect.isclass(thing) else [thing]
    )
    found = {}
    for each in members:
        section = re.search(r"^Args:\n((?:    .*\n|\n)+)", (inspect.getdoc(each) or "") + "\n", re.M)
        for name, text in re.findall(
            r"^    (\w+): ((?:.*\n(?:        .*\n)*))", section.group(1) if section else "", re.M
        ):
            found[name] = " ".join(text.split())
    return found


# ---- What a repeat does --------------------------------------------------------------------------------------------

LIST_OF_INDICES = re.compile(r"indptr|\((N|T), (P|k|K)\) int64|\(P,\) int64")
SENTENCE = re.compile(r"twice|more\s+than\s+once|each\s+once|each\s+has\s+its\s+own|sets\b|first\s+time", re.I)

X, Y = (torch.randn(n, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(n)) for n in (3, 9))
# The lists [4, 1, 4], [], [8, 8]; and without repeats.
TWICE = torch.tensor([0, 3, 3, 5]), torch.tensor([4, 1, 4, 8, 8])
ONCE = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 4, 8])
TABLE_TWICE = torch.tensor([[4, 1, 4], [-1, -1, -1], [8, 8, -1]])
TABLE_ONCE = torch.tensor([[4, 1, -1], [-1, -1, -1], [8, -1, -1]])
ALL = torch.arange(4), torch.arange(3)


def mined(positives, **options):
    found = co.mine_hard_negatives(X, Y, positives, 3, **options)
    return found.indices, found.scores, found.counts, *found.statistics.values(), *found.positives


def written(indices, positives):
    """Every format of lists that somebody put together."""
    scores = Y[indices.clamp_min(0), 0].masked_fill(indices < 0, -torch.inf)
    found = HardNegatives(indices, scores, (indices >= 0).sum(1), positives, Y[positives[1], 1], {})
    formats = ("triplet", "labeled-pair", "labeled-list")
    return [found.format(each, output_scores=scores) for each in formats for scores in (False, True)]


def bank(ids):
    """The samples nearest to each query, of a bank in which some were enqueued again."""
    memory = MemoryBank(9, 6, dtype=DOUBLE)
    memory.enqueue(Y[:5], torch.arange(5))
    memory.enqueue(Y[:4], ids)
    return memory


def routed(given):
    found = co.route(Y[:3, :5], 3, allowed=given, gating=co.ops.Gating(renormalize=True))
    return found.experts, found.gates, found.slots, found.offsets


def folded(lists, **options):
    return co.similarity_reduce(X, Y, pairs=Pairs(exclude=lists), **options)


# name: (with repeats, what is the same), or the error.
LISTS = {
    "Pairs": (lambda: folded(TWICE), lambda: folded(ONCE)),
    "similarity_reduce": (  # weights add up
        lambda: co.similarity_reduce(X, Y, linear=(*TWICE, torch.tensor([1.0, 2, 3, 4, 5], dtype=DOUBLE))).linear,
        lambda: co.similarity_reduce(X, Y, linear=(*ONCE, torch.tensor([2.0, 4, 9], dtype=DOUBLE))).linear,
    ),
    "soft_info_nce": (  # shares add up
        lambda: co.losses.soft_info_nce(X, Y, (*TWICE, torch.tensor([0.25, 0.25, 0.5, 0.5, 0.5]))),
        lambda: co.losses.soft_info_nce(X, Y, (*ONCE, torch.tensor([0.25, 0.75, 1.0]))),
    ),
    "bixse": (
        lambda: co.losses.bixse(X, Y, torch.ones(5, dtype=DOUBLE), target=TWICE[1], indptr=TWICE[0]),
        "bixse: target must name each key at most once per query, got 4 twice in the list of row 0",
    ),
    "mined_info_nce": (
        lambda: co.losses.mined_info_nce(X, X, Y, indices=TABLE_TWICE, reduction="none"),
        lambda: co.losses.mined_info_nce(X, X, Y, indices=TABLE_ONCE, reduction="none"),
    ),
    "negative_sampling": (  # draws: each counts
        lambda: losses.negative_sampling(X, Y, ALL[1], TABLE_TWICE, reduction="none"),
        lambda: (
            -F.logsigmoid((X * Y[:3]).sum(1))
            - (F.logsigmoid(-(X[:, None] * Y[TABLE_TWICE.clamp_min(0)]).sum(2)) * (TABLE_TWICE >= 0)).sum(1)
        ),
    ),
    "UnigramSampler": (
        lambda: losses.UnigramSampler(torch.ones(9))(TABLE_TWICE, 7, generator=torch.Generator().manual_seed(0)),
        lambda: losses.UnigramSampler(torch.ones(9))(TABLE_ONCE, 7, generator=torch.Generator().manual_seed(0)),
    ),
    "pair_bce": (  # pairs: each counts, with its own label
        lambda: co.losses.pair_bce(
            X, Y, ALL[1].repeat(2), ALL[1].repeat(2), torch.tensor([0.0, 1, 0, 1, 1, 0], dtype=DOUBLE)
        ),
        lambda: (
            sum(
                co.losses.pair_bce(X, Y, ALL[1], ALL[1], torch.tensor(label, dtype=DOUBLE))
                for label in ([0.0, 1, 0], [1.0, 1, 0])
            )
            / 2
        ),
    ),
    "maxsim_pairs": (
        lambda: co.ops.maxsim_pairs(X[:, None], Y[:, None], (ALL[1].repeat(2), ALL[1].repeat(2))),
        lambda: co.ops.maxsim_pairs(X[:, None], Y[:, None], (ALL[1], ALL[1])).repeat(2),
    ),
    "route": (
        lambda: routed(torch.tensor([[4, 1, 4], [2, 2, 2], [0, -1, 0]])),
        lambda: routed(torch.tensor([[4, 1, -1], [2, -1, -1], [0, -1, -1]])),
    ),
    "mine_hard_negatives": (lambda: mined(TWICE), lambda: mined((ONCE[0], torch.tensor([4, 1, 8])))),
    "mine_hard_negatives tables": (lambda: mined(TABLE_TWICE), lambda: mined(TABLE_ONCE)),
    "mine_hard_negatives excluding": (
        lambda: mined(ALL[1], pairs=Pairs(exclude=TWICE), rules=NegativeRules(near_duplicate=30.0)),
        lambda: mined(ALL[1], pairs=Pairs(exclude=ONCE), rules=NegativeRules(near_duplicate=30.0)),
    ),
    "HardNegatives": (
        lambda: written(TABLE_TWICE, (torch.tensor([0, 2, 3, 4]), torch.tensor([2, 2, 5, 6]))),
        lambda: written(TABLE_ONCE, (torch.tensor([0, 1, 2, 3]), torch.tensor([2, 5, 6]))),
    ),
    "MemoryBank": (
        lambda: collapse(bank(torch.arange(4)).topk(X, 9), bank(torch.arange(4)).ids).indices[:, :5],
        lambda: collapse(bank(torch.arange(5, 9)).topk(X, 9), torch.arange(9) % 5).indices[:, :5],
    ),
    "hubness": (
        lambda: metrics.hubness(torch.tensor([[4, 1, 4], [1, 1, -1], [8, 8, 4]]), 9),
        lambda: metrics.hubness(torch.tensor([[4, 1, -1], [1, -1, -1], [8, 4, -1]]), 9),
    ),
    "retrieval_metrics": (
        lambda: list(metrics.retrieval_metrics(torch.tensor([[4, 4, 1]] * 3), TWICE).values()),
        lambda: list(metrics.retrieval_metrics(torch.tensor([[4, 1, -1]] * 3), ONCE).values()),
    ),
    "collapse": (lambda: collapse(TABLE_TWICE), lambda: TABLE_ONCE),
    "first_of_each": (
        lambda: first_of_each(TABLE_TWICE),
        lambda: torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool(),
    ),
    "margin_mse": (
        lambda: co.losses.margin_mse(X, Y[:3], mask=first_of_each(TABLE_TWICE).repeat(1, 2), reduction="none"),
        lambda: co.losses.margin_mse(
            X[:, [0, 1, 3, 4]],
            Y[:3, [0, 1, 3, 4]],
            mask=first_of_each(TABLE_TWICE)[:, :2].repeat(1, 2),
            reduction="none",
        ),
    ),
}


def test_every_function_with_lists_of_indices_is_here():
    takes = {
        name
        for name, thing in public().items()
        if any(LIST_OF_INDICES.search(text) for text in arguments(thing).values()) and not issubclass_of_results(thing)
    }
    assert takes - {"HardNegatives"} <= {name.split(" ")[0] for name in LISTS}, takes


def issubclass_of_results(thing):
    return inspect.isclass(thing) and issubclass(thing, tuple)


@pytest.mark.parametrize("name", sorted({name.split(" ")[0] for name in LISTS}))
def test_a_sentence_says_what_a_repeat_does(name):
    thing = public()[name]
    members = [m for _, m in inspect.getmembers(thing, inspect.isfunction)] if inspect.isclass(thing) else []
    assert any(SENTENCE.search(inspect.getdoc(each) or "") for each in [thing, *members])


@pytest.mark.parametrize("name", LISTS)
def test_repeats(name):
    call, same = LISTS[name]
    if isinstance(same, str):
        with pytest.raises(ValueError, match=re.escape(same)):
            call()
        return
    torch.testing.assert_close(call(), same(), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "function",
    [co.losses.listwise_distillation, co.losses.pairwise_rank_distillation, co.losses.margin_mse]
    + [co.losses.listwise_cross_entropy],
)
def test_a_candidate_that_is_masked_as_a_repeat_is_not_there(function):
    ids = torch.tensor([[5, 7, 5, 9], [1, 1, 1, 2]])
    scores, teacher = X[:2, :4].clone().requires_grad_(), Y[:2, :4].abs()
    value = function(scores, teacher, mask=first_of_each(ids), reduction="none")
    alone = [function(scores[i : i + 1, kept], teacher[i : i + 1, kept]) for i, kept in enumerate(([0, 1, 3], [0, 3]))]
    torch.testing.assert_close(value, torch.stack(alone))


# ---- Any int64 is an id --------------------------------------------------------------------------------------------

# Ids of which sums, products by a width, 32-bit, 24-bit and 53-bit casts collide; none is -1.
ODD = torch.tensor(
    [
        0,
        1,
        -2,
        -3,
        -LAST - 1,
        -LAST,
        LAST,
        LAST - 1,
        1 << 24,
        (1 << 24) + 1,
        1 << 32,
        (1 << 32) + 1,
        -(1 << 32),
        1 << 53,
    ]
    + [(1 << 53) + 1, 1 << 62, (1 << 62) + 1, -(1 << 62), (1 << 31) - 1, -(1 << 31), -(1 << 31) - 1]
)
BATCH, COLUMNS = 24, 30
SMALL = torch.randint(-1, len(ODD), (COLUMNS,), generator=torch.Generator().manual_seed(2))


def odd(ids):
    """The same equalities, among other numbers."""
    return torch.where(ids < 0, -1, ODD[ids.clamp_min(0)])


def matrix(rows, seed):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


Q, K, V = matrix(BATCH, 3), matrix(COLUMNS, 4), matrix(BATCH, 5)
EVERY_FOLD = ("logsumexp", "max", "count", "sum_softplus")


def drawn(ids):
    """Random numbers belong to ids, so that only which rows share them is the same."""
    found = co.mine_hard_negatives(Q, K, torch.arange(BATCH), 3, sampling=Sampling("uniform", ids=(ids[:BATCH], ids)))
    return torch.stack([found.counts, (found.indices >= 0).sum(1), found.statistics["eligible"]])


IDS = {
    "Pairs": lambda ids, backend: [
        co.similarity_reduce(
            Q, K, reduce=EVERY_FOLD, dim=(0, 1), pairs=Pairs(**{rule: (ids[:BATCH], ids)}), backend=backend
        )[:2]
        for rule in ("differ", "same")
    ],
    "similarity_topk": lambda ids, backend: co.similarity_topk(
        Q, K, 5, pairs=Pairs(differ=(ids[:BATCH], ids)), backend=backend
    )[:3],
    "similarity_prefix": lambda ids, backend: ops.similarity_prefix(
        Q, K, dims=(4, 8), pairs=Pairs(differ=(ids[:BATCH], ids)), backend=backend
    )[:2],
    "sup_con": lambda ids, backend: losses.sup_con(Q, ids[:BATCH], K, ids, backend=backend),
    "multi_positive_info_nce": lambda ids, backend: losses.multi_positive_info_nce(
        Q, ids[:BATCH], K, ids, backend=backend
    ),
    "multi_positive_siglip": lambda ids, backend: losses.multi_positive_siglip(Q, K, ids[:BATCH], ids, backend=backend),
    "batch_hard_triplet": lambda ids, backend: losses.batch_hard_triplet(Q, ids[:BATCH], K, ids, backend=backend),
    "batch_semi_hard_triplet": lambda ids, backend: losses.batch_semi_hard_triplet(
        Q, ids[:BATCH], K, ids, target=torch.arange(BATCH), backend=backend
    ),
    "mined_info_nce": lambda ids, backend: losses.mined_info_nce(
        Q, V, K, 4, labels=ids[:BATCH], pairs=Pairs(differ=(ids[:BATCH], ids)), backend=backend
    ),
    "moco": lambda ids, backend: losses.moco(Q, V, K, labels=ids[:BATCH], queue_labels=ids, backend=backend),
    "ge2e": lambda ids, backend: losses.ge2e(Q, ids[:BATCH], backend=backend),
    "simctg": lambda ids, backend: losses.simctg(Q, ids[:BATCH], backend=backend),
    "vse": lambda ids, backend: losses.vse(Q, V, labels=ids[:BATCH], hardest=True, backend=backend),
    "isotropy": lambda ids, backend: metrics.isotropy(Q, ids[:BATCH]),
    "pair_recall": lambda ids, backend: torch.tensor(
        list(metrics.pair_recall(Q, K, ids[:BATCH], ids, backend=backend).values())
    ),
    "MemoryBank": lambda ids, backend: _bank_of(ids).topk(
        Q, 6, ids=ids[:BATCH], labels=ids.flip(0)[:BATCH], backend=backend
    )[:3],
    "mine_hard_negatives": lambda ids, backend: drawn(ids) if backend == "reference" else torch.zeros(1),
    "search": lambda ids, backend: mining.search(
        Q, K, 5, pairs=Pairs(same=(ids[:BATCH], ids)), block_rows=7, backend=backend
    )[:3],
    "collapse": lambda ids, backend: (
        collapse(torch.arange(COLUMNS).view(3, 10), torch.where(ids < 0, 5, ids)) == torch.where(ids < 0, 5, ids)[0]
    ),
    "first_of_each": lambda ids, backend: first_of_each(ids.view(3, 10)),
    "retrieval_metrics": lambda ids, backend: list(
        metrics.retrieval_metrics(ids.view(3, 10), (torch.tensor([0, 5, 5, 15]), ids.flip(0)[:15])).values()
    ),
}


def _bank_of(ids):
    memory = MemoryBank(COLUMNS, 8)
    memory.enqueue(K, ids, ids.roll(3))
    return memory


COMPARED = re.compile(
    r"equals nothing|is no label|the (labels|sample|sequence|text) of|ids? of|documents, the best first"
)
# Those that name rows of a table, which are checked against its size, or hand ids on to one above.
CHECKED = {
    "Sampling": "mine_hard_negatives",
    "route": "segments are rows of the metrics",
    "expert_choice": "segments are rows of the metrics",
    "TopKState": "Pairs",
    "UnigramSampler": "words are rows of the counts",
    "gist": "Pairs",
    "batch_contrastive": "Pairs, as in batch_hard_triplet",
    "lifted_structure": "Pairs, as in batch_hard_triplet",
}


def test_every_function_with_ids_is_here():
    takes = {
        name
        for name, thing in public().items()
        if any("int64" in text and COMPARED.search(text) for text in arguments(thing).values())
        and not issubclass_of_results(thing)
    }
    takes |= {name for name, thing in public().items() if "ids" in arguments(thing)}
    missing = takes - set(IDS) - set(CHECKED)
    by_pairs = {name for name in missing if "pairs" in arguments(public()[name])}
    assert not missing - by_pairs, missing - by_pairs


@pytest.mark.parametrize("name", IDS)
def test_any_int64_is_an_id(backend, name):
    """Ids of the same equalities give the same result, bit for bit, whatever numbers they are."""
    torch.testing.assert_close(
        IDS[name](odd(SMALL), backend), IDS[name](SMALL, backend), rtol=0, atol=0, equal_nan=True
    )


def test_columns_of_a_corpus_of_any_size():
    """Lists are sorted and merged as pairs: a key row * rows + column would wrap."""
    rows = LAST
    lists = torch.tensor([0, 3, 5, 8]), torch.tensor([rows - 1, 3, rows - 1, rows - 2, 0, 7, 7, 1 << 62])
    state = TopKState(X, 4, pairs=Pairs(exclude=lists), rows=rows)
    assert state._pairs.exclude[1].tolist() == [3, rows - 1, rows - 1, 0, rows - 2, 7, 7, 1 << 62]
    first, last = TopKState(X, 4, pairs=Pairs(exclude=lists)), TopKState(X, 4, pairs=Pairs(exclude=lists))
    first.update(Y, 0)
    last.update(Y, rows - 9)
    found = first.merge(last).finalize()
    excluded = [(3, rows - 1), (0, rows - 2), (7, 1 << 62)]
    for i, row in enumerate(found.indices.tolist()):
        allowed = [j for j in (*range(9), *range(rows - 9, rows)) if j not in excluded[i]]
        scores = {j: float(X[i] @ Y[j if j < 9 else j - (rows - 9)]) for j in allowed}
        assert row == sorted(allowed, key=lambda j: (-scores[j], j))[:4]


@pytest.mark.parametrize("base", [LAST, LAST - 5, LAST - 8])
def test_a_block_must_end_within_int64(base):
    with pytest.raises(
        ValueError, match=re.escape(f"TopKState: base_index must leave room for int64 indices, got {base}")
    ):
        TopKState(X, 4).update(Y, base)


def test_labels_of_segments_are_rows_of_the_metrics():
    with pytest.raises(
        ValueError, match=re.escape(f"route: segments must be numbers of rows of the metrics, got {LAST - 1}")
    ):
        co.route(X, 2, segments=torch.tensor([0, LAST - 1, 1]))


def test_helpers_against_sets():
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([ODD, torch.tensor([-1])])
    for count in (0, 1, 2, 60):
        row, index = (
            torch.randint(-2, 3, (count,), generator=generator),
            ids[torch.randint(0, len(ids), (count,), generator=generator)],
        )
        pairs = list(zip(row.tolist(), index.tolist(), strict=True))
        assert lists.first_of_pairs(row, index).tolist() == [p not in pairs[:i] for i, p in enumerate(pairs)]
        kept = lists.distinct_pairs(row, index)
        assert list(zip(kept[0].tolist(), kept[1].tolist(), strict=True)) == sorted(set(pairs))
        order = lists.pair_order(row, index)
        assert [pairs[i] for i in order] == sorted(pairs)
        ranks = lists.ranks(index, index[:2])
        assert torch.equal(ranks[0][:, None] == ranks[0], index[:, None] == index) and torch.equal(
            ranks[1], ranks[0][:2]
        )
