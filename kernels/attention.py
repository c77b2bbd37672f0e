"""Decode attention in Triton over a paged cache, for heads in groups that share keys (GQA), and what it has in common
with that of MLA.

A row's pages are cut into up to `SPLITS` spans that run at the same time, and a second kernel joins them in order. The
cuts follow the row's own length: nothing depends on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import KV, LOG2_E, Form, Formed
from kernels.launch import let_next_start, overlap, prefetch, wait_for_previous
from kernels.norm import TRITON_DTYPE
from kernels.quant import allocate, decode_e4m3_words, emit, emitted

SPLITS = 32
HEADS_PER_PROGRAM = 16


@triton.jit
def span_of(length, PAGE: tl.constexpr, SPLITS: tl.constexpr):
    """Tokens that each of a row's spans covers: whole pages, as evenly as they go."""
    return tl.cdiv(tl.cdiv(length, PAGE), SPLITS) * PAGE


@triton.jit
def opened(words, UNIT: tl.constexpr, MULTIPLY: tl.constexpr):
    """`[T, UNIT * W]` numbers to multiply from `words [T, W]`: four E4M3 codes, two numbers of 16 bits, or one."""
    if UNIT == 4:
        a, b, c, d = decode_e4m3_words(words)
        return tl.join(tl.join(a, c), tl.join(b, d)).reshape(words.shape[0], words.shape[1] * 4).to(MULTIPLY)
    elif UNIT == 2:
        two = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        return two.reshape(words.shape[0], words.shape[1] * 2).to(MULTIPLY, bitcast=True)
    else:
        return words.to(MULTIPLY, bitcast=True)


