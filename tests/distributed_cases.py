"""What ranks do in tests: their part of a batch, and how it differs from the single-process loss of all of it."""

import torch
import torch.distributed as dist

import contrastive_ops as co
from contrastive_ops import distributed

SIZES = {1: (9,), 2: (5, 9), 3: (5, 9, 2), 4: (6, 3, 8, 0)}


class Batch:
    """A batch of all ranks, in float64, and the part of one of them. Tensors by name: leaves, or fixed ones."""

    def __init__(self, rank, sizes, dtype=torch.float32):
        self.rank, self.sizes, self.dtype = rank, sizes, dtype
        self.total = sum(sizes)
        self.begin = sum(sizes[:rank])
        self.whole, self.part = {}, {}
        self.generator = torch.Generator().manual_seed(7)

    def rows(self, name, *shape, repeats=1):
        """A leaf with `repeats` rows for each of the batch."""
        whole = torch.randn(self.total * repeats, *shape, generator=self.generator, dtype=torch.float32)
        return self._leaf(name, whole.to(self.dtype), repeats)

    def fixed(self, whole, repeats=1):
        """(whole, part) of a tensor without a gradient."""
        return whole, self._cut(whole, repeats)

    def ids(self, high):
        """(whole, part) of random labels."""
        return self.fixed(torch.randint(-1, high, (self.total,), generator=self.generator))

    def number(self, name, value):
        """A leaf that is the same on all ranks."""
        self.whole[name] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        self.part[name] = torch.tensor(value, requires_grad=True)
        return self.whole[name], self.part[name]

    def positive(self, name):
        """A leaf with a number > 0 for each row."""
        return self._leaf(name, torch.rand(self.total, generator=self.generator) + 0.5)

    def _leaf(self, name, whole, repeats=1):
        self.whole[name] = whole.double().requires_grad_()
        self.part[name] = self._cut(whole, repeats).clone().requires_grad_()
        return self.whole[name], self.part[name]

    def _cut(self, whole, repeats=1):
        return whole[self.begin * repeats : (self.begin + self.sizes[self.rank]) * repeats]

    def errors(self, truth, share):
        """How far the mean over ranks and its gradients are from the truth, relative to the largest number of each."""
        expected = dict(zip(self.whole, torch.autograd.grad(truth, list(self.whole.values())), strict=True))
        found = dict(zip(self.part, torch.autograd.grad(share, list(self.part.values())), strict=True))
        ranks = len(self.sizes)
        errors = {"value": _distance(_mean(share.detach().clone()), truth.detach())}
        for name, gradient in found.items():
            if expected[name].dim() == 0:
                errors[name] = _distance(_mean(gradient.clone()), expected[name])
                continue
            repeats, among = len(expected[name]) // max(self.total, 1), expected[name]
            if name == "weight":  # (loss of the row - loss) / sum of weights, of two numbers that nearly cancel
                among = among.abs() + truth.detach().abs() / self.whole[name].detach().sum()
            errors[name] = _distance(gradient / ranks, self._cut(expected[name], repeats), among)
        return errors


def _mean(value):
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value / dist.get_world_size()


def _distance(found, expected, among=None):
    if not expected.numel():
        return 0.0
    largest = (expected if among is None else among).double().abs().max().clamp_min(1e-3)
    return float((found.double() - expected.double()).abs().max() / largest)


# ---- The losses ------------------------------------------------------------------------------------------------------


def clip_plain(b):
    (x, xp), (y, yp), (s, sp) = b.rows("image", 16), b.rows("text", 16), b.number("scale", 9.0)
    return co.clip, (x, y, {"scale": s}), (xp, yp, {"scale": sp})


def clip_rules(b):
    (x, xp), (y, yp), (s, sp) = b.rows("image", 16), b.rows("text", 16), b.number("scale", 9.0)
    (w, wp), (c, cp), (i, ip) = b.positive("weight"), b.positive("col_bias"), b.ids(5)
    (u, up), offset = b.fixed(torch.linspace(0.1, 0.5, b.total)), {"scale": s}
    whole = {"pairs": co.Pairs(differ=(i, i), diagonal=2, below=(u, (u + 0.1)[None])), "weight": w, "col_bias": c}
    part = {"pairs": co.Pairs(differ=(ip, ip), diagonal=2, below=(up, (up + 0.1)[None])), "weight": wp, "col_bias": cp}
    return co.clip, (x, y, {**whole, **offset}), (xp, yp, {**part, "scale": sp})


def clip_smoothed(b):
    (x, xp), (y, yp), (i, ip) = b.rows("image", 16), b.rows("text", 16), b.ids(5)
    common = {"label_smoothing": 0.1, "temperature": 0.2}
    return (
        co.clip,
        (x, y, {**common, "pairs": co.Pairs(same=(i, i))}),
        (xp, yp, {**common, "pairs": co.Pairs(same=(ip, ip))}),
    )


