"""Dense formulas that many papers share, and the small inputs that calls and formulas share.

Calls and expressions of `papers.PAPERS` are evaluated with `inputs()`.
"""

import torch
import torch.nn.functional as F

DOUBLE = torch.float64
N, D = 7, 6
INF = torch.inf
eye = torch.eye(N, dtype=DOUBLE)
off = ~torch.eye(N, dtype=torch.bool)


def leaf(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=DOUBLE)).requires_grad_()


def share(*shape):
    return (torch.rand(*shape, dtype=DOUBLE) * 0.9 + 0.05).requires_grad_()


def index(high, *shape):
    return torch.randint(high, shape)


def inputs():
    """Names to tensors: what may learn, what does not, labels and ids."""
    learned = {name: leaf(N, D) for name in "xyz"}
    learned |= {
        "scale": torch.tensor(3.7, dtype=DOUBLE).requires_grad_(),
        "bias": torch.tensor(-2.0, dtype=DOUBLE).requires_grad_(),
    }
    learned |= {"weight": share(N), "grades": share(N), "logits": leaf(20, 5), "lp": leaf(3, N)}
    learned |= {"anchors": leaf(3, D), "head": leaf(3, D), "head_bias": leaf(3), "attention": share(2, N, 30)}
    learned |= {"points": leaf(30, D), "pixels": leaf(25, D), "views": leaf(3 * N, D), "layers": leaf(N, 3, D)}
    learned |= {"hidden": leaf(3, 5, D), "vocabulary": leaf(20, D), "word_bias": leaf(20), "passages": leaf(2 * N, D)}
    learned |= {"private": leaf(N, 4, D), "other_private": leaf(N, 4, D), "scores": leaf(N, 6), "table": leaf(10, D)}
    learned |= {"table_bias": leaf(10), "some_tokens": leaf(3, 4, D), "other_tokens": leaf(3, 5, D)}
    learned |= {"lists": leaf(3, 2, 6, D), "query_weights": share(N, 4), "document_weights": share(2 * N, 6)}
    learned |= {f"words_{name}": share(N, 12) for name in "xyz"}
    near = torch.randn(1, D, dtype=DOUBLE) + 0.7 * torch.randn(N, D, dtype=DOUBLE)
    learned["near_rows"] = near.requires_grad_()
    numbers = {name: torch.randn(*shape, dtype=DOUBLE) for name, shape in NUMBERS.items()}
    chances = {name: torch.rand(*shape, dtype=DOUBLE) for name, shape in {"chances": (3, 4), "shares": (N, N)}.items()}
    bags = torch.rand(N, 10, dtype=DOUBLE) * (torch.rand(N, 10) < 0.4)
    bags[:, 0] += 0.1
    bags = bags / bags.sum(1, keepdim=True)
    filled = bags.nonzero()
    there = torch.rand(3, 5) < 0.7
    there[:, 0] = True
    chunks = torch.rand(N, 4) < 0.8
    chunks[:, 0] = True
    numbers |= {
        "dense_bags": bags,
        "bags": (F.pad((bags > 0).sum(1).cumsum(0), (1, 0)), filled[:, 1], bags[bags > 0]),
        "there": there,
        "chunks": chunks,
        "values": torch.tensor([0.0, 1, 2, 3, 1, 2, 5], dtype=DOUBLE),
        "signs": torch.randint(2, (11,)).double(),
        "graded": torch.randint(4, (N, 6)).double(),
        "square": torch.rand(N, N, dtype=DOUBLE),
    }
    return learned, numbers | chances | INTEGERS | {name: index(*spec) for name, spec in DRAWN.items()}


NUMBERS = {
    "noise": (20, 5), "ref": (3, N), "teacher": (N, D), "fixed": (N, D), "queue": (20, D), "corpus": (60, D),
    "wide_teacher": (N, 9), "teacher_scores": (N, 6), "expected": (10,), "candidates": (3, 4, D), "contexts": (3, 5, D),
    "documents": (N, 8, D), "list_scores": (3, 2), "sentence_scores": (3, 2, 3), "quads": (12, 2, 2),
}  # fmt: skip
INTEGERS = {
    "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0]),
    "some": torch.tensor([0, 0, 1, 1, 2, 3, 0]),
    "ids": torch.tensor([0, 0, 1, 2, 2, 3, 4]),
    "sequences": torch.tensor([0, 0, 0, 1, 1, 1, 2]),
    "sets": torch.tensor([0, 0, 0, 1, 1, 1, 1]),
    "queue_sets": torch.arange(20) % 3,
    "modality": torch.arange(20) % 3 // 2,
    "view_ids": torch.arange(N).repeat(3),
    "permutation": torch.tensor([3, 0, 4, 6, 1, 2, 5]),
    "point_ids": torch.arange(30) % 7,
    "pixel_ids": torch.arange(25) % 6,
    "padded": (torch.arange(2 * N) % 4 == 1).long(),
    "words": torch.tensor([[1, 2, 3, 4, 5], [6, 7, -100, -100, -100], [0, 19, 3, 3, -100]]),
}
DRAWN = {
    "first": (20, N), "context": (10, N), "drawn": (10, N, 4), "path_rows": (N, 11), "path_nodes": (10, 11),
    "positives": (60, N), "query_words": (12, N, 4), "document_words": (12, 2 * N, 6),
    "some_words": (6, 3, 4), "other_words": (6, 3, 5),
}  # fmt: skip


