"""Between the products of attention, in Triton: norms, rotary embedding, and what the cache is to keep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import KV
from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.norm.partials import add_partials
from kernels.quant.e4m3 import block_scale, quantise
from kernels.rope.cache import scale_place, stored


@triton.jit
def load_halves(ptr, i, DIM: tl.constexpr, NORM: tl.constexpr):
    """A norm's weights for both numbers that are rotated together; zeros without NORM."""
    inside = (i < DIM // 2) & NORM
    a = tl.load(ptr + i, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(ptr + DIM // 2 + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rope_heads_kernel(
    partials_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, rope_ptr, slots_ptr, q_ptr, kv_ptr, scales_ptr, rows,
    partials_stride, partials_row, keys_at, values_at, heads, kv_heads, eps,
    PARTIALS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
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
            sin, slot, q_norm, k_norm, partials_ptr, bias_ptr, q_ptr, kv_ptr, scales_ptr, rows, partials_stride,
            partials_row, keys_at, values_at, heads, kv_heads, eps, PARTIALS, BIAS, NORM, DIM, SCALED, PAGE,
        )  # fmt: skip


@triton.jit
def rope_head(
    head, row, i, inside, cos, sin, slot, q_norm, k_norm, partials_ptr, bias_ptr, q_ptr, kv_ptr, scales_ptr, rows,
    partials_stride, partials_row, keys_at, values_at, heads, kv_heads, eps,
    PARTIALS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """A query, a key or a value; a value is neither normed nor rotated."""
    half: tl.constexpr = DIM // 2
    is_query, is_value = head < heads, head >= heads + kv_heads
    column = head * DIM
    if is_value:
        column = values_at + (head - heads - kv_heads) * DIM
    elif head >= heads:
        column = keys_at + (head - heads) * DIM
    at = row * partials_row + column + i
    a = tl.zeros(inside.shape, dtype=tl.float32)
    b = a
    dtype = q_ptr.dtype.element_ty
    if BIAS:
        a += tl.load(bias_ptr + column + i, mask=i < half, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + column + half + i, mask=i < half, other=0.0).to(tl.float32)
    a = add_partials(a, partials_ptr, at, partials_stride, inside, PARTIALS).to(dtype).to(tl.float32)
    b = add_partials(b, partials_ptr, at + half, partials_stride, inside, PARTIALS).to(dtype).to(tl.float32)
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


def rope_heads(
    partials: torch.Tensor,
    starts: tuple[int, int, int],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    rope: torch.Tensor,
    slots: torch.Tensor,
    kv: KV,
    *,
    heads: int,
    eps: float,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    (count, rows, _), dim = partials.shape, rope.shape[-1] * 2
    kv_heads = kv.width // 2 // dim
    q = torch.empty(rows, heads, dim, dtype=dtype, device=partials.device)
    q_norm, k_norm = norms or (q, q)
    cache, flags = stored(kv)
    tokens, group = at_once(rows)
    if rows:
        rope_heads_kernel[(triton.cdiv(rows, tokens), triton.cdiv(heads + 2 * kv_heads, group))](
            partials, q if bias is None else bias, q_norm, k_norm, rope, slots, q, *cache, rows,
            *partials.stride()[:2], starts[1], starts[2], heads, kv_heads, eps,
            PARTIALS=count, BIAS=bias is not None, NORM=norms is not None, DIM=dim,
            BLOCK=triton.next_power_of_2(dim // 2), TOKENS=tokens, HEADS=group, **flags,
            num_warps=1 if tokens == 1 else 4, **overlap(partials),
        )  # fmt: skip
    return q
