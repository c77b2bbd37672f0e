"""Between the products of attention, in Triton: norms, rotary embedding, and what the cache is to keep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import KV, Form, Formed, Keep
from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.norm.add_norm import TRITON_DTYPE, add_parts
from kernels.quant.e4m3 import allocate, block_scale, emit, emitted, quantise


@triton.jit
def scale_place(slot, vector, vectors, PAGE: tl.constexpr):
    """Where the scale of a token's vector stands: those of a page's tokens lie side by side."""
    return (slot // PAGE * vectors + vector) * PAGE + slot % PAGE


def stored(kv: KV) -> tuple[tuple, dict]:
    """Pointers and flags of a cache that a kernel writes to."""
    scaled = kv.scales is not None
    pointers = (kv.values.view(torch.uint8), kv.scales) if scaled else (kv.values, kv.values)
    return pointers, {"SCALED": scaled, "PAGE": kv.page_size}


@triton.jit
def load_halves(ptr, i, DIM: tl.constexpr, NORM: tl.constexpr):
    """A norm's weights for both numbers that are turned together; zeros without NORM."""
    inside = (i < DIM // 2) & NORM
    a = tl.load(ptr + i, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(ptr + DIM // 2 + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rope_heads_kernel(
    parts_ptr, q_norm_ptr, k_norm_ptr, rope_ptr, slots_ptr, q_ptr, kv_ptr, scales_ptr, rows, parts_part, parts_row,
    keys_at, values_at, heads, kv_heads, eps,
    PARTS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    SCALED: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of TOKENS tokens, one after another with the same angles."""
    row = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (i < DIM // 2) & (row < rows)
    q_norm, k_norm = load_halves(q_norm_ptr, i, DIM, NORM), load_halves(k_norm_ptr, i, DIM, NORM)
    let_next_start(PDL)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=0)
    cos = tl.load(rope_ptr + row * DIM + i, mask=inside, other=0.0)
    sin = tl.load(rope_ptr + row * DIM + DIM // 2 + i, mask=inside, other=0.0)
    for h in tl.static_range(HEADS):
        rope_head(
            tl.program_id(1) * HEADS + h, row, i, inside & (tl.program_id(1) * HEADS + h < heads + 2 * kv_heads), cos,
            sin, slot, q_norm, k_norm, parts_ptr, q_ptr, kv_ptr, scales_ptr, rows, parts_part, parts_row,
            keys_at, values_at, heads, kv_heads, eps, PARTS, NORM, DIM, SCALED, PAGE,
        )  # fmt: skip


@triton.jit
def rope_head(
    head, row, i, inside, cos, sin, slot, q_norm, k_norm, parts_ptr, q_ptr, kv_ptr, scales_ptr, rows,
    parts_part, parts_row, keys_at, values_at, heads, kv_heads, eps,
    PARTS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, SCALED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A query, a key or a value; the last is neither normed nor turned."""
    half: tl.constexpr = DIM // 2
    is_query, is_value = head < heads, head >= heads + kv_heads
    column = head * DIM
    if is_value:
        column = values_at + (head - heads - kv_heads) * DIM
    elif head >= heads:
        column = keys_at + (head - heads) * DIM
    at = row * parts_row + column + i
    zero = tl.zeros(inside.shape, dtype=tl.float32)
    dtype = q_ptr.dtype.element_ty
    a = add_parts(zero, parts_ptr, at, parts_part, inside, PARTS).to(dtype).to(tl.float32)
    b = add_parts(zero, parts_ptr, at + half, parts_part, inside, PARTS).to(dtype).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / DIM + eps)[:, None]
        weight_a, weight_b = tl.where(is_query, q_norm[0], k_norm[0]), tl.where(is_query, q_norm[1], k_norm[1])
        a = tl.where(is_value, a, (a * scale * weight_a).to(dtype).to(tl.float32))
        b = tl.where(is_value, b, (b * scale * weight_b).to(dtype).to(tl.float32))
    x = tl.where(is_value, a, a * cos - b * sin).to(dtype)
    y = tl.where(is_value, b, a * sin + b * cos).to(dtype)
    q_at, kv_at = (row * heads + head) * DIM + i, (slot * 2 * kv_heads + head - heads) * DIM + i
    if SCALED:
        width = kv_heads * DIM  # of keys, and of values; the latter lie across their page
        page, token = slot // PAGE * (2 * PAGE * width), slot % PAGE
        kv_at, step = page + token * width + (head - heads) * DIM + i, 1
        if is_value:
            kv_at = page + (width + (head - heads - kv_heads) * DIM + i) * PAGE + token
            step = PAGE
        if is_query:
            tl.store(q_ptr + q_at, x, mask=inside)
            tl.store(q_ptr + q_at + half, y, mask=inside)
        else:
            a, b = x.to(tl.float32), y.to(tl.float32)
            scale = block_scale(tl.maximum(tl.max(tl.abs(a), axis=1), tl.max(tl.abs(b), axis=1))[:, None], False)
            there = (row < rows) & (head < heads + 2 * kv_heads)
            tl.store(scales_ptr + scale_place(slot, head - heads, 2 * kv_heads, PAGE), scale, mask=there)
            tl.store(kv_ptr + kv_at, quantise(a, scale), mask=inside)
            tl.store(kv_ptr + kv_at + half * step, quantise(b, scale), mask=inside)
    else:
        out = kv_ptr + kv_at
        if is_query:
            out = q_ptr + q_at
        tl.store(out, x, mask=inside)
        tl.store(out + half, y, mask=inside)


def at_once(rows: int) -> tuple[int, int]:
    """How many tokens and how many heads a program turns: of many rows each token's angles are read once for four
    heads, where few have to be spread over the card."""
    return (1, 1) if rows <= 64 else (4, 2) if rows <= 256 else (16, 4)


def rope_heads(parts, starts, norms, rope, slots, kv: KV, heads: int, eps: float, dtype: torch.dtype) -> torch.Tensor:
    (count, rows, _), dim = parts.shape, rope.shape[-1] * 2
    kv_heads = kv.width // 2 // dim
    q = torch.empty(rows, heads, dim, dtype=dtype, device=parts.device)
    q_norm, k_norm = norms or (q, q)
    cache, flags = stored(kv)
    tokens, group = at_once(rows)
    if rows:
        rope_heads_kernel[(triton.cdiv(rows, tokens), triton.cdiv(heads + 2 * kv_heads, group))](
            parts, q_norm, k_norm, rope, slots, q, *cache, rows, *parts.stride()[:2], starts[1], starts[2], heads,
            kv_heads, eps,
            PARTS=count, NORM=norms is not None, DIM=dim, BLOCK=triton.next_power_of_2(dim // 2), TOKENS=tokens,
            HEADS=group, **flags, num_warps=1 if tokens == 1 else 4, **overlap(parts),
        )  # fmt: skip
    return q


@triton.jit
def rotate_pairs(
    parts_ptr, at, part, rope_ptr, i, inside, PARTS: tl.constexpr, ROPE: tl.constexpr, dtype: tl.constexpr
):
    """Pairs `(x[2i], x[2i+1])` at `at`, turned; returns both in `dtype`."""
    zero = tl.zeros(i.shape, dtype=tl.float32)
    a = add_parts(zero, parts_ptr, at + 2 * i, part, inside, PARTS).to(dtype).to(tl.float32)
    b = add_parts(zero, parts_ptr, at + 2 * i + 1, part, inside, PARTS).to(dtype).to(tl.float32)
    cos = tl.load(rope_ptr + i, mask=inside, other=0.0)
    sin = tl.load(rope_ptr + ROPE // 2 + i, mask=inside, other=0.0)
    return (a * cos - b * sin).to(dtype), (a * sin + b * cos).to(dtype)


@triton.jit
def keep_latent(
    parts_ptr, at, part, kv_norm_ptr, rope_ptr, slot, kv_ptr, scales_ptr, eps,
    PARTS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
    ROUND: tl.constexpr, SCALED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A token's KV latent, normed, and its rotary key, turned, into the cache."""
    d, i = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    out_ptr = kv_ptr + slot * (LATENT + ROPE)
    zero = tl.zeros((BLOCK_L,), dtype=tl.float32)
    x = add_parts(zero, parts_ptr, at + d, part, d < LATENT, PARTS).to(ROUND).to(tl.float32)
    w = tl.load(kv_norm_ptr + d, mask=d < LATENT, other=0.0).to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, axis=0) / LATENT + eps) * w).to(ROUND)
    turn = i < ROPE // 2
    a, b = rotate_pairs(parts_ptr, at + LATENT, part, rope_ptr, i, turn, PARTS, ROPE, ROUND)
    if SCALED:
        x, a, b = x.to(tl.float32), a.to(tl.float32), b.to(tl.float32)
        scale = block_scale(tl.max(tl.abs(x), axis=0), False)
        turned = block_scale(tl.maximum(tl.max(tl.abs(a), axis=0), tl.max(tl.abs(b), axis=0)), False)
        tl.store(scales_ptr + scale_place(slot, 0, 2, PAGE), scale)
        tl.store(scales_ptr + scale_place(slot, 1, 2, PAGE), turned)
        x, a, b = quantise(x, scale), quantise(a, turned), quantise(b, turned)
    tl.store(out_ptr + d, x, mask=d < LATENT)
    tl.store(out_ptr + LATENT + 2 * i, a, mask=turn)
    tl.store(out_ptr + LATENT + 2 * i + 1, b, mask=turn)


@triton.jit
def split_latents_kernel(
    parts_ptr, q_norm_ptr, kv_norm_ptr, rope_ptr, slots_ptr, kv_ptr, scales_ptr, plain_ptr, q_ptr, s_ptr, parts_part,
    parts_row, kv_at, eps,
    PARTS: tl.constexpr, Q_DIM: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, Q_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, ROUND: tl.constexpr, SCALED: tl.constexpr, PAGE: tl.constexpr,
    PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program 0 of a token: what the cache keeps of it. Program 1: its query latent."""
    row = tl.program_id(0).to(tl.int64)
    let_next_start(PDL)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + row)
    start = row * parts_row
    if tl.program_id(1) == 0:
        keep_latent(
            parts_ptr, start + kv_at, parts_part, kv_norm_ptr, rope_ptr + row * ROPE, slot, kv_ptr, scales_ptr, eps,
            PARTS, LATENT, ROPE, BLOCK_L, BLOCK_R, ROUND, SCALED, PAGE,
        )  # fmt: skip
    elif Q_DIM > 0:
        block = tl.arange(0, Q_BLOCKS)
        cols = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = cols < Q_DIM
        zeros = tl.zeros((Q_BLOCKS, 128), dtype=tl.float32)
        y = add_parts(zeros, parts_ptr, start + cols, parts_part, inside, PARTS).to(ROUND).to(tl.float32)
        weight = tl.load(q_norm_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        y = (y * tl.rsqrt(tl.sum(tl.sum(y * y, axis=1), axis=0) / Q_DIM + eps) * weight).to(ROUND).to(tl.float32)
        blocks = Q_DIM // 128
        emit(
            y, row * Q_DIM + cols, inside, row * blocks + block, block < blocks,
            plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0,
        )  # fmt: skip


def split_latents(parts, q_norm, rope, keep: Keep, form: Form | None, dtype: torch.dtype) -> Formed | None:
    count, rows, _ = parts.shape
    latent, q_dim = len(keep.norm), 0 if q_norm is None else len(q_norm)
    rotary = keep.kv.width - latent
    out = allocate(form, rows, q_dim, parts.new_empty(0, dtype=dtype)) if q_dim else None
    pointers, flags = emitted(form if q_dim else Form(False, False), out, parts)
    cache, cache_flags = stored(keep.kv)
    if rows:
        split_latents_kernel[(rows, 2 if q_dim else 1)](
            parts, parts if q_norm is None else q_norm, keep.norm, rope, keep.slots, *cache, *pointers,
            *parts.stride()[:2], keep.at, keep.eps,
            PARTS=count, Q_DIM=q_dim, LATENT=latent, ROPE=rotary,
            Q_BLOCKS=triton.next_power_of_2(max(triton.cdiv(q_dim, 128), 1)), BLOCK_L=triton.next_power_of_2(latent),
            BLOCK_R=triton.next_power_of_2(rotary // 2), ROUND=TRITON_DTYPE[dtype], **cache_flags, **flags, num_warps=4,
            **overlap(parts),
        )  # fmt: skip
    return out


@triton.jit
def absorb_kernel(
    parts_ptr, absorb_ptr, rope_ptr, q_ptr, kv_norm_ptr, slots_ptr, kv_ptr, scales_ptr, parts_part, parts_row, heads,
    kv_at, eps,
    PARTS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, ALL_L: tl.constexpr, KEEP: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_L values of a head's query against the latent; the first program also turns the head's rotary part. KEEP: a
    program behind the last head sees to what the cache keeps."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, d = tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = (d < LATENT)[:, None] & (n < NOPE)[None, :] & (head < heads)
    absorb = tl.load(absorb_ptr + (head * LATENT + d)[:, None].to(tl.int64) * NOPE + n[None, :], mask=inside, other=0.0)
    wait_for_previous(PDL)
    let_next_start(PDL)  # late: what this reads is on its way before the attention asks for pages
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if head == heads:
        if KEEP:  # noqa: SIM102  known when compiled: what is inside must not be, without it
            if tl.program_id(2) == 0:
                slot = tl.load(slots_ptr + row)
                keep_latent(
                    parts_ptr, row * parts_row + kv_at, parts_part, kv_norm_ptr, rope_ptr + row * ROPE, slot, kv_ptr,
                    scales_ptr, eps, PARTS, LATENT, ROPE, ALL_L, BLOCK_R, dtype, SCALED, PAGE,
                )  # fmt: skip
    else:
        at = row * parts_row + head * (NOPE + ROPE)
        zero = tl.zeros((BLOCK_N,), dtype=tl.float32)
        q = add_parts(zero, parts_ptr, at + n, parts_part, n < NOPE, PARTS).to(dtype).to(tl.float32)
        out = q_ptr + (row * heads + head) * (LATENT + ROPE)
        tl.store(out + d, tl.sum(absorb.to(tl.float32) * q[None, :], axis=1).to(dtype), mask=d < LATENT)
        if tl.program_id(2) == 0:
            i = tl.arange(0, BLOCK_R)
            turn = i < ROPE // 2
            a, b = rotate_pairs(parts_ptr, at + NOPE, parts_part, rope_ptr + row * ROPE, i, turn, PARTS, ROPE, dtype)
            tl.store(out + LATENT + 2 * i, a, mask=turn)
            tl.store(out + LATENT + 2 * i + 1, b, mask=turn)


def absorb_queries(parts, absorb, rope, dtype: torch.dtype, keep: Keep | None) -> torch.Tensor:
    (count, rows, _), (heads, latent, nope) = parts.shape, absorb.shape
    rotary = rope.shape[-1] * 2
    q = torch.empty(rows, heads, latent + rotary, dtype=dtype, device=parts.device)
    block = min(64, triton.next_power_of_2(latent))
    kept = keep or Keep(0, q, 0.0, q, KV(q))
    cache, flags = stored(kept.kv)
    if rows:
        absorb_kernel[(rows, heads + (keep is not None), triton.cdiv(latent, block))](
            parts, absorb, rope, q, kept.norm, kept.slots, *cache, *parts.stride()[:2], heads, kept.at, kept.eps,
            PARTS=count, NOPE=nope, ROPE=rotary, LATENT=latent, BLOCK_N=triton.next_power_of_2(nope),
            BLOCK_R=triton.next_power_of_2(rotary // 2), BLOCK_L=block, ALL_L=triton.next_power_of_2(latent),
            KEEP=keep is not None, **flags, num_warps=4, **overlap(parts),
        )  # fmt: skip
    return q
