"""MLA between its products: the query latent, the queries in latent space, and what the cache keeps of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import KV, Form, Formed, Keep
from kernels.launch import TRITON_DTYPE, let_next_start, overlap, wait_for_previous
from kernels.norm.partials import add_partials
from kernels.quant.e4m3 import allocate, block_scale, emit, emitted, quantise
from kernels.rope.cache import scale_place, stored


@triton.jit
def rotate_pairs(
    partials_ptr, at, part, rope_ptr, i, inside, PARTIALS: tl.constexpr, ROPE: tl.constexpr, dtype: tl.constexpr
):
    """Pairs `(x[2i], x[2i+1])` at `at`, rotated; returns both in `dtype`."""
    zero = tl.zeros(i.shape, dtype=tl.float32)
    a = add_partials(zero, partials_ptr, at + 2 * i, part, inside, PARTIALS).to(dtype).to(tl.float32)
    b = add_partials(zero, partials_ptr, at + 2 * i + 1, part, inside, PARTIALS).to(dtype).to(tl.float32)
    cos = tl.load(rope_ptr + i, mask=inside, other=0.0)
    sin = tl.load(rope_ptr + ROPE // 2 + i, mask=inside, other=0.0)
    return (a * cos - b * sin).to(dtype), (a * sin + b * cos).to(dtype)


@triton.jit
def keep_latent(
    partials_ptr, at, part, kv_norm_ptr, rope_ptr, slot, kv_ptr, scales_ptr, eps,
    PARTIALS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
    ROUND: tl.constexpr, SCALED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A token's KV latent, normed, and its rotary key, rotated, into the cache."""
    d, i = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    out_ptr = kv_ptr + slot * (LATENT + ROPE)
    zero = tl.zeros((BLOCK_L,), dtype=tl.float32)
    x = add_partials(zero, partials_ptr, at + d, part, d < LATENT, PARTIALS).to(ROUND).to(tl.float32)
    w = tl.load(kv_norm_ptr + d, mask=d < LATENT, other=0.0).to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, axis=0) / LATENT + eps) * w).to(ROUND)
    turn = i < ROPE // 2
    a, b = rotate_pairs(partials_ptr, at + LATENT, part, rope_ptr, i, turn, PARTIALS, ROPE, ROUND)
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
    partials_ptr, q_norm_ptr, kv_norm_ptr, rope_ptr, slots_ptr, kv_ptr, scales_ptr, plain_ptr, q_ptr, s_ptr,
    partials_stride, partials_row, kv_at, kv_eps, q_eps,
    PARTIALS: tl.constexpr, Q_DIM: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, Q_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, ROUND: tl.constexpr, SCALED: tl.constexpr, PAGE: tl.constexpr,
    PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program 0 of a token: what the cache keeps of it. Program 1: its query latent."""
    row = tl.program_id(0).to(tl.int64)
    let_next_start(PDL)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + row)
    start = row * partials_row
    if tl.program_id(1) == 0:
        keep_latent(
            partials_ptr, start + kv_at, partials_stride, kv_norm_ptr, rope_ptr + row * ROPE, slot, kv_ptr,
            scales_ptr, kv_eps, PARTIALS, LATENT, ROPE, BLOCK_L, BLOCK_R, ROUND, SCALED, PAGE,
        )  # fmt: skip
    elif Q_DIM > 0:
        block = tl.arange(0, Q_BLOCKS)
        cols = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = cols < Q_DIM
        zeros = tl.zeros((Q_BLOCKS, 128), dtype=tl.float32)
        y = add_partials(zeros, partials_ptr, start + cols, partials_stride, inside, PARTIALS).to(ROUND).to(tl.float32)
        weight = tl.load(q_norm_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        y = (y * tl.rsqrt(tl.sum(tl.sum(y * y, axis=1), axis=0) / Q_DIM + q_eps) * weight).to(ROUND).to(tl.float32)
        blocks = Q_DIM // 128
        emit(
            y, row * Q_DIM + cols, inside, row * blocks + block, block < blocks,
            plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0,
        )  # fmt: skip


def split_latents(
    partials: torch.Tensor,
    q_norm: torch.Tensor | None,
    rope: torch.Tensor,
    keep: Keep,
    form: Form | None,
    *,
    dtype: torch.dtype,
    eps: float,
) -> Formed | None:
    count, rows, _ = partials.shape
    latent, q_dim = len(keep.norm), 0 if q_norm is None else len(q_norm)
    rotary = keep.kv.width - latent
    out = allocate(form, rows, q_dim, partials.new_empty(0, dtype=dtype)) if q_dim else None
    pointers, flags = emitted(form if q_dim else Form(False, False), out, partials)
    cache, cache_flags = stored(keep.kv)
    if rows:
        split_latents_kernel[(rows, 2 if q_dim else 1)](
            partials, partials if q_norm is None else q_norm, keep.norm, rope, keep.slots, *cache, *pointers,
            *partials.stride()[:2], keep.at, keep.eps, eps,
            PARTIALS=count, Q_DIM=q_dim, LATENT=latent, ROPE=rotary,
            Q_BLOCKS=triton.next_power_of_2(max(triton.cdiv(q_dim, 128), 1)), BLOCK_L=triton.next_power_of_2(latent),
            BLOCK_R=triton.next_power_of_2(rotary // 2), ROUND=TRITON_DTYPE[dtype], **cache_flags, **flags, num_warps=4,
            **overlap(partials),
        )  # fmt: skip
    return out


@triton.jit
def absorb_kernel(
    partials_ptr, absorb_ptr, rope_ptr, q_ptr, kv_norm_ptr, slots_ptr, kv_ptr, scales_ptr, partials_stride,
    partials_row, heads, kv_at, eps,
    PARTIALS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, ALL_L: tl.constexpr, KEEP: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_L values of a head's query against the latent; the first program also turns the head's rotary part. KEEP: a
    program after the last head writes what the cache keeps."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, d = tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = (d < LATENT)[:, None] & (n < NOPE)[None, :] & (head < heads)
    absorb = tl.load(absorb_ptr + (head * LATENT + d)[:, None].to(tl.int64) * NOPE + n[None, :], mask=inside, other=0.0)
    wait_for_previous(PDL)
    let_next_start(PDL)  # late: so that these loads are not queued behind the pages that attention loads
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if head == heads:
        if KEEP:  # noqa: SIM102  known when compiled: what is inside must not be, without it
            if tl.program_id(2) == 0:
                slot = tl.load(slots_ptr + row)
                keep_latent(
                    partials_ptr, row * partials_row + kv_at, partials_stride, kv_norm_ptr, rope_ptr + row * ROPE,
                    slot, kv_ptr, scales_ptr, eps, PARTIALS, LATENT, ROPE, ALL_L, BLOCK_R, dtype, SCALED, PAGE,
                )  # fmt: skip
    else:
        at = row * partials_row + head * (NOPE + ROPE)
        zero = tl.zeros((BLOCK_N,), dtype=tl.float32)
        q = add_partials(zero, partials_ptr, at + n, partials_stride, n < NOPE, PARTIALS).to(dtype).to(tl.float32)
        out = q_ptr + (row * heads + head) * (LATENT + ROPE)
        tl.store(out + d, tl.sum(absorb.to(tl.float32) * q[None, :], axis=1).to(dtype), mask=d < LATENT)
        if tl.program_id(2) == 0:
            i = tl.arange(0, BLOCK_R)
            turn = i < ROPE // 2
            a, b = rotate_pairs(
                partials_ptr, at + NOPE, partials_stride, rope_ptr + row * ROPE, i, turn, PARTIALS, ROPE, dtype
            )
            tl.store(out + LATENT + 2 * i, a, mask=turn)
            tl.store(out + LATENT + 2 * i + 1, b, mask=turn)


def absorb_queries(
    partials: torch.Tensor,
    absorb: torch.Tensor,
    rope: torch.Tensor,
    keep: Keep | None = None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    (count, rows, _), (heads, latent, nope) = partials.shape, absorb.shape
    rotary = rope.shape[-1] * 2
    q = torch.empty(rows, heads, latent + rotary, dtype=dtype, device=partials.device)
    block = min(64, triton.next_power_of_2(latent))
    kept = keep or Keep(0, q, 0.0, q, KV(q))
    cache, flags = stored(kept.kv)
    if rows:
        absorb_kernel[(rows, heads + (keep is not None), triton.cdiv(latent, block))](
            partials, absorb, rope, q, kept.norm, kept.slots, *cache, *partials.stride()[:2], heads, kept.at, kept.eps,
            PARTIALS=count, NOPE=nope, ROPE=rotary, LATENT=latent, BLOCK_N=triton.next_power_of_2(nope),
            BLOCK_R=triton.next_power_of_2(rotary // 2), BLOCK_L=block, ALL_L=triton.next_power_of_2(latent),
            KEEP=keep is not None, **flags, num_warps=4, **overlap(partials),
        )  # fmt: skip
    return q
