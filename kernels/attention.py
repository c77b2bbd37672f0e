"""Decode attention in Triton over a paged cache: MLA in its latent space, and grouped-query attention.

Heads that read the same keys share a program, so a page is loaded once for up to 16 of them: with MLA that is every
head (after absorption it is multi-query attention), with GQA the heads of a group. A row's pages are cut into up to
`SPLITS` spans that run at the same time, and a second kernel joins them in order. The cuts follow the row's own length:
nothing depends on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import KV, Form, Formed
from kernels.launch import let_next_start, overlap, prefetch, wait_for_previous
from kernels.norm import add_parts
from kernels.quant import allocate, decode_e4m3, emit, emitted
from kernels.reference import has_fp8_units

HEADS_PER_PROGRAM = 16  # the smallest M that a tensor core takes
SPLITS = 32


@triton.jit
def span_of(length, PAGE: tl.constexpr, SPLITS: tl.constexpr):
    """Tokens that each of a row's spans covers: whole pages, as evenly as they go."""
    return tl.cdiv(tl.cdiv(length, PAGE), SPLITS) * PAGE


@triton.jit
def load_cached(pointers, mask, SCALED: tl.constexpr, DECODE: tl.constexpr, MULTIPLY: tl.constexpr):
    """Keys or values as they are multiplied; 0 where not in the mask."""
    x = tl.load(pointers, mask=mask, other=0.0)
    if DECODE:
        x = decode_e4m3(x)
    if SCALED:
        x = x.to(MULTIPLY)
    return x


