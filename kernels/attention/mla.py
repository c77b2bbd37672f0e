"""Decode attention of MLA in Triton, in its latent space, over a paged cache, on every card.

After absorption it is multi-query attention: all heads read the same latents, so that up to 16 of them, the smallest
M of a tensor core, share a program and a page is loaded once for them. `spans.py` says how a row is cut and joined; the
joined latents are expanded to each head's values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.spans import emit_block, join_spans, multiplied, span_of
from kernels.forms import KV, Form, Formed
from kernels.launch import TRITON_DTYPE, let_next_start, overlap, prefetch, wait_for_previous
from kernels.norm.partials import add_partials
from kernels.quant.e4m3 import allocate, decode_e4m3, emitted
from kernels.reference import has_fp8_units

HEADS_PER_PROGRAM = 16


@triton.jit
def load_cached(pointers, mask, SCALED: tl.constexpr, DECODE: tl.constexpr, MULTIPLY: tl.constexpr):
    """Latents or rotary keys as they are multiplied; 0 where not in the mask."""
    x = tl.load(pointers, mask=mask, other=0.0)
    if DECODE:
        x = decode_e4m3(x)
    if SCALED:
        x = x.to(MULTIPLY)
    return x


@triton.jit
def mla_decode_kernel(
    q_ptr, cache_ptr, scales_ptr, block_table_ptr, seq_lens_ptr, acc_ptr, top_ptr, total_ptr, scale, heads,
    block_table_row,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr, DECODE: tl.constexpr, MULTIPLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row's spans, every so many (the third dimension's programs), for BLOCK_H heads: keys are latent and rotary key,
    values the latent again. `scale` is in units of log 2, and so is `top`. SCALED: the cache holds E4M3, which is
    multiplied as MULTIPLY, exactly."""
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d, r, t = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R), tl.arange(0, PAGE)
    length = tl.load(seq_lens_ptr + row)
    span = span_of(length, PAGE, SPLITS)
    block_table_ptr += row * block_table_row
    if PDL:  # the first page's lines, as far as they are not in the L2 cache yet
        page = tl.load(block_table_ptr + tl.minimum(tl.program_id(2) * span, length - 1) // PAGE).to(tl.int64)
        line = tl.minimum(tl.arange(0, BLOCK_L // 16) * 16, LATENT - 1)[None, :]
        prefetch(cache_ptr + (page * PAGE + t)[:, None] * (LATENT + ROPE) + line)
    let_next_start(PDL)
    wait_for_previous(PDL)
    whole = (row * heads + head).to(tl.int64)
    inside = (head < heads)[:, None]
    q_row = q_ptr + whole[:, None] * (LATENT + ROPE)
    q = tl.load(q_row + d[None, :], mask=inside & (d < LATENT)[None, :], other=0.0).to(MULTIPLY)
    q_r = tl.load(q_row + LATENT + r[None, :], mask=inside & (r < ROPE)[None, :], other=0.0).to(MULTIPLY)
    for split in tl.range(tl.program_id(2), tl.cdiv(length, span), tl.num_programs(2), num_stages=1):
        first = split * span
        page = tl.load(block_table_ptr + first // PAGE).to(tl.int64)
        top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_H,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_L), dtype=tl.float32)
        for start in tl.range(first, tl.minimum(first + span, length), PAGE):
            following = tl.minimum(start + PAGE, length - 1) // PAGE
            next_page = tl.load(block_table_ptr + following).to(tl.int64)  # on its way one turn early
            seen = start + t < length
            at = cache_ptr + (page * PAGE + t)[:, None] * (LATENT + ROPE)
            k = load_cached(at + d[None, :], seen[:, None] & (d < LATENT)[None, :], SCALED, DECODE, MULTIPLY)
            k_r = load_cached(at + LATENT + r[None, :], seen[:, None] & (r < ROPE)[None, :], SCALED, DECODE, MULTIPLY)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            turned = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
            if SCALED:
                scales = scales_ptr + page * (2 * PAGE) + t
                k_scale = tl.load(scales, mask=seen, other=1.0)
                scores *= k_scale[None, :]
                turned *= tl.load(scales + PAGE, mask=seen, other=1.0)[None, :]
            scores = (scores + turned) * scale
            if SCALED:  # a latent's scale goes into its token's weight, and out of the sum of weights again
                scores += tl.log2(k_scale)[None, :]
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            p = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            weights = p
            if SCALED:
                weights = p * (1.0 / k_scale)[None, :]
            total = total * shrink + tl.sum(weights, axis=1)
            acc = tl.dot(p.to(k.dtype), k, acc * shrink[:, None], input_precision="ieee")
            top, page = new_top, next_page
        place = whole * SPLITS + split
        tl.store(top_ptr + place, top, mask=head < heads)
        tl.store(total_ptr + place, total, mask=head < heads)
        tl.store(acc_ptr + place[:, None] * LATENT + d[None, :], acc, mask=inside & (d < LATENT)[None, :])


@triton.jit
def expand_latents_kernel(
    acc_ptr, top_ptr, total_ptr, seq_lens_ptr, expand_ptr, partials_ptr, heads, like_ptr,
    LATENT: tl.constexpr, VALUE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head's values, as far as BLOCK_L of its latents make them: what the cut of K is to a product."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    v, d = tl.arange(0, BLOCK_V), part * BLOCK_L + tl.arange(0, BLOCK_L)
    length = tl.load(seq_lens_ptr + row)
    active = tl.cdiv(length, span_of(length, PAGE, SPLITS))
    inside = (v < VALUE)[:, None] & (d < LATENT)[None, :]
    expand = tl.load(
        expand_ptr + (head * VALUE + v)[:, None].to(tl.int64) * LATENT + d[None, :], mask=inside, other=0.0
    )
    let_next_start(PDL)
    wait_for_previous(PDL)
    which = row * heads + head + d * 0
    latent = join_spans(acc_ptr, top_ptr, total_ptr, which, d, active, LATENT, SPLITS)
    latent = latent.to(like_ptr.dtype.element_ty).to(tl.float32)
    out = ((part * tl.num_programs(0) + row) * heads + head).to(tl.int64) * VALUE + v
    tl.store(partials_ptr + out, tl.sum(expand.to(tl.float32) * latent[None, :], axis=1), mask=v < VALUE)


@triton.jit
def join_partials_kernel(
    partials_ptr, plain_ptr, q_ptr, s_ptr, width, part, like_ptr,
    PARTIALS: tl.constexpr, PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of 128 columns of all heads' outputs, from their partial sums."""
    row, block = tl.program_id(0), tl.program_id(1)
    cols = (block * 128 + tl.arange(0, 128))[None, :]
    let_next_start(PDL)
    wait_for_previous(PDL)
    zero = tl.zeros((1, 128), dtype=tl.float32)
    y = add_partials(zero, partials_ptr, row.to(tl.int64) * width + cols, part, cols < width, PARTIALS)
    y = y.to(like_ptr.dtype.element_ty).to(tl.float32)
    emit_block(y, row, block, width, plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0)


def paged_mla(
    q, cache: KV, block_table, seq_lens, scratch, scale: float, splits: int, programs: int, decode: bool | None
) -> None:
    """Spans of every row, into `scratch`. `scale` is in units of log 2."""
    (rows, heads, width), latent, scaled = q.shape, scratch[0].shape[-1], cache.scales is not None
    if decode is None:
        decode = scaled and not has_fp8_units(q.device)
    mla_decode_kernel[(rows, triton.cdiv(heads, HEADS_PER_PROGRAM), programs)](
        q, cache.values.view(torch.uint8) if decode else cache.values, cache.scales if scaled else q, block_table,
        seq_lens, *scratch, scale, heads, block_table.stride(0),
        LATENT=latent, ROPE=width - latent, BLOCK_L=max(16, triton.next_power_of_2(latent)),
        BLOCK_R=max(16, triton.next_power_of_2(width - latent)), BLOCK_H=HEADS_PER_PROGRAM, PAGE=cache.page_size,
        SPLITS=splits, SCALED=scaled, DECODE=decode, MULTIPLY=TRITON_DTYPE[multiplied(q, cache)], num_stages=2,
        num_warps=8 if latent > 256 else 4, **overlap(q),
    )  # fmt: skip


def expand_latents(
    scratch: tuple, seq_lens, expand: torch.Tensor, form: Form, q: torch.Tensor, page_size: int
) -> Formed:
    """The spans in `scratch` of all rows and heads of `q`, joined and expanded to values: `[R, H * V]` in `form`."""
    (rows, heads), (splits, latent), value = q.shape[:2], scratch[0].shape[2:], expand.shape[1]
    out = allocate(form, rows, heads * value, q)
    pointers, flags = emitted(form, out, q)
    block_l = min(64, triton.next_power_of_2(latent))
    partials = torch.empty(triton.cdiv(latent, block_l), rows, heads * value, dtype=torch.float32, device=q.device)
    expand_latents_kernel[(rows, heads, len(partials))](
        *scratch, seq_lens, expand, partials, heads, q, LATENT=latent, VALUE=value, BLOCK_L=block_l,
        BLOCK_V=triton.next_power_of_2(value), PAGE=page_size, SPLITS=splits, num_warps=4, **overlap(q),
    )  # fmt: skip
    join_partials_kernel[(rows, triton.cdiv(heads * value, 128))](
        partials, *pointers, heads * value, partials.stride(0), q, PARTIALS=len(partials), **flags, num_warps=1,
        **overlap(q),
    )  # fmt: skip
    return out
