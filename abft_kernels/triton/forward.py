"""Fused forward: flash attention that also sums, per row, the probabilities of each group of keys.

With scores s in base 2 (scale·log2(e)·q·k, soft-capped and biased where asked for) and running m = max s, per block
of keys

    p = 2^(s − m_new)      α = 2^(m_old − m_new)
    l ← l·α + Σ p          acc ← acc·α + p V          mass_g ← mass_g·α + Σ_j p_j w_jg

and at the end out = acc / l, mass = mass / l, lse = (m + log2 l)·ln 2; a sink is one more score, met last, in l
alone. Dropout zeroes elements of the p that meets V. w_jg is the indicator of group g, or the key's weight in it.
The sum for mass uses the float32 p, not the rounded one that meets V: at mass 0.999 bfloat16 rounding alone would
exceed 1 − mass. Blocks of keys without a label, and tiles without a wanted row, skip the mass sums; blocks that
every row sees whole skip the masking. Without V there is the mass alone.

Packed sequences share one batch: a tile of rows lies within one sequence (`locate_packed`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.triton import rows as row_kernel
from abft_kernels.triton.common import (
    UNSPECIALIZED,
    load_tile,
    locate,
    locate_packed,
    matmul,
    one_head,
    rounded,
    scatter,
    store_tile,
)
from abft_kernels.triton.descriptors import forms_of, load_described, tiles_of, with_scratch
from abft_kernels.triton.labelled import defer, index_labels, labelled_masses
from abft_kernels.triton.labels import add_masses, any_label, key_labels, sample_labels
from abft_kernels.triton.launch import decodes, launch_config, serves
from abft_kernels.triton.masks import any_key, block_start, key_phases, keys_and_queries, phase_range, seen_keys
from abft_kernels.triton.softmax import (
    LN2,
    base2_scores,
    dropout_keep,
    finish,
    head_dropout,
    head_scores,
    seeded_dropout,
    softmax_step,
)
from abft_kernels.triton.structs import (
    Dropout,
    HeadCounts,
    Heads,
    Scores,
    Sequences,
    Shape,
    Sizes,
    features,
    head_tile,
    seed_halves,
)


@triton.jit
def _forward_block(
    acc, l_i, m_i, mass, q, k_rows, v_rows, start_n, offs_m, rows, keys, labels, scores, dropout,
    F: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return acc, l, m and mass after one block of keys."""
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    offs_n = start_n + tl.arange(0, BLOCK_N)
    cols = offs_n[None, :]
    k = load_tile(k_rows, start_n, offs_n, tl.arange(0, BLOCK_D), keys.start, keys.end, F.head_dim, MASKED)
    s, factor, _ = base2_scores(scores, q, k, rows, cols, F)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        s = tl.where(seen_keys(rows, cols, keys, F, False), s, float("-inf"))
    p, alpha, m_i, l_i = softmax_step(s, factor, m_i, l_i, MASKED)
    if F.v:
        acc = acc * alpha[:, None]
        v = load_tile(v_rows, start_n, offs_n, tl.arange(0, BLOCK_DV), keys.start, keys.end, F.head_dim_v, MASKED)
        kept = p
        if F.dropout:
            kept = tl.where(dropout_keep(dropout, offs_m[:, None], cols), p * dropout.scale, 0.0)
        acc = matmul(rounded(kept, v.dtype), v, acc)
    if F.groups > 0:
        mass = mass * alpha[:, None]
        if F.specialized or any_label(labels, start_n, F):
            mass = add_masses(mass, p, labels, offs_n, keys, F)
    return acc, l_i, m_i, mass


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _mass_attn_fwd_kernel(
    q, k, v, out, mass, lse, labels, row_mask, sinks, scores, dropout, seed_low, seed_high, sequences, counts,
    n_q, n_k, offset, num_tiles, num_sequences, F: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    GROUPS: tl.constexpr = F.groups + F.deferred
    GROUPS_PAD: tl.constexpr = F.groups_pad
    # Causal rows grow with their index: longest first evens out the tail.
    if F.packed:
        at = locate_packed(sequences, num_sequences, counts.heads, num_tiles, n_q, BLOCK_M)
    else:
        at = locate(counts.heads, num_tiles, BLOCK_M, True)
    shape = Shape(counts.heads, counts.group_size, n_q, n_k, offset)
    offs_m = at.start + tl.arange(0, BLOCK_M)
    keys, queries = keys_and_queries(sequences, at.sequence, shape, F)
    rows = (offs_m + shape.offset)[:, None]
    own = (offs_m >= queries.first) & (offs_m < queries.limit)
    off_hk = at.h // shape.group_size
    kv_heads = counts.heads // counts.group_size
    k_tiles = tiles_of(k, at.b, kv_heads, keys.start, keys.end, BLOCK_N, F.head_dim, F.descriptors)
    k_rows = one_head(k, at.b, off_hk, k_tiles)
    v_rows = k_rows
    if F.v:
        v_tiles = tiles_of(v, at.b, kv_heads, keys.start, keys.end, BLOCK_N, F.head_dim_v, F.descriptors)
        v_rows = one_head(v, at.b, off_hk, v_tiles)
    wanted = own
    active = 1
    if F.row_mask:
        wanted = tl.load(row_mask + at.b * shape.n_q + offs_m, mask=own, other=0) != 0
        active = tl.max(wanted.to(tl.int32), 0)
    labels = sample_labels(labels, at.b, shape.n_k, active, F)
    scores = head_scores(scores, at.bh, F)
    dropout = head_dropout(seeded_dropout(dropout, seed_low, seed_high, F), at.bh)
    q_rows, offs_d = one_head(q, at.b, at.h), tl.arange(0, BLOCK_D)
    if F.specialized:
        tile = load_described(q_rows, at.start, queries.first, queries.limit, BLOCK_M, F.head_dim)
    else:
        tile = load_tile(q_rows, at.start, offs_m, offs_d, queries.first, queries.limit, F.head_dim, True)
    phases = key_phases(at.start, keys, queries, F)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BLOCK_M, GROUPS_PAD], dtype=tl.float32)
    for MASKED in tl.static_range(F.specialized, 2):
        begin, end = phase_range(phases, MASKED)
        for block in tl.range(
            begin,
            end,
            1 if MASKED else F.block_n,
            num_stages=F.masked_stages if MASKED else None,
            warp_specialize=F.specialized,
        ):
            start = block_start(block, phases, F.block_n, MASKED)
            acc, l_i, m_i, sums = _forward_block(
                acc, l_i, m_i, sums, tile, k_rows, v_rows, start, offs_m, rows, keys, labels, scores, dropout, F, MASKED
            )

    if F.deferred > 0:
        sums = labelled_masses(m_i, tile, k_rows, phases, rows, keys, labels, scores, F)
    # A NaN sum is a present row: it must show.
    present = own & any_key(offs_m + shape.offset, keys, F) & ~(l_i == 0.0)
    acc, sums, lse2 = finish(acc, sums, m_i, l_i, present, sinks, at.h, True, F.sinks)
    limit_out = shape.n_q
    if F.packed:  # rows after the sequence are another tile's
        limit_out = at.limit
    written = offs_m < limit_out
    row_base = at.bh * shape.n_q
    tl.store(lse + row_base + offs_m, lse2 * LN2, mask=written)
    if GROUPS > 0:
        if F.row_mask:
            sums = tl.where(wanted[:, None], sums, 0.0)
        scatter(mass + (row_base + offs_m) * GROUPS, 1, sums, written, GROUPS)
    if F.v:
        out_rows, offs_dv = one_head(out, at.b, at.h), tl.arange(0, BLOCK_DV)
        store_tile(out_rows, at.start, offs_m, offs_dv, limit_out, acc, F.head_dim_v)