def clip_smoothed_everywhere(b):
    (x, xp), (y, yp) = b.rows("image", 16), b.rows("text", 16)
    common = {"label_smoothing": 0.1, "temperature": 0.2, "reduction": "sum"}
    return co.clip, (x, y, common), (xp, yp, common)


def info_nce_plain(b):
    (q, qp), (k, kp) = b.rows("query", 16), b.rows("key", 16)
    return co.info_nce, (q, k, {"temperature": 0.2}), (qp, kp, {"temperature": 0.2})


def info_nce_everything(b):
    (q, qp), (k, kp) = b.rows("query", 16), b.rows("key", 16)
    (r, rp), (w, wp), (s, sp) = b.rows("row_negatives", 2, 16), b.positive("weight"), b.positive("scale")
    (i, ip), common = b.ids(5), {"margin": 0.1, "label_smoothing": 0.1, "z_loss": 1e-2}
    whole = {"row_negatives": r, "weight": w, "scale": s, "pairs": co.Pairs(differ=(i, i)), **common}
    part = {"row_negatives": rp, "weight": wp, "scale": sp, "pairs": co.Pairs(differ=(ip, ip)), **common}
    return co.info_nce, (q, k, whole), (qp, kp, part)


def info_nce_negatives(b):
    (q, qp), (k, kp), (h, hp) = b.rows("query", 16), b.rows("key", 16), b.rows("negatives", 16, repeats=2)
    rules = {"pairs": co.Pairs(below=0.3), "negative_pairs": co.Pairs(above=-0.4)}  # two sets in one sweep
    common = {"temperature": 0.2, "label_smoothing": 0.2, **rules}
    return co.info_nce, (q, k, h, common), (qp, kp, hp, common)


def siglip_plain(b):
    (x, xp), (y, yp) = b.rows("image", 16), b.rows("text", 16)
    (s, sp), (o, op) = b.number("scale", 9.0), b.number("bias", -3.0)
    return co.siglip, (x, y, {"scale": s, "bias": o}), (xp, yp, {"scale": sp, "bias": op})


def siglip_rules(b):
    (x, xp), (y, yp), (w, wp), (c, cp) = b.rows("x", 16), b.rows("y", 16), b.positive("weight"), b.positive("col_bias")
    (i, ip) = b.ids(5)
    whole = {"weight": w, "col_bias": c, "pairs": co.Pairs(differ=(i, i), above=-0.4), "bias": -2.0}
    part = {"weight": wp, "col_bias": cp, "pairs": co.Pairs(differ=(ip, ip), above=-0.4), "bias": -2.0}
    return co.siglip, (x, y, whole), (xp, yp, part)


def clip_distances(b):
    (x, xp), (y, yp), (w, wp) = b.rows("image", 16), b.rows("text", 16), b.positive("weight")
    common = {"metric": "sqeuclidean", "temperature": 0.5, "normalize": False, "label_smoothing": 0.1}
    return co.clip, (x, y, {"weight": w, **common}), (xp, yp, {"weight": wp, **common})


def info_nce_distances(b):
    (q, qp), (k, kp), (h, hp) = b.rows("query", 16), b.rows("key", 16), b.rows("negatives", 16)
    (r, rp), (s, sp) = b.rows("row_negatives", 2, 16), b.number("scale", 2.0)
    common = {"metric": "sqeuclidean", "negative_pairs": co.Pairs(below=-0.3)}
    whole, part = ({"row_negatives": n, "scale": c, **common} for n, c in ((r, s), (rp, sp)))
    return co.info_nce, (q, k, h, whole), (qp, kp, hp, part)


def nt_xent_distances(b):
    (x, xp), (y, yp), (i, ip) = b.rows("z0", 16), b.rows("z1", 16), b.ids(5)
    common = {"metric": "sqeuclidean", "temperature": 0.5}
    whole, part = ({**common, "pairs": co.Pairs(differ=(j.repeat(2), j.repeat(2)))} for j in (i, ip))
    return co.nt_xent, (x, y, whole), (xp, yp, part)


def sup_con_distances(b):
    (x, xp), (l, lp), (s, sp) = b.rows("x", 16), b.ids(4), b.number("scale", 2.0)
    common = {"metric": "sqeuclidean", "normalize": False}
    return co.sup_con, (x, l, {"scale": s, **common}), (xp, lp, {"scale": sp, **common})