@triton.jit
def decode_attention_kernel(
    q_ptr, cache_ptr, scales_ptr, pages_ptr, lengths_ptr, acc_ptr, top_ptr, total_ptr, scale, heads, per_group,
    pages_row, cache_row, values_at, vectors,
    DIM: tl.constexpr, ROPE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr, DECODE: tl.constexpr, MULTIPLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One span of a row, for up to BLOCK_H heads that share keys. ROPE > 0 is MLA: keys are DIM of latent and ROPE of
    rotary key, values the latent again. SCALED: the cache holds E4M3, which is multiplied as MULTIPLY, exactly."""
    row, split = tl.program_id(0), tl.program_id(2)
    blocks = tl.cdiv(per_group, BLOCK_H)
    group = tl.program_id(1) // blocks
    member = tl.program_id(1) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    head = group * per_group + member
    d, r, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, PAGE)
    length = tl.load(lengths_ptr + row)
    span = span_of(length, PAGE, SPLITS)
    first = split * span
    page = tl.load(pages_ptr + row * pages_row + tl.minimum(first, length - 1) // PAGE).to(tl.int64)
    if PDL:  # the first page's lines, as far as they are not in the L2 cache yet
        line = cache_ptr + (page * PAGE + t)[:, None] * cache_row + group * DIM
        prefetch(line + tl.minimum(tl.arange(0, BLOCK_D // 16) * 16, DIM - 1)[None, :])
        if ROPE == 0:
            prefetch(line + values_at + tl.minimum(tl.arange(0, BLOCK_D // 16) * 16, DIM - 1)[None, :])
    wait_for_previous(PDL)
    let_next_start(PDL)
    if first >= length:
        return
    whole = (row * heads + head).to(tl.int64)
    inside = (member < per_group)[:, None]
    q_row = q_ptr + whole[:, None] * (DIM + ROPE)
    q = tl.load(q_row + d[None, :], mask=inside & (d < DIM)[None, :], other=0.0)
    if ROPE:
        q_r = tl.load(q_row + DIM + r[None, :], mask=inside & (r < ROPE)[None, :], other=0.0)
    if SCALED:
        q = q.to(MULTIPLY)
        if ROPE:
            q_r = q_r.to(MULTIPLY)
    top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    for start in tl.range(first, tl.minimum(first + span, length), PAGE):
        following = tl.minimum(start + PAGE, length - 1) // PAGE
        next_page = tl.load(pages_ptr + row * pages_row + following).to(tl.int64)  # on its way one turn early
        seen = start + t < length
        mask = seen[:, None] & (d < DIM)[None, :]
        keys = cache_ptr + (page * PAGE + t)[:, None] * cache_row + group * DIM
        k = load_cached(keys + d[None, :], mask, SCALED, DECODE, MULTIPLY)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SCALED:
            page_scales = scales_ptr + (page * vectors + group) * PAGE + t
            k_scale = tl.load(page_scales, mask=seen, other=0.0)
            scores *= k_scale[None, :]
        if ROPE:
            k_r = load_cached(keys + DIM + r[None, :], seen[:, None] & (r < ROPE)[None, :], SCALED, DECODE, MULTIPLY)
            turned = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
            if SCALED:
                turned *= tl.load(page_scales + PAGE, mask=seen, other=0.0)[None, :]
            scores += turned
            v = k
        else:
            v = load_cached(keys + values_at + d[None, :], mask, SCALED, DECODE, MULTIPLY)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        if SCALED:  # weights take the scales of their values, over the page's largest: 16 bits hold them then
            v_scale = k_scale
            if ROPE == 0:
                v_scale = tl.load(page_scales + vectors // 2 * PAGE, mask=seen, other=0.0)
            largest = tl.max(v_scale, axis=0)
            p *= (v_scale / largest)[None, :]
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee") * largest
        else:
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top, page = new_top, next_page
    place = whole * SPLITS + split
    tl.store(top_ptr + place, top, mask=member < per_group)
    tl.store(total_ptr + place, total, mask=member < per_group)
    tl.store(acc_ptr + place[:, None] * DIM + d[None, :], acc, mask=inside & (d < DIM)[None, :])


@triton.jit
def join_spans(
    acc_ptr, top_ptr, total_ptr, head, d, active,
    DIM: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Attention output `[WIDTH]` at columns `d` of `head` (both `[WIDTH]`), from the row's spans in order. Loads come
    before the first sum over them, so that they are on their way together."""
    top = tl.full((WIDTH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    acc = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in tl.range(0, active, AT_ONCE):
        span = start + tl.arange(0, AT_ONCE)
        there = (span < active)[:, None] & (d < DIM)[None, :]
        place = head[None, :].to(tl.int64) * SPLITS + span[:, None]
        pieces = tl.load(acc_ptr + place * DIM + d[None, :], mask=there, other=0.0)
        tops = tl.load(top_ptr + place, mask=there, other=float("-inf"))
        totals = tl.load(total_ptr + place, mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(tops - finite[None, :])
        shrink = tl.exp(top - finite)
        total = total * shrink + tl.sum(weight * totals, axis=0)
        acc = acc * shrink + tl.sum(weight * pieces, axis=0)
        top = new_top
    return acc / tl.where(total == 0.0, 1.0, total)


@triton.jit
def emit_block(
    y, row, block, width, plain_ptr, q_ptr, s_ptr, PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr
):  # fmt: skip
    """`emit` for the one block `y [1, 128]` that a program has made of a row `width` wide."""
    cols = (block * 128 + tl.arange(0, 128))[None, :]
    one = tl.arange(0, 1)
    emit(
        y, row.to(tl.int64) * width + cols, cols < width, row * (width // 128) + block + one, one == 0,
        plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0,
    )  # fmt: skip


@triton.jit
def join_heads_kernel(
    acc_ptr, top_ptr, total_ptr, lengths_ptr, plain_ptr, q_ptr, s_ptr, heads, like_ptr,
    DIM: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, PLAIN: tl.constexpr, FP8: tl.constexpr,
    UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of 128 columns of all heads' outputs, which lie one behind the other."""
    row, block = tl.program_id(0), tl.program_id(1)
    cols = block * 128 + tl.arange(0, 128)
    width = heads * DIM
    length = tl.load(lengths_ptr + row)
    active = tl.cdiv(length, span_of(length, PAGE, SPLITS))
    wait_for_previous(PDL)
    let_next_start(PDL)
    head = row * heads + tl.minimum(cols, width - 1) // DIM
    y = join_spans(acc_ptr, top_ptr, total_ptr, head, cols % DIM, active, DIM, SPLITS, 128, 8)
    y = y.to(like_ptr.dtype.element_ty).to(tl.float32)[None, :]
    emit_block(y, row, block, width, plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0)


@triton.jit
def expand_latents_kernel(
    acc_ptr, top_ptr, total_ptr, lengths_ptr, expand_ptr, parts_ptr, heads, like_ptr,
    LATENT: tl.constexpr, VALUE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head's values, as far as BLOCK_L of its latents make them: what the cut of K is to a product."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    v, d = tl.arange(0, BLOCK_V), part * BLOCK_L + tl.arange(0, BLOCK_L)
    length = tl.load(lengths_ptr + row)
    active = tl.cdiv(length, span_of(length, PAGE, SPLITS))
    inside = (v < VALUE)[:, None] & (d < LATENT)[None, :]
    expand = tl.load(
        expand_ptr + (head * VALUE + v)[:, None].to(tl.int64) * LATENT + d[None, :], mask=inside, other=0.0
    )
    wait_for_previous(PDL)
    let_next_start(PDL)
    which = row * heads + head + d * 0
    latent = join_spans(acc_ptr, top_ptr, total_ptr, which, d, active, LATENT, SPLITS, BLOCK_L, 8)
    latent = latent.to(like_ptr.dtype.element_ty).to(tl.float32)
    out = ((part * tl.num_programs(0) + row) * heads + head).to(tl.int64) * VALUE + v
    tl.store(parts_ptr + out, tl.sum(expand.to(tl.float32) * latent[None, :], axis=1), mask=v < VALUE)


@triton.jit
def join_parts_kernel(
    parts_ptr, plain_ptr, q_ptr, s_ptr, width, part, like_ptr,
    PARTS: tl.constexpr, PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of 128 columns of all heads' outputs, from their partial sums."""
    row, block = tl.program_id(0), tl.program_id(1)
    cols = (block * 128 + tl.arange(0, 128))[None, :]
    wait_for_previous(PDL)
    let_next_start(PDL)
    zero = tl.zeros((1, 128), dtype=tl.float32)
    y = add_parts(zero, parts_ptr, row.to(tl.int64) * width + cols, part, cols < width, PARTS)
    y = y.to(like_ptr.dtype.element_ty).to(tl.float32)
    emit_block(y, row, block, width, plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0)


def _spans(q, cache: KV, pages, lengths, scale: float, kv_heads: int, dim: int, rope: int, decode: bool | None):
    """Each span's unscaled output, largest score and sum of weights: `[R, H, SPLITS, dim]` and `[R, H, SPLITS]`."""
    rows, heads, _ = q.shape
    acc = torch.empty(rows, heads, SPLITS, dim, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, rows, heads, SPLITS, dtype=torch.float32, device=q.device)
    per_group, scaled = heads // kv_heads, cache.scales is not None
    if decode is None:
        decode = scaled and not has_fp8_units(q.device)
    decode_attention_kernel[(rows, kv_heads * triton.cdiv(per_group, HEADS_PER_PROGRAM), SPLITS)](
        q, cache.values.view(torch.uint8) if decode else cache.values, cache.scales if scaled else q, pages, lengths,
        acc, top, total, scale, heads, per_group, pages.stride(0), cache.width, kv_heads * dim, len(cache.widths),
        DIM=dim, ROPE=rope, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_R=max(16, triton.next_power_of_2(rope)),
        BLOCK_H=HEADS_PER_PROGRAM, PAGE=cache.page_size, SPLITS=SPLITS, SCALED=scaled, DECODE=decode,
        MULTIPLY=tl.float32 if q.dtype == torch.float32 else tl.float16, num_stages=2, num_warps=8 if dim > 256 else 4,
        **overlap(q),
    )  # fmt: skip
    return acc, top, total


def gqa_decode(
    q, cache: KV, pages, lengths, scale: float, kv_heads: int, form: Form, decode: bool | None = None
) -> Formed:
    rows, heads, dim = q.shape
    spans = _spans(q.contiguous(), cache, pages, lengths, scale, kv_heads, dim, 0, decode)
    out = allocate(form, rows, heads * dim, q)
    pointers, flags = emitted(form, out, q)
    join_heads_kernel[(rows, triton.cdiv(heads * dim, 128))](
        *spans, lengths, *pointers, heads, q, DIM=dim, PAGE=cache.page_size, SPLITS=SPLITS, **flags,
        num_warps=4, **overlap(q),
    )  # fmt: skip
    return out


def mla_decode(
    q, cache: KV, pages, lengths, scale: float, expand: torch.Tensor, form: Form, decode: bool | None = None
) -> Formed:
    rows, heads, width = q.shape
    _, value, latent = expand.shape
    spans = _spans(q.contiguous(), cache, pages, lengths, scale, 1, latent, width - latent, decode)
    out = allocate(form, rows, heads * value, q)
    pointers, flags = emitted(form, out, q)
    block_l = min(64, triton.next_power_of_2(latent))
    parts = torch.empty(triton.cdiv(latent, block_l), rows, heads * value, dtype=torch.float32, device=q.device)
    expand_latents_kernel[(rows, heads, len(parts))](
        *spans, lengths, expand, parts, heads, q, LATENT=latent, VALUE=value, BLOCK_L=block_l,
        BLOCK_V=triton.next_power_of_2(value), PAGE=cache.page_size, SPLITS=SPLITS, num_warps=4, **overlap(q),
    )  # fmt: skip
    join_parts_kernel[(rows, triton.cdiv(heads * value, 128))](
        parts, *pointers, heads * value, parts.stride(0), q, PARTS=len(parts), **flags, num_warps=1, **overlap(q)
    )
    return out