# ---- What many papers share ------------------------------------------------------------------------------------------


def unit(x):
    return F.normalize(x, dim=-1)


def cos(x, *columns):
    return unit(x) @ unit(torch.cat(columns)).T


def equal(ids, others=None):
    return ids[:, None] == (ids if others is None else others)


def info(logits, target=None, **options):
    return F.cross_entropy(logits, torch.arange(len(logits)) if target is None else target, **options)


def both(logits, **options):
    return (info(logits, **options) + info(logits.T, **options)) / 2


def lse(logits, keep):
    return logits.masked_fill(~keep, -INF).logsumexp(1)


def sign_losses(logits):
    return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits)


def ntx(a, b, temperature, norm=True, drop=None):
    z = torch.cat([a, b])
    s = (cos(z, z) if norm else z @ z.T) / temperature
    rows, n = torch.arange(2 * len(a)), len(a)
    dropped = torch.zeros_like(s, dtype=torch.bool) if drop is None else drop.clone()
    dropped[rows, rows] = True
    dropped[rows, rows.roll(n)] = False
    return F.cross_entropy(s.masked_fill(dropped, -INF), rows.roll(n))


def supcon(x, y, positive, temperature):
    log_p = (cos(x, y) / temperature).log_softmax(1)
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()


def supcon_self(x, labels, temperature, rows=None):
    itself = torch.eye(len(x), dtype=torch.bool)
    log_p = (cos(x, x) / temperature).masked_fill(itself, -INF).log_softmax(1)
    positive = equal(labels) & ~itself
    has = positive.any(1) if rows is None else rows & positive.any(1)
    return -(log_p.masked_fill(~positive, 0).sum(1)[has] / positive.sum(1)[has]).mean()


def decoupled(x, y, labels, of_columns, temperature, with_itself=False):
    s, found = cos(x, y) / temperature, []
    for i in range(len(x)):
        others = s[i][of_columns != labels[i]].logsumexp(0)
        for j in range(len(y)):
            if of_columns[j] == labels[i] and not (with_itself and i == j):
                found.append(torch.logaddexp(s[i, j], others) - s[i, j])
    return torch.stack(found).mean()


def align(x, y):
    return (unit(x) - unit(y)).square().sum(1).mean()


def uniform(x, queue=None, t=2.0):
    distances = [torch.pdist(unit(x))]
    if queue is not None:
        distances.append((unit(x)[:, None] - unit(queue)).norm(dim=2).flatten())
    return torch.cat(distances).square().mul(-t).exp().mean().log()


def hadsell(distance, labels, margin):
    return torch.where(labels == 1, distance**2, (margin - distance).relu() ** 2).mean() / 2


def kl(x, y):
    return (x.softmax(1)[:, None] * (x.log_softmax(1)[:, None] - y.log_softmax(1))).sum(2)


def own_and_queue(x, y, queue, temperature, **options):
    s = torch.cat([(x * y).sum(1, keepdim=True), x @ queue.T], 1) / temperature
    return F.cross_entropy(s, torch.zeros(N, dtype=torch.int64), **options)


def maxsims(q, d):
    return torch.einsum("nad,mbd->nmab", q, d).amax(3)


def own_maxsims(q, lists):
    return torch.einsum("nad,nkbd->nkab", q, lists).amax(3).sum(2)


def sgns(x, table, context, drawn, expected):
    own, others = (x * table[context]).sum(1), (x[:, None] * table[drawn]).sum(2)
    if isinstance(expected, torch.Tensor):
        own, others = own - expected[context], others - expected[drawn]
    return -(F.logsigmoid(own) + F.logsigmoid(-others).sum(1)).sum()


def similar(x, y, extra, threshold):
    return F.pad((cos(x, y) > threshold) & off, (0, extra))
