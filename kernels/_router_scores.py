"""Scores of a router and their derivative: one program has a block of tokens, one row of a tile a token.

A tile has E_PAD columns, the next power of two of E; those beyond E are blocked like experts that a token must not
choose. Logits of blocked experts are -inf, their probabilities and gates 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
INF = tl.constexpr(float("inf"))
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# As in contrastive_ops/core/routing.py.
SIGMOID = tl.constexpr(1)
TOP2 = tl.constexpr(0)


# ---- One block of tokens -------------------------------------------------------------------------------------------


@triton.jit
def read_logits(
    logits, noise, allowed, valid, token, is_token, expert, E, sigma, logits_stride, allowed_row_stride, allowed_stride
):
    """Logits without and with noise, which experts are blocked, and which tokens are routed.

    A token that is not routed has zeros, so that no -inf or NaN of it enters a sum; one that is not valid is not read.
    """
    live = is_token
    if valid is not None:
        live = live & (tl.load(valid + token, mask=is_token, other=0) != 0)
    real = (expert < E)[None, :]
    inside = live[:, None] & real
    z = tl.load(logits + token[:, None] * logits_stride + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    blocked = z == -INF
    if allowed is not None:
        at = token[:, None] * allowed_row_stride + expert.to(tl.int64)[None, :] * allowed_stride
        blocked = blocked | (tl.load(allowed + at, mask=inside, other=0) == 0)
    live = live & (tl.max((inside & (blocked == 0)).to(tl.int32), 1) > 0)
    blocked = (blocked & live[:, None]) | (expert >= E)[None, :]
    z = tl.where(blocked, -INF, tl.where(live[:, None], z, 0.0))
    noisy = z
    if noise is not None:
        drawn = tl.load(noise + token[:, None] * E + expert[None, :], mask=live[:, None] & (blocked == 0), other=0.0)
        noisy = tl.where(blocked, -INF, z + sigma * drawn)
    return z, noisy, blocked, live


@triton.jit
def softmax(z, blocked):
    """Softmax of each row, its logarithm, and the logsumexp."""
    most = tl.max(z, 1)
    term = tl.exp(z - most[:, None])
    # A row with +inf has a logsumexp, but no probabilities.
    total = tl.sum(tl.where(z == INF, 1.0, term), 1)
    log_total = tl.log(total)
    nothing = tl.where(most == INF, most - most, 0.0)
    p = tl.where(blocked, 0.0, term / total[:, None] + nothing[:, None])
    log_p = tl.where(blocked, 0.0, z - most[:, None] - log_total[:, None] + nothing[:, None])
    return p, log_p, most + log_total


@triton.jit
def distribution(z, blocked, SCORE: tl.constexpr):
    """A token's distribution over the experts: softmax, or sigmoids that are scaled to sum to 1; and its logarithm."""
    if SCORE == SIGMOID:
        # As a softmax of their logarithms, which does not divide 0 by 0.
        log_sigmoid = tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))
        p, log_p, _ = softmax(tl.where(blocked, -INF, log_sigmoid), blocked)
    else:
        p, log_p, _ = softmax(z, blocked)
    return p, log_p


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _normal_cdf(u):
    """As in csrc/cpu/expert_scores.h: density times a polynomial in 1 / (1 + 0.3 |u|), relative error 3e-7."""
    t = tl.abs(u)
    w = 1.0 / (1.0 + 0.3 * t)
    tail = w * -0.021055348 + 0.11473752
    tail = tail * w - 0.2335104
    tail = tail * w + 0.19867313
    tail = tail * w - 0.08498841
    tail = tail * w + 0.099044755
    tail = tail * w + 0.077429526
    tail = tail * w + 0.110432126
    tail = tail * w + 0.11954933
    tail = tail * w + 0.11968778
    tail = tail * w * tl.exp(-0.5 * t * t)
    return tl.where(u > 0, 1.0 - tail, tail)


@triton.jit
def _keys(noisy, gate, bias, blocked, expert, E):
    """What experts are chosen by: -inf for those that must not be, the lowest number for NaN."""
    keys = noisy
    if gate is not None:
        keys = gate
    if bias is not None:
        keys = keys + tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
    keys = tl.where(keys == keys, keys, LOWEST)
    return tl.where(blocked, -INF, keys)


@triton.jit
def _best(keys):
    """The largest key of each row and its column, the first of equal ones; -1 where all are -inf."""
    most, at = tl.max(keys, 1, return_indices=True, return_indices_tie_break_left=True)
    return most, tl.where(most > -INF, at, -1)