def nt_xent_plain(b):
    (x, xp), (y, yp), (s, sp) = b.rows("z0", 16), b.rows("z1", 16), b.number("scale", 4.0)
    return co.nt_xent, (x, y, {"scale": s}), (xp, yp, {"scale": sp})


def sup_con_plain(b):
    (x, xp), (i, ip), (s, sp) = b.rows("x", 16), b.ids(4), b.number("scale", 4.0)
    return co.sup_con, (x, i, {"scale": s}), (xp, ip, {"scale": sp})


def sup_con_log_mean(b):
    (x, xp), (i, ip), (w, wp), (c, cp) = b.rows("x", 16), b.ids(4), b.positive("weight"), b.positive("col_bias")
    common = {"positives": "log_mean", "temperature": 0.3}
    return (
        co.sup_con,
        (x, i, {"weight": w, "col_bias": c, **common}),
        (xp, ip, {"weight": wp, "col_bias": cp, **common}),
    )


def sup_con_columns(b):
    (x, xp), (i, ip), (y, yp), (j, jp) = b.rows("x", 16), b.ids(4), b.rows("y", 16), b.ids(4)
    common = {"temperature": 0.3}
    return co.sup_con, (x, i, y, j, common), (xp, ip, yp, jp, common)


def moco_shared(b):
    (q, qp), (k, kp), (w, wp) = b.rows("query", 16), b.rows("key", 16), b.positive("weight")
    queue = torch.randn(21, 16, generator=b.generator)
    return co.losses.moco, (q, k, queue.double(), {"weight": w}), (qp, kp, queue, {"weight": wp})


def moco_parts(b):
    (q, qp), (k, kp), (i, ip), (j, jp) = b.rows("query", 16), b.rows("key", 16), b.ids(5), b.ids(5)
    queue, part = b.fixed(torch.randn(b.total, 16, generator=b.generator))
    whole = {"labels": i, "queue_labels": j, "label_smoothing": 0.1}
    parts = {"labels": ip, "queue_labels": jp, "label_smoothing": 0.1, "shared_queue": False}
    return co.losses.moco, (q, k, queue.double(), whole), (qp, kp, part, parts)


def lists(b):
    """Lists of columns of all ranks that rows leave out, whole and of this rank."""
    columns = (torch.arange(b.total) * 3 + 1) % max(b.total, 1)
    whole, part = b.fixed(columns)
    return (torch.arange(b.total + 1), whole), (torch.arange(len(part) + 1), part)


def clip_hard(b):
    (x, xp), (y, yp), (s, sp), (e, ep) = b.rows("image", 16), b.rows("text", 16), b.number("scale", 9.0), lists(b)
    whole, part = ({"hardness": 0.5, "pairs": co.Pairs(exclude=each)} for each in (e, ep))
    return co.clip, (x, y, {"scale": s, **whole}), (xp, yp, {"scale": sp, **part})


def info_nce_hard(b):
    (q, qp), (k, kp), (r, rp) = b.rows("query", 16), b.rows("key", 16), b.rows("row_negatives", 2, 16)
    (o, op), common = b.positive("row_negative_bias"), {"hardness": 2.0, "temperature": 0.2}
    whole, part = ({"row_negatives": n, "row_negative_bias": c, **common} for n, c in ((r, o), (rp, op)))
    return co.info_nce, (q, k, whole), (qp, kp, part)


def info_nce_without_batch(b):
    (q, qp), (k, kp), (h, hp) = b.rows("query", 16), b.rows("key", 16), b.rows("negatives", 16)
    (w, wp), common = b.positive("weight"), {"label_smoothing": 0.2, "smooth": "others", "in_batch": False}
    common |= {"temperature": 0.2, "negative_pairs": co.Pairs(below=0.3)}
    return co.info_nce, (q, k, h, {"weight": w, **common}), (qp, kp, hp, {"weight": wp, **common})


def nt_xent_everything(b):
    (x, xp), (y, yp), (w, wp), (i, ip) = b.rows("z0", 16), b.rows("z1", 16), b.positive("weight"), b.ids(5)
    biases = [b.positive("bias0"), b.positive("bias1")]
    whole, part = (torch.cat([pair[place] for pair in biases]) for place in (0, 1))
    common = {"label_smoothing": 0.1, "smooth": "others", "temperature": 0.3}
    rules, own = (co.Pairs(differ=(each.repeat(2), each.repeat(2)), above=-0.4) for each in (i, ip))
    return (
        co.nt_xent,
        (x, y, {"weight": w, "col_bias": whole, "pairs": rules, **common}),
        (xp, yp, {"weight": wp, "col_bias": part, "pairs": own, **common}),
    )


