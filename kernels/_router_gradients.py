"""The derivative of a router's scores: one program has a block of tokens, as in _router_scores.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._router_scores import INV_SQRT_2_PI, SIGMOID, chances_of_choice, distribution, read_logits, sigmoid, softmax


@triton.jit
def _through_softmax(p, d_p):
    """Gradient by the logits of a softmax p."""
    return p * (d_p - tl.sum(p * d_p, 1)[:, None])


@triton.jit
def _upstream(table, label, real, expert, E, SEGMENTED: tl.constexpr):
    """Gradients of the sums that each token is part of."""
    if SEGMENTED:
        at = label[:, None] * E + expert[None, :]
        value = tl.load(table + at, mask=(label >= 0)[:, None] & real, other=0.0)
    else:
        value = tl.load(table + expert, mask=expert < E, other=0.0)[None, :]
    return value


@triton.jit
def _d_gate(experts, d_gates, gate, token, live, expert, K: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Gradients of all gates, of those that were not chosen 0."""
    d_gate, times = tl.zeros_like(gate), tl.zeros_like(gate)
    for j in range(K):
        at = token * K + j
        picked = tl.load(experts + at, mask=live, other=-1).to(tl.int32)
        hit = expert[None, :] == picked[:, None]
        d_gate += tl.where(hit, tl.load(d_gates + at, mask=picked >= 0, other=0.0)[:, None], 0.0)
        times += hit.to(tl.float32)
    if RENORMALIZE:
        total = tl.sum(tl.where(times > 0, times * gate, 0.0), 1)
        safe = tl.where(total == 0, 1.0, total)
        mean = tl.sum(tl.where(times > 0, d_gate * gate, 0.0), 1) / safe
        d_gate = tl.where(times > 0, (d_gate - times * mean[:, None]) / safe[:, None], 0.0)
        d_gate = tl.where((total == 0)[:, None], 0.0, d_gate)
    return d_gate


@triton.jit(do_not_specialize=["T", "segments"])
def scores_backward_kernel(
    logits, noise, allowed, segment, valid, experts, d_gates, d_sums, d_totals, dlogits,
    T, E, segments, sigma, logits_stride, allowed_row_stride, allowed_stride,
    K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, LOAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Gradient by the logits of everything that the scores gave, from one read of the logits."""
    expert = tl.arange(0, E_PAD)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = token < T
    z, noisy, blocked, live = read_logits(
        logits, noise, allowed, valid, token, is_token, expert, E, sigma, logits_stride, allowed_row_stride,
        allowed_stride
    )  # fmt: skip
    segments = segments.to(tl.int64)
    cells, real = segments * E, (expert < E)[None, :]
    label = tl.zeros_like(token)
    if segment is not None:
        label = tl.load(segment + token, mask=live, other=-1)
        label = tl.where(label < segments, label, -1)
    d_lse_squared = tl.load(d_totals + label, mask=label >= 0, other=0.0)
    d_entropy = tl.load(d_totals + segments + label, mask=label >= 0, other=0.0)

    share, log_p, lse = softmax(z, blocked)
    p = share
    if SCORE == SIGMOID:
        p, log_p = distribution(z, blocked, SCORE)
    surprise = log_p - tl.sum(p * log_p, 1)[:, None]
    d_p = _upstream(d_sums, label, real, expert, E, segment is not None)
    dz = _through_softmax(p, d_p) - d_entropy[:, None] * p * surprise
    if SCORE == SIGMOID:
        dz = dz * sigmoid(-z)
    dz += (2 * d_lse_squared * lse)[:, None] * share

    noisy_p = p
    if noise is not None:
        noisy_p, _ = distribution(noisy, blocked, SCORE)
        d_noisy = _through_softmax(noisy_p, _upstream(d_sums + cells, label, real, expert, E, segment is not None))
        if SCORE == SIGMOID:
            d_noisy = d_noisy * sigmoid(-noisy)
        dz += d_noisy
    if SCORE == SIGMOID:
        gate = tl.where(blocked, 0.0, sigmoid(noisy))
        dz += _d_gate(experts, d_gates, gate, token, live, expert, K, RENORMALIZE) * gate * (1.0 - gate)
    else:
        dz += _through_softmax(noisy_p, _d_gate(experts, d_gates, noisy_p, token, live, expert, K, RENORMALIZE))
    if LOAD:
        last = tl.load(experts + token * K + (K - 1), mask=live, other=-1).to(tl.int32)
        u, _certain, none = chances_of_choice(z, noisy, blocked, last, expert, sigma)
        d_chance = _upstream(d_sums + 2 * cells, label, real, expert, E, segment is not None)
        part = tl.where(none, 0.0, d_chance * tl.exp(-0.5 * u * u) * (INV_SQRT_2_PI / sigma))
        # The threshold is a logit itself: that of the last choice.
        dz += part - tl.where(expert[None, :] == last[:, None], tl.sum(part, 1)[:, None], 0.0)
    dz = tl.where(blocked | (live == 0)[:, None], 0.0, dz)
    tl.store(dlogits + token[:, None] * E + expert[None, :], dz, mask=is_token[:, None] & real)
