"""What a pair of probabilities, a student's q and a teacher's p, adds to a divergence, and the derivative of that.

The formulas are those of reference/similarity_distill.py: sums of terms that are never negative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastive_ops.reference.similarity_distill import KINDS

from ._folds import finite_or_zero
from ._stored import exp

KL = tl.constexpr(KINDS.index("kl"))
REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))
CE = tl.constexpr(KINDS.index("ce"))
JS = tl.constexpr(KINDS.index("js"))
HUBER = tl.constexpr(KINDS.index("huber"))
DISTANCE = tl.constexpr(KINDS.index("distance"))


@triton.jit
def log1p(u):
    """log(1 + u) with its relative accuracy where u is small: 2 atanh(u / (2 + u))."""
    s = u / (2.0 + u)
    q = s * s
    small = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11))))))
    near = tl.abs(u) < 0.5
    return tl.where(near, small, tl.log(1.0 + u))


@triton.jit
def excess(d):
    """exp(d) - 1 - d with its relative accuracy where |d| < 1/2."""
    more = 1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040 + d * (1 / 40320 + d * (1 / 362880)))))
    return d * d * (1 / 2 + d * (1 / 6 + d * more))


@triton.jit
def expm1(d):
    """exp(d) - 1 with its relative accuracy where d is small."""
    near = tl.abs(d) < 0.5
    small = tl.where(near, d, 0.0)
    return tl.where(near, small + excess(small), exp(d) - 1.0)


@triton.jit
def log_probability(z, top, log):
    """Logarithms of the probabilities of a line."""
    return (z - finite_or_zero(top)) - log


@triton.jit
def kl(log_p, log_q):
    """p (exp(d) - 1 - d) with d = log q - log p."""
    p, q = exp(log_p), exp(log_q)
    d = tl.where((p == 0) & (q == 0), 0.0, log_q - log_p)
    near = tl.abs(d) < 0.5
    return tl.where(near, p * excess(tl.where(near, d, 0.0)), q - p - tl.where(p == 0, 0.0, p * d))


@triton.jit
def js(log_p, log_q):
    """(p log(p / m) + q log(q / m)) / 2 with m = (p + q) / 2."""
    p, q = exp(log_p), exp(log_q)
    total = p + q
    r = (q - p) / tl.where(total == 0, 1.0, total)
    near = tl.abs(r) < 0.25
    square = tl.where(near, r * r, 0.0)
    low, high = 1.0 - tl.abs(r), 1.0 + tl.abs(r)
    # ((1 + r) log(1 + r) + (1 - r) log(1 - r)) / 2 by powers of r^2 up to 1/16.
    more = 1 / 30 + square * (1 / 56 + square * (1 / 90 + square * (1 / 132 + square * (1 / 182))))
    small = square * (1 / 2 + square * (1 / 12 + square * more))
    far = 0.5 * (high * tl.log(high) + low * tl.log(tl.where(low > 0, low, 1.0)))
    return 0.5 * total * tl.where(near, small, far)


@triton.jit
def half_log_share(log_p, log_q):
    """log(q / m) / 2, 0 where q is 0."""
    p, q = exp(log_p), exp(log_q)
    more = expm1(log_q - log_p)
    far = tl.log(tl.where(q == 0, 1.0, 2.0 * q / tl.where(q == 0, 1.0, p + q)))
    near = tl.abs(more) < 0.5
    some = tl.where(near, more, 0.0)
    return 0.5 * tl.where(near, log1p(some / (some + 2.0)), far)


@triton.jit
def divergence(log_p, log_q, KIND: tl.constexpr):
    """What each pair adds to the divergence of the student q from the teacher p."""
    if KIND == KL:
        found = kl(log_p, log_q)
    elif KIND == REVERSE_KL:
        found = kl(log_q, log_p)
    elif KIND == JS:
        found = js(log_p, log_q)
    else:
        p = exp(log_p)
        found = tl.where(p == 0, 0.0, -p * tl.where(p == 0, 0.0, log_q))
    return found


@triton.jit
def divergence_slope(log_p, log_q, mean, KIND: tl.constexpr):
    """The derivative of a line's divergence by the student's logits."""
    q = exp(log_q)
    if KIND != REVERSE_KL and KIND != JS:
        d = log_q - log_p
        near = tl.abs(d) < 0.5
        found = tl.where(near, exp(log_p) * expm1(tl.where(near, d, 0.0)), q - exp(log_p))
    else:
        of_pair = half_log_share(log_p, log_q) if KIND == JS else log_q - log_p
        found = tl.where(q == 0, 0.0, q * (of_pair - mean))
    return found


@triton.jit
def distance(square):
    """Square roots, 0 where rounding has made a square negative, and for -inf."""
    positive = (square > 0) | (square != square)
    return tl.where(positive, tl.sqrt(tl.where(positive, square, 1.0)), 0.0)


@triton.jit
def between(s, t, delta, KIND: tl.constexpr):
    """What each pair of distances adds."""
    found = distance(s)
    if KIND == HUBER:
        gap = tl.abs(found - distance(t))
        found = tl.where(gap <= delta, gap * gap * 0.5, delta * (gap - delta * 0.5))
    return found


@triton.jit
def between_slope(s, t, delta, KIND: tl.constexpr):
    """The derivative of that by the student's squared distance."""
    student = distance(s)
    slope = tl.zeros_like(student) + 1.0
    if KIND == HUBER:
        gap = student - distance(t)
        slope = tl.where(gap != gap, gap, tl.minimum(tl.maximum(gap, -delta), delta))
    return tl.where(student == 0, 0.0, slope / (2.0 * tl.where(student == 0, 1.0, student)))