@triton.jit
def gqa_decode_kernel(
    q_ptr, words_ptr, scales_ptr, pages_ptr, lengths_ptr, acc_ptr, top_ptr, total_ptr, scale, heads, per_group,
    pages_row, token, values_at, kv_heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    UNIT: tl.constexpr, MULTIPLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One span of a row, for up to BLOCK_H heads that share keys. `scale` is in units of log 2, and so is `top`.

    Tokens are the rows of both products: they fill the tensor core, and a few heads are its narrow side ("swap AB").
    A page is brought into registers while the one before is worked on, in words of 32 bits that hold UNIT numbers
    (`token`, from one to the next, and `values_at` count words): smaller numbers would be given a register each between
    two turns of the loop, and by way of shared memory E4M3 would be transposed byte by byte. UNIT 4 is E4M3, which is
    multiplied as MULTIPLY, exactly. Behind a row's end the last token is read again, and not counted."""
    row, split = tl.program_id(0), tl.program_id(2)
    blocks = tl.cdiv(per_group, BLOCK_H)
    group = tl.program_id(1) // blocks
    member = tl.program_id(1) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    d, t, word = tl.arange(0, BLOCK_D), tl.arange(0, PAGE), tl.arange(0, BLOCK_D // UNIT)[None, :]
    some = word < DIM // UNIT
    last = tl.load(lengths_ptr + row) - 1
    span = span_of(last + 1, PAGE, SPLITS)
    first = split * span
    pages_ptr += row * pages_row
    page = tl.load(pages_ptr + tl.minimum(first, last) // PAGE).to(tl.int64)
    words_ptr += group * (DIM // UNIT)
    scales_ptr += group * PAGE
    here = tl.maximum(tl.minimum(t, last - first), 0)
    begin = words_ptr + page * PAGE * token + here[:, None] * token
    if PDL:  # the first page's lines, as far as they are not in the L2 cache yet
        lines = begin + tl.minimum(tl.arange(0, BLOCK_D // 16) * (16 // UNIT), DIM // UNIT - 1)[None, :]
        prefetch(lines)
        prefetch(lines + values_at)
    let_next_start(PDL)
    wait_for_previous(PDL)
    if first > last:
        return
    whole = (row * heads + group * per_group + member).to(tl.int64)
    inside = (member < per_group)[None, :]
    q = tl.load(q_ptr + whole[None, :] * DIM + d[:, None], mask=inside & (d < DIM)[:, None], other=0.0).to(MULTIPLY)
    top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_H), dtype=tl.float32)
    next_k = tl.load(begin + word, mask=some, other=0)
    next_v = tl.load(begin + values_at + word, mask=some, other=0)
    if UNIT == 4:
        scales = scales_ptr + page * (2 * kv_heads * PAGE) + here
        next_k_scale, next_v_scale = tl.load(scales), tl.load(scales + kv_heads * PAGE)
    page = tl.load(pages_ptr + tl.minimum(first + PAGE, last) // PAGE).to(tl.int64)
    end = tl.minimum(first + span, last + 1)
    for start in tl.range(first, end, PAGE, num_stages=1):
        k, v = opened(next_k, UNIT, MULTIPLY), opened(next_v, UNIT, MULTIPLY)
        if UNIT == 4:
            k_scale, v_scale = next_k_scale, next_v_scale
        more = start + PAGE < end
        here = tl.maximum(tl.minimum(t, last - start - PAGE), 0)
        begin = words_ptr + page * PAGE * token + here[:, None] * token
        next_k = tl.load(begin + word, mask=some & more, other=0)
        next_v = tl.load(begin + values_at + word, mask=some & more, other=0)
        if UNIT == 4:
            scales = scales_ptr + page * (2 * kv_heads * PAGE) + here
            next_k_scale = tl.load(scales, mask=more, other=1.0)
            next_v_scale = tl.load(scales + kv_heads * PAGE, mask=more, other=1.0)
        page = tl.load(pages_ptr + tl.minimum(start + 2 * PAGE, last) // PAGE).to(tl.int64)
        scores = tl.dot(k, q, input_precision="ieee") * scale
        if UNIT == 4:  # a value's scale goes into its token's weight, and out of the sum of weights again
            scores = scores * k_scale[:, None] + tl.log2(v_scale)[:, None]
        scores = tl.where((start + t <= last)[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        p = tl.exp2(scores - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        weights = p
        if UNIT == 4:
            weights = p * (1.0 / v_scale)[:, None]
        total = total * shrink + tl.sum(weights, axis=0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
        top = new_top
    place = whole * SPLITS + split
    tl.store(top_ptr + place, top, mask=member < per_group)
    tl.store(total_ptr + place, total, mask=member < per_group)
    tl.store(acc_ptr + place[None, :] * DIM + d[:, None], acc, mask=inside & (d < DIM)[:, None])


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
        weight = tl.exp2(tops - finite[None, :])
        shrink = tl.exp2(top - finite)
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
    let_next_start(PDL)
    wait_for_previous(PDL)
    head = row * heads + tl.minimum(cols, width - 1) // DIM
    y = join_spans(acc_ptr, top_ptr, total_ptr, head, cols % DIM, active, DIM, SPLITS, 128, 8)
    y = y.to(like_ptr.dtype.element_ty).to(tl.float32)[None, :]
    emit_block(y, row, block, width, plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0)


def spans(q: torch.Tensor, dim: int, splits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for each span's unscaled output `[R, H, SPLITS, dim]`, largest score and sum of weights `[R, H, SPLITS]`."""
    shape = (*q.shape[:2], splits)
    acc = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    return acc, top, total


def multiplied(q: torch.Tensor, cache: KV) -> torch.dtype:
    """In which dtype keys and values are multiplied: float16 holds E4M3 exactly, and converting to it costs least."""
    return torch.float16 if cache.scales is not None and q.element_size() == 2 else q.dtype


def gqa_decode(q, cache: KV, pages, lengths, scale: float, kv_heads: int, form: Form) -> Formed:
    rows, heads, dim = q.shape
    q, per_group, room, unit = q.contiguous(), heads // kv_heads, spans(q, dim, SPLITS), 4 // cache.values.itemsize
    gqa_decode_kernel[(rows, kv_heads * triton.cdiv(per_group, HEADS_PER_PROGRAM), SPLITS)](
        q, cache.values.view(torch.int32), q if cache.scales is None else cache.scales, pages, lengths, *room,
        scale * LOG2_E, heads, per_group, pages.stride(0), cache.width // unit, kv_heads * dim // unit, kv_heads,
        DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_H=HEADS_PER_PROGRAM, PAGE=cache.page_size,
        SPLITS=SPLITS, UNIT=unit, MULTIPLY=TRITON_DTYPE[multiplied(q, cache)], num_warps=4, **overlap(q),
    )  # fmt: skip
    out = allocate(form, rows, heads * dim, q)
    pointers, flags = emitted(form, out, q)
    join_heads_kernel[(rows, triton.cdiv(heads * dim, 128))](
        *room, lengths, *pointers, heads, q, DIM=dim, PAGE=cache.page_size, SPLITS=SPLITS, **flags,
        num_warps=4, **overlap(q),
    )  # fmt: skip
    return out