@triton.jit
def _keep_best_groups(
    keys, expert, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_SCORE: tl.constexpr,
    G_PAD: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """The keys with -inf in all but the best groups of experts."""
    group = tl.arange(0, G_PAD)[None, :]
    values = tl.full([BLOCK_T, G_PAD], -INF, tl.float32)
    of_expert = (expert // MEMBERS)[None, :]
    for g in range(GROUPS):
        own = tl.where(of_expert == g, keys, -INF)
        value, at = _best(own)
        if GROUP_SCORE == TOP2:
            second = tl.max(tl.where(expert[None, :] == at[:, None], -INF, own), 1)
            # Two experts with NaN must not make a group that has none.
            value = tl.where(second > -INF, tl.maximum(value + second, LOWEST), value)
        values = tl.where(group == g, value[:, None], values)
    kept = of_expert < tl.zeros([BLOCK_T, 1], tl.int32)
    for _ in range(KEPT):
        _most, at = _best(values)
        kept = kept | (of_expert == at[:, None])
        values = tl.where(group == at[:, None], -INF, values)
    return tl.where(kept, keys, -INF)


@triton.jit
def _margin(p, ONE_EXPERT: tl.constexpr):
    """The difference of the two largest probabilities; NaN where one of them is."""
    total = tl.sum(p, 1)
    if ONE_EXPERT:
        margin = total
    else:
        first = tl.max(p, 1)
        is_first = p == first[:, None]
        rest = tl.max(tl.where(is_first, 0.0, p), 1)
        second = tl.where(tl.sum(is_first.to(tl.int32), 1) > 1, first, rest)
        margin = first - second + 0.0 * total
    return margin


@triton.jit
def chances_of_choice(z, noisy, blocked, last, expert, sigma):
    """Distance above a token's last choice in standard deviations of the noise, and where there is none."""
    threshold = tl.sum(tl.where(expert[None, :] == last[:, None], noisy, 0.0), 1)
    # With fewer eligible experts than choices, each of them is chosen for certain.
    certain = last < 0
    none = blocked | certain[:, None]
    return tl.where(none, 0.0, (z - threshold[:, None]) / sigma), certain, none


# ---- Sums over tokens ----------------------------------------------------------------------------------------------


@triton.jit
def _add_row(table, values, own, expert, E):
    """Add up the tokens of one segment, and that to a row of a table, in float64, that this program alone writes."""
    at, inside = table + expert, expert < E
    tl.store(at, tl.load(at, mask=inside) + tl.sum(tl.where(own[:, None], values, 0), 0), mask=inside)


@triton.jit
def _add_totals(totals, a, b, c, own, segments):
    """The same for three numbers of each token, which lie `segments` apart."""
    i = tl.arange(0, 4)
    a, b, c = tl.where(own, a, 0.0), tl.where(own, b, 0.0), tl.where(own, c, 0.0)
    sums = tl.where(i == 0, tl.sum(a, 0), tl.where(i == 1, tl.sum(b, 0), tl.sum(c, 0)))
    at = totals + i.to(tl.int64) * segments
    tl.store(at, tl.load(at, mask=i < 3) + sums, mask=i < 3)


@triton.jit
def _settle(table, values, expert, E, is_first):
    """Add up tokens, and that to a row of a table, which has nothing at first."""
    at, inside = table + expert, expert < E
    tl.store(at, tl.load(at, mask=inside & (is_first == 0), other=0.0) + tl.sum(values, 0), mask=inside)


@triton.jit
def _settle_number(at, values, is_first):
    """The same for a number of each token."""
    tl.store(at, tl.load(at, mask=is_first == 0, other=0.0) + tl.sum(values, 0))


@triton.jit
def _clear(sums, counts, expert, E, segments, SECOND: tl.constexpr, THIRD: tl.constexpr):
    """Zeros in the tables of this program, each written by the threads that will add to it."""
    i = tl.arange(0, 4)
    cells = segments * E
    for s in range(segments):
        inside = expert < E
        tl.store(sums + s * E + expert, tl.zeros_like(expert).to(tl.float32), mask=inside)
        if SECOND:
            tl.store(sums + cells + s * E + expert, tl.zeros_like(expert).to(tl.float32), mask=inside)
        if THIRD:
            tl.store(sums + 2 * cells + s * E + expert, tl.zeros_like(expert).to(tl.float32), mask=inside)
        tl.store(counts + s * E + expert, tl.zeros_like(expert), mask=inside)
        tl.store(sums + 3 * cells + s + i.to(tl.int64) * segments, tl.zeros_like(i).to(tl.float32), mask=i < 3)
        tl.store(counts + cells + s, 0)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "segments", "steps"])
