"""A decode step of grouped-query attention in one kernel: from the partial sums of the first product to what the second
one reads.

As in `attention.py`, heads that share keys share a program, and a row's pages are cut into spans that run at the same
time. Every program turns the queries that it needs itself; the one whose span ends with the newest token also makes
that token's key and value, and leaves them in the cache. Whoever ends last joins the spans, in their order: so nobody
waits for a kernel of its own, and the result does not depend on who that was.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl

from kernels.attention import HEADS_PER_PROGRAM, SPLITS, join_spans, span_of
from kernels.launch import let_next_start, overlap, prefetch, wait_for_previous
from kernels.norm import add_parts
from kernels.quant import allocate, emit, emitted
from kernels.reference import Form, Formed


@triton.jit
def turned_heads(
    parts_ptr, at, across, part, inside, w, w_across, cos, sin, eps,
    PARTS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Heads `[N, D]` of the columns `at`, normed and turned; `across` are the columns of each value's partner in the
    other half."""
    zero = tl.zeros(at.shape, dtype=tl.float32)
    x = add_parts(zero, parts_ptr, at, part, inside, PARTS).to(dtype).to(tl.float32)
    y = add_parts(zero, parts_ptr, across, part, inside, PARTS).to(dtype).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = (x * scale * w).to(dtype).to(tl.float32)
        y = (y * scale * w_across).to(dtype).to(tl.float32)
    return (x * cos + y * sin).to(dtype)