def sup_con_rules(b):
    (x, xp), (i, ip), (e, ep) = b.rows("x", 16), b.ids(4), lists(b)
    whole, part = ({"pairs": co.Pairs(exclude=each, below=0.4), "temperature": 0.3} for each in (e, ep))
    return co.sup_con, (x, i, whole), (xp, ip, part)


def moco_everything(b):
    (q, qp), (k, kp), (c, cp) = b.rows("query", 16), b.rows("key", 16), b.positive("col_bias")
    queue, part = b.fixed(torch.randn(b.total, 16, generator=b.generator))
    common = {"label_smoothing": 0.1, "smooth": "others", "pairs": co.Pairs(below=0.3), "temperature": 0.2}
    whole, parts = {"col_bias": c, **common}, {"col_bias": cp, "shared_queue": False, **common}
    return co.losses.moco, (q, k, queue.double(), whole), (qp, kp, part, parts)


def gte_joint(b):
    (q, qp), (d, dp), (s, sp) = b.rows("query", 16), b.rows("document", 16), b.number("scale", 5.0)
    return co.losses.gte, (q, d, {"scale": s}), (qp, dp, {"scale": sp})


def gte_hard_negatives(b):
    (q, qp), (d, dp), (h, hp) = b.rows("query", 16), b.rows("document", 16), b.rows("negatives", 2, 16)
    (w, wp), (s, sp), (i, ip) = b.positive("weight"), b.positive("scale"), b.ids(5)
    common = {"false_negative_margin": 0.2}
    whole = {"weight": w, "scale": s, "pairs": co.Pairs(differ=(i, i)), **common}
    part = {"weight": wp, "scale": sp, "pairs": co.Pairs(differ=(ip, ip)), **common}
    return co.losses.gte, (q, d, h, whole), (qp, dp, hp, part)


def gte_per_direction(b):
    (q, qp), (d, dp) = b.rows("query", 16), b.rows("document", 16)
    common = {"partition": "per_direction", "directions": ("query_to_doc", "doc_to_query"), "temperature": 0.2}
    return co.losses.gte, (q, d, common), (qp, dp, common)


CASES = {
    case.__name__: case
    for case in (
        clip_plain,
        clip_rules,
        clip_smoothed,
        clip_smoothed_everywhere,
        clip_hard,
        clip_distances,
        info_nce_distances,
        info_nce_plain,
        info_nce_everything,
        info_nce_negatives,
        info_nce_hard,
        info_nce_without_batch,
        siglip_plain,
        siglip_rules,
        nt_xent_plain,
        nt_xent_distances,
        sup_con_distances,
        nt_xent_everything,
        sup_con_plain,
        sup_con_log_mean,
        sup_con_columns,
        sup_con_rules,
        gte_joint,
        gte_hard_negatives,
        gte_per_direction,
        moco_shared,
        moco_parts,
        moco_everything,
    )
}


def errors(rank, size, name, dtype, schedule):
    """The errors of one loss on one rank, and whether a repetition has the same bits."""
    b = Batch(rank, SIZES[size], dtype)
    function, (*whole, options), (*part, part_options) = CASES[name](b)
    shared = getattr(distributed, function.__name__)
    if not name.startswith("moco"):  # whose rows meet no rows of other ranks
        part_options = {**part_options, "schedule": schedule}
    share, again = (shared(*part, **part_options) for _ in range(2))
    leaves = list(b.part.values())
    gradients = [torch.autograd.grad(each, leaves, retain_graph=True) for each in (share, again)]
    same = torch.equal(share, again) and all(torch.equal(*each) for each in zip(*gradients, strict=True))
    return b.errors(function(*whole, **options), share), same


def measures(rank, size):
    """Diagnostics over ranks: the ranks of this one's rows, and means over those of all."""
    found = []
    for name in ("clip_plain", "clip_rules", "info_nce_negatives", "siglip_rules", "nt_xent_plain", *MOCO):
        for schedule in ("gather", "ring"):
            b = Batch(rank, SIZES[size])
            function, (*whole, options), (*part, part_options) = CASES[name](b)
            _, truth = function(*whole, **options, diagnostics=True)
            options = {**part_options, "schedule": schedule, "diagnostics": True}
            _, shown = getattr(distributed, function.__name__)(*part, **options)
            pairs = zip(shown, truth, strict=True) if isinstance(truth[0], tuple) else [(shown, truth)]
            for mine, of_all in pairs:
                here = slice(b.begin, b.begin + SIZES[size][rank])
                ranks = of_all.rank.view(-1, b.total)[:, here].flatten()  # of both views
                same = torch.equal(mine.rank, ranks)
                errors = [abs(float(mine[place]) - float(of_all[place])) for place in (0, 2, 3)]
                found.append((name, schedule, same, max(errors)))
    return found


MOCO = ("moco_shared", "moco_everything")