def forward(q: Tensor, k: Tensor, v: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel; return output `(B, H, N_q, D_v)` (empty without v), mass `(B, H, N_q, G)`, LSE
    `(B, H, N_q)`."""
    batch, heads, n_q, _ = q.shape
    kv_heads, n_k, groups = k.shape[1], k.shape[2], call.num_groups
    shape = (batch, n_q, heads, 0 if v is None else v.shape[3])
    out = torch.empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    mass = torch.empty((batch, heads, n_q, groups), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, mass, lse
    of_table = (head_tile(q, v), q.element_size(), groups, q.device)
    few = v is not None and not call.packed and call.row_mask is None and call.dropout_p == 0
    if few and decodes(n_q, heads // kv_heads, n_k) and serves("decode", *of_table):
        # Positions may not be negative: they are counted from row 0, which stands at `row_offset`.
        positions = torch.arange(n_q, device=q.device, dtype=torch.int32).expand(batch, -1)
        row_kernel.forward_into(out, mass, lse, q, k, v, positions, call._replace(key_offset=-call.row_offset))
        return out, mass, lse
    in_loop, forms = call.loop_groups(groups), forms_of(q, k, v)
    if in_loop < groups:  # products after the loop, which producer and consumer warps cannot share
        forms = forms._replace(specialized=False)
    launch = launch_config("forward", head_tile(q, v), q.element_size(), in_loop, q.device, forms)
    sizes = Sizes.of(call, n_q, n_k).tiled(call, n_q, launch.block_m)
    inputs = (Heads.of(q), Heads.of(k), Heads.of(v), Heads.of(out))
    of = defer(features(q, v, call, launch, groups, sinks=call.sinks is not None, specialized=launch.specialized), call)
    labels = index_labels(call, groups) if of.deferred else key_labels(call, groups, launch.block_n)
    chosen = (labels, call.row_mask, call.sinks, Scores.of(call), Dropout.of(call))
    of_call = (*seed_halves(call), Sequences.of(call), HeadCounts(heads, heads // kv_heads))
    run = with_scratch(_mass_attn_fwd_kernel[(sizes.num_tiles * batch * heads,)], launch, q.device)
    run(*inputs, mass, lse, *chosen, *of_call, *sizes, of, **launch.options)
    return out, mass, lse