@triton.jit
def gqa_decode_kernel(
    parts_ptr, q_norm_ptr, k_norm_ptr, rope_ptr, slots_ptr, cache_ptr, pages_ptr, lengths_ptr, acc_ptr, top_ptr,
    total_ptr, arrived_ptr, plain_ptr, q_ptr, s_ptr, parts_part, parts_row, keys_at, values_at, pages_row, heads,
    kv_heads, scale, eps,
    PARTS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    TEAM: tl.constexpr, BLOCKS: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, PLAIN: tl.constexpr,
    FP8: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One span of a row, for up to BLOCK_H heads that share keys; the last of a team of TEAM key-value heads writes the
    outputs of all its heads, in blocks of 128 columns."""
    row, split = tl.program_id(0), tl.program_id(2)
    per_group = heads // kv_heads
    blocks = tl.cdiv(per_group, BLOCK_H)
    group, member = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    head = group * per_group + member
    d, t = tl.arange(0, BLOCK_D), tl.arange(0, PAGE)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    half: tl.constexpr = DIM // 2
    real, d_across, angle = d < DIM, (d + half) % DIM, row * DIM + d % half
    length, slot = tl.load(lengths_ptr + row), tl.load(slots_ptr + row)
    span = span_of(length, PAGE, SPLITS)
    first = split * span
    page = tl.load(pages_ptr + row * pages_row + tl.minimum(first, length - 1) // PAGE).to(tl.int64)
    cache_row = 2 * kv_heads * DIM
    if PDL:  # the first page's lines, as far as they are not in the L2 cache yet
        line = cache_ptr + ((page * PAGE + t)[:, None] * 2 * kv_heads + group) * DIM
        line += tl.minimum(tl.arange(0, BLOCK_D // 16) * 16, DIM - 1)[None, :]
        prefetch(line)
        prefetch(line + kv_heads * DIM)
    cos = tl.load(rope_ptr + angle, mask=real, other=0.0)[None, :]
    sin = tl.load(rope_ptr + angle + half, mask=real, other=0.0)
    sin = tl.where(d < half, -sin, sin)[None, :]
    w, w_across, k_w, k_w_across = cos, cos, cos, cos
    if NORM:
        w = tl.load(q_norm_ptr + d, mask=real, other=0.0).to(tl.float32)[None, :]
        w_across = tl.load(q_norm_ptr + d_across, mask=real, other=0.0).to(tl.float32)[None, :]
        k_w = tl.load(k_norm_ptr + d, mask=real, other=0.0).to(tl.float32)[None, :]
        k_w_across = tl.load(k_norm_ptr + d_across, mask=real, other=0.0).to(tl.float32)[None, :]
    wait_for_previous(PDL)
    let_next_start(PDL)
    if first >= length:
        return
    inside = (member < per_group)[:, None] & real[None, :]
    column = row.to(tl.int64) * parts_row + head[:, None] * DIM
    q = turned_heads(
        parts_ptr, column + d[None, :], column + d_across[None, :], parts_part, inside, w, w_across, cos, sin, eps,
        PARTS, NORM, DIM, dtype,
    )  # fmt: skip
    top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    if first + span >= length:  # the newest token is this span's last
        at = row.to(tl.int64) * parts_row + group * DIM
        k_new = turned_heads(
            parts_ptr, at + keys_at + d[None, :], at + keys_at + d_across[None, :], parts_part, real[None, :],
            k_w, k_w_across, cos, sin, eps, PARTS, NORM, DIM, dtype,
        )  # fmt: skip
        v_new = tl.zeros((1, BLOCK_D), dtype=tl.float32)
        v_new = add_parts(v_new, parts_ptr, at + values_at + d[None, :], parts_part, real[None, :], PARTS).to(dtype)
        kept = cache_ptr + (slot * 2 * kv_heads + group) * DIM + d[None, :]
        tl.store(kept, k_new, mask=real[None, :])
        tl.store(kept + kv_heads * DIM, v_new, mask=real[None, :])
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale
        total += 1.0
        acc += v_new.to(tl.float32)
    for start in tl.range(first, tl.minimum(first + span, length - 1), PAGE):
        following = tl.minimum(start + PAGE, length - 1) // PAGE
        next_page = tl.load(pages_ptr + row * pages_row + following).to(tl.int64)  # on its way one turn early
        seen = start + t < length - 1
        mask = seen[:, None] & real[None, :]
        keys = cache_ptr + (page * PAGE + t)[:, None] * cache_row + group * DIM + d[None, :]
        k = tl.load(keys, mask=mask, other=0.0)
        v = tl.load(keys + kv_heads * DIM, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(dtype), v, input_precision="ieee")
        top, page = new_top, next_page
    place = (row * heads + head).to(tl.int64) * SPLITS + split
    tl.store(top_ptr + place, top, mask=member < per_group)
    tl.store(total_ptr + place, total, mask=member < per_group)
    tl.store(acc_ptr + place[:, None] * DIM + d[None, :], acc, mask=inside)
    tl.debug_barrier()  # all of it is there before this program is counted
    team, teams = group // TEAM, tl.cdiv(kv_heads, TEAM)
    active = tl.cdiv(length, span)
    others = tl.minimum(kv_heads - team * TEAM, TEAM) * blocks * active - 1
    if tl.atomic_add(arrived_ptr + row * teams + team, 1, sem="acq_rel") != others:
        return
    tl.store(arrived_ptr + row * teams + team, 0)
    width, begin = heads * DIM, team * TEAM * per_group * DIM
    cols = begin + tl.arange(0, BLOCKS * 128)
    which = row * heads + tl.minimum(cols, width - 1) // DIM
    y = join_spans(acc_ptr, top_ptr, total_ptr, which, cols % DIM, active, DIM, SPLITS, BLOCKS * 128, 4)
    y = tl.reshape(y.to(dtype).to(tl.float32), (BLOCKS, 128))
    block = tl.arange(0, BLOCKS)
    cols = begin + block[:, None] * 128 + tl.arange(0, 128)[None, :]
    mine = cols < tl.minimum(begin + TEAM * per_group * DIM, width)
    emit(
        y, row.to(tl.int64) * width + cols, mine, row * (width // 128) + begin // 128 + block,
        begin + block * 128 < tl.minimum(begin + TEAM * per_group * DIM, width),
        plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0,
    )  # fmt: skip


@cache
def _arrived(device: torch.device) -> torch.Tensor:
    """Counts of programs that have ended: zero between any two kernels, since the last one of a team resets its own."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def gqa_decode(
    parts, starts, norms, rope, slots, cache, pages, lengths, form: Form, heads: int, scale: float, eps: float
) -> Formed:
    (count, rows, _), dim = parts.shape, rope.shape[-1] * 2
    kv_heads, device = cache.shape[-1] // 2 // dim, cache.device
    per_group = heads // kv_heads
    team = 128 // gcd(128, per_group * dim)  # so many key-value heads have whole blocks of 128 columns
    blocks = triton.next_power_of_2(triton.cdiv(team * per_group * dim, 128))
    acc = torch.empty(rows, heads, SPLITS, dim, dtype=torch.float32, device=device)
    top, total = torch.empty(2, rows, heads, SPLITS, dtype=torch.float32, device=device)
    out = allocate(form, rows, heads * dim, cache[:0])
    pointers, flags = emitted(form, out, cache)
    q_norm, k_norm = norms or (cache, cache)
    gqa_decode_kernel[(rows, kv_heads * triton.cdiv(per_group, HEADS_PER_PROGRAM), SPLITS)](
        parts, q_norm, k_norm, rope, slots, cache, pages, lengths, acc, top, total, _arrived(device), *pointers,
        *parts.stride()[:2], starts[1], starts[2], pages.stride(0), heads, kv_heads, scale, eps,
        PARTS=count, NORM=norms is not None, DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_H=HEADS_PER_PROGRAM, TEAM=team, BLOCKS=blocks, PAGE=cache.shape[1], SPLITS=SPLITS, **flags,
        num_stages=2, num_warps=4, **overlap(parts),
    )  # fmt: skip
    return out