def scores_kernel(
    logits, noise, bias, allowed, given, segment, valid,
    experts, gates, priority, sums, counts,
    T, E, segments, steps, sigma, logits_stride, allowed_row_stride, allowed_stride,
    K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, LOAD: tl.constexpr, MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_SCORE: tl.constexpr, ONE_EXPERT: tl.constexpr,
    E_PAD: tl.constexpr, K_PAD: tl.constexpr, G_PAD: tl.constexpr, BLOCK_T: tl.constexpr, SETTLED: tl.constexpr
):  # fmt: skip
    """Choices and gates of `steps` blocks of tokens, and this program's row of `sums` and `counts`.

    A row of sums, in float64, has three tables (segments, E) and three numbers of each segment: p, noisy p, chances;
    squared lse, entropy, margin. A row of counts has one table and one number of each segment: choices; tokens.

    Args:
        SETTLED: blocks that are added up in float32 before they are added to the row.
    """
    part = tl.program_id(0).to(tl.int64)
    expert, choice = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    segments = segments.to(tl.int64)
    cells = segments * E
    if segment is not None:
        sums += part * 3 * (cells + segments)
        counts += part * (cells + segments)
        _clear(sums, counts, expert, E, segments, noise is not None, LOAD)
    else:
        # Added up element by element, so that threads seldom meet.
        sums += part * 3 * (cells + segments)
        counts += part * (cells + segments)
        sum_p = tl.zeros([BLOCK_T, E_PAD], tl.float32)
        sum_noisy_p, sum_chance = tl.zeros_like(sum_p), tl.zeros_like(sum_p)
        sum_times = tl.zeros([BLOCK_T, E_PAD], tl.int32)
        sum_lse = tl.zeros([BLOCK_T], tl.float32)
        sum_entropy, sum_margin = tl.zeros_like(sum_lse), tl.zeros_like(sum_lse)
        sum_live = tl.zeros([BLOCK_T], tl.int32)
    for step in range(steps):
        token = (part * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = token < T
        z, noisy, blocked, live = read_logits(
            logits, noise, allowed, valid, token, is_token, expert, E, sigma, logits_stride, allowed_row_stride,
            allowed_stride
        )  # fmt: skip
        p, log_p, lse = softmax(z, blocked)
        if SCORE == SIGMOID:  # of the logits themselves only the logsumexp is wanted
            p, log_p = distribution(z, blocked, SCORE)
        noisy_p = p
        if noise is not None:
            noisy_p, _ = distribution(noisy, blocked, SCORE)
        gate = noisy_p
        if SCORE == SIGMOID:
            gate = tl.where(blocked, 0.0, sigmoid(noisy))
        entropy = -tl.sum(p * log_p, 1)
        margin = _margin(p, ONE_EXPERT)

        if given is None:
            # Logits are in the order of their scores, and have not been rounded once more.
            keys = _keys(noisy, gate if bias is not None or GROUPS > 1 else None, bias, blocked, expert, E)
            if GROUPS > 1:
                keys = _keep_best_groups(keys, expert, MEMBERS, GROUPS, KEPT, GROUP_SCORE, G_PAD, BLOCK_T)
        picks = tl.full([BLOCK_T, K_PAD], -1, tl.int32)
        weights = tl.zeros([BLOCK_T, K_PAD], tl.float32)
        times = tl.zeros([BLOCK_T, E_PAD], tl.int32)
        last = tl.full([BLOCK_T], -1, tl.int32)
        for j in range(K):
            if given is not None:
                last = tl.load(given + token * K + j, mask=live, other=-1).to(tl.int32)
            else:
                _most, at = _best(keys)
                last = tl.where(live, at, -1)
            hit = expert[None, :] == last[:, None]
            if given is None:
                keys = tl.where(hit, -INF, keys)
            times += hit.to(tl.int32)
            here = choice[None, :] == j
            picks = tl.where(here, last[:, None], picks)
            weights = tl.where(here, tl.sum(tl.where(hit, gate, 0.0), 1)[:, None], weights)
        first = tl.sum(tl.where(choice[None, :] == 0, weights, 0.0), 1)
        if RENORMALIZE:
            total = tl.sum(weights, 1)
            weights = tl.where((total == 0)[:, None], 0.0, weights / tl.where(total == 0, 1.0, total)[:, None])
        tl.store(priority + token, first, mask=is_token)
        at, inside = token[:, None] * K + choice[None, :], is_token[:, None] & (choice < K)[None, :]
        tl.store(experts + at, picks.to(tl.int64), mask=inside)
        tl.store(gates + at, weights, mask=inside)

        chance = p
        if LOAD:
            u, certain, _none = chances_of_choice(z, noisy, blocked, last, expert, sigma)
            chance = tl.where(blocked, 0.0, tl.where(certain[:, None], 1.0, _normal_cdf(u)))
        if segment is None:
            own = live[:, None]
            sum_p += tl.where(own, p, 0.0)
            if noise is not None:
                sum_noisy_p += tl.where(own, noisy_p, 0.0)
            if LOAD:
                sum_chance += tl.where(own, chance, 0.0)
            sum_times += times
            sum_lse += tl.where(live, lse * lse, 0.0)
            sum_entropy += tl.where(live, entropy, 0.0)
            sum_margin += tl.where(live, margin, 0.0)
            sum_live += live.to(tl.int32)
            if (step % SETTLED == SETTLED - 1) | (step == steps - 1):
                is_first = step < SETTLED
                _settle(sums, sum_p, expert, E, is_first)
                sum_p = tl.zeros_like(sum_p)
                if noise is not None:
                    _settle(sums + cells, sum_noisy_p, expert, E, is_first)
                    sum_noisy_p = tl.zeros_like(sum_noisy_p)
                if LOAD:
                    _settle(sums + 2 * cells, sum_chance, expert, E, is_first)
                    sum_chance = tl.zeros_like(sum_chance)
                _settle_number(sums + 3 * cells, sum_lse, is_first)
                _settle_number(sums + 3 * cells + 1, sum_entropy, is_first)
                _settle_number(sums + 3 * cells + 2, sum_margin, is_first)
                sum_lse = tl.zeros_like(sum_lse)
                sum_entropy, sum_margin = tl.zeros_like(sum_lse), tl.zeros_like(sum_lse)
                tl.debug_barrier()
        else:
            label = tl.load(segment + token, mask=is_token, other=-1)
            left = live & (label >= 0) & (label < segments)
            while tl.max(left.to(tl.int32), 0) > 0:  # once for each segment that is in the block
                s = tl.min(tl.where(left, label, segments), 0)
                own = left & (label == s)
                table = sums + s * E
                _add_row(table, p, own, expert, E)
                if noise is not None:
                    _add_row(table + cells, noisy_p, own, expert, E)
                if LOAD:
                    _add_row(table + 2 * cells, chance, own, expert, E)
                _add_row(counts + s * E, times, own, expert, E)
                _add_totals(sums + 3 * cells + s, lse * lse, entropy, margin, own, segments)
                tl.store(counts + cells + s, tl.load(counts + cells + s) + tl.sum(own.to(tl.int32), 0))
                left = left & (label != s)
                tl.debug_barrier()
    if segment is None:
        tl.store(counts + expert, tl.sum(sum_times, 0), mask=expert < E)
        tl.store(counts + cells, tl.sum(sum_live, 0))


@triton.jit(do_not_specialize=["parts", "segments"])
def totals_kernel(
    sums, counts, out_sums, out_totals, out_margin, out_choices, out_tokens, parts, segments, E,
    NOISE: tl.constexpr, LOAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Add up the rows of all programs in their order; tables that were not asked for are 0."""
    column = (tl.program_id(0) // 2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
    segments = segments.to(tl.int64)
    cells = segments * E
    if tl.program_id(0) % 2 == 0:
        width = 3 * (cells + segments)
        wanted = column < width
        if not NOISE:
            wanted = wanted & ((column < cells) | (column >= 2 * cells))
        if not LOAD:
            wanted = wanted & ((column < 2 * cells) | (column >= 3 * cells))
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
        for part in range(0, parts, BLOCK_P):
            at = (part + row) * width + column[None, :]
            total += tl.load(sums + at, mask=(part + row < parts) & wanted[None, :], other=0.0).to(tl.float64)
        value = tl.sum(total, 0).to(tl.float32)
        tl.store(out_sums + column, value, mask=column < 3 * cells)
        other = column - 3 * cells
        tl.store(out_totals + other, value, mask=(other >= 0) & (other < 2 * segments))
        tl.store(out_margin + other - 2 * segments, value, mask=(other >= 2 * segments) & (other < 3 * segments))
    else:
        width = cells + segments
        number = tl.zeros([BLOCK_P, BLOCK_C], tl.int64)
        for part in range(0, parts, BLOCK_P):
            at = (part + row) * width + column[None, :]
            number += tl.load(counts + at, mask=(part + row < parts) & (column < width)[None, :], other=0)
        count = tl.sum(number, 0)
        tl.store(out_choices + column, count, mask=column < cells)
        tl.store(out_tokens + column - cells, count, mask=(column >= cells) & (column < width))
