"""Scores and the online softmax in base 2: soft cap, ALiBi, sinks, dropout, and what ends a row."""

import triton
import triton.language as tl

from abft_kernels.triton.common import matmul
from abft_kernels.triton.structs import Dropout, Scores

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """Compute tanh to about one unit in the last place: by its series near 0, where the exponential form cancels."""
    square = x * x
    series = 62.0 / 2835 * square - 17.0 / 315
    series = x + x * square * (((series * square + 2.0 / 15) * square) - 1.0 / 3)
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -far, far))


@triton.jit
def head_scores(scores, bh, F: tl.constexpr):
    """Return the scores of one head, with its slope."""
    slope2 = 0.0
    if F.slopes:
        slope2 = tl.load(scores.slope + bh) * LOG2E
    return Scores(scores.factor, scores.softcap2, slope2)


@triton.jit
def base2_scores(scores, a, b, rows, cols, F: tl.constexpr):
    """Return scores a·bᵀ, the factor that takes them to base 2, and the soft cap's tanh, which their gradient needs.

    a is the tile of queries and b that of keys, or the other way round, which transposes the scores. `rows`
    (positions) and `cols` broadcast: `[rows, 1]` and `[1, keys]`, or transposed. The factor is left to the caller
    because the multiplication then costs nothing: s·factor − m is one instruction.
    """
    s = matmul(a, tl.trans(b), None)
    capped = s
    factor = scores.factor
    if F.softcap:
        capped = _tanh(s * scores.factor)
        s = capped * scores.softcap2
        factor = 1.0
    if F.slopes:
        s = s * factor - scores.slope * tl.abs(rows - cols).to(tl.float32)
        factor = 1.0
    return s, factor, capped


@triton.jit
def probabilities(scores, a, b, rows, cols, lse2, F: tl.constexpr):
    """Return 2^(s − lse2) of the scores a·bᵀ, unmasked, and the soft cap's tanh."""
    s, factor, capped = base2_scores(scores, a, b, rows, cols, F)
    return tl.exp2(s * factor - lse2), capped


@triton.jit
def softmax_step(s, factor, m_i, l_i, MASKED: tl.constexpr):
    """Return p, α, m and l after a block of scores."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
    shift = m_new
    if MASKED:
        # A row that has seen no key yet keeps m = −inf; 2^(−inf − 0) = 0 without a NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def finish(acc, mass, m_i, l_i, present, sinks, heads, in_range, SINKS: tl.constexpr):
    """Return output, mass and LSE in base 2 of rows; those not present get 0, 0 and −inf.

    A sink is one more score of each row's head, met last, in l alone.
    """
    if SINKS:
        sink = tl.load(sinks + heads, mask=in_range, other=0.0).to(tl.float32) * LOG2E
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        mass = mass * alpha[:, None]
        acc = acc * alpha[:, None]
        m_i = m_new
    l_i = tl.where(present, l_i, 1.0)
    acc = tl.where(present[:, None], acc / l_i[:, None], 0.0)
    mass = tl.where(present[:, None], mass / l_i[:, None], 0.0)
    return acc, mass, tl.where(present, m_i + tl.log2(l_i), float("-inf"))


@triton.jit
def seeded_dropout(dropout, seed_low, seed_high, F: tl.constexpr):
    """Return the dropout with its seed of 64 bits."""
    seed = seed_low
    if F.dropout:
        seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    return Dropout(dropout.threshold, dropout.scale, seed, 0)


@triton.jit
def head_dropout(dropout, bh):
    """Return the dropout of one head: its random numbers are a stream of their own."""
    return Dropout(dropout.threshold, dropout.scale, dropout.seed, bh.to(tl.int32))


@triton.jit
def dropout_keep(dropout, rows, cols):
    """Return which probabilities dropout keeps; the counter is (key, row index, stream), whatever the tiles."""
    zeros = (rows + cols) * 0
    bits, _, _, _ = tl.philox(dropout.seed, zeros + cols, zeros + rows, zeros + dropout.stream, zeros)
    return (bits >> 1).to(tl.int32) >= dropout.threshold
