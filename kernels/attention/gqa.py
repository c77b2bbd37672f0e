"""Decode attention in Triton over a paged cache, for heads in groups that share keys (GQA), on every card.

See `spans.py` for how a row is cut and joined.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.spans import multiplied, programs_for, span_of, window_of
from kernels.forms import KV
from kernels.launch import TRITON_DTYPE, let_next_start, overlap, wait_for_previous
from kernels.quant.e4m3 import decode_e4m3_words

HEADS_PER_PROGRAM = 16


@triton.jit
def opened(words, MULTIPLY: tl.constexpr):
    """`[T, 4 * W]` numbers to multiply from `words [T, W]`, four E4M3 codes each."""
    a, b, c, d = decode_e4m3_words(words)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(words.shape[0], words.shape[1] * 4).to(MULTIPLY)


@triton.jit
def is_seen(token, first_seen, last, WINDOW: tl.constexpr):
    """Whether a row sees these tokens."""
    seen = token <= last
    if WINDOW is not None:
        seen &= token >= first_seen
    return seen


@triton.jit
def attend_page(k, v, k_scale, v_scale, q, seen, scale, top, total, acc, SCALED: tl.constexpr):
    """One more page, `k [PAGE, D]` and `v [D, PAGE]`, of which tokens are `seen`. A few heads are the narrow side of
    the tensor core ("swap AB"): tokens, or numbers of a head, are many enough to fill the other."""
    scores = tl.dot(k, q, input_precision="ieee") * scale
    if SCALED:  # a value's scale goes into its token's weight, and out of the sum of weights again
        scores = scores * k_scale[:, None] + tl.log2(v_scale)[:, None]
    scores = tl.where(seen[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=0))
    p = tl.exp2(scores - new_top[None, :])
    shrink = tl.exp2(top - new_top)
    weights = p
    if SCALED:
        weights = p * (1.0 / v_scale)[:, None]
    total = total * shrink + tl.sum(weights, axis=0)
    return new_top, total, tl.dot(v, p.to(v.dtype), acc * shrink[None, :], input_precision="ieee")


@triton.jit
def attend_span(
    q, kv_ptr, block_table_ptr, group, first, end, first_seen, last, scale, kv_heads, top, total, acc,
    DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A span of a plain cache, through the compiler's pipeline: a page's place is reckoned two turns ahead, or its
    copies could not begin early. Behind a row's end its last token is read again, and not counted."""
    t, d = tl.arange(0, PAGE), tl.arange(0, acc.shape[0])
    kv_ptr += group * DIM
    values_at, token = kv_heads * DIM, 2 * kv_heads * DIM
    place = tl.load(block_table_ptr + first // PAGE).to(tl.int64) * PAGE * token
    page = tl.load(block_table_ptr + tl.minimum(first + PAGE, last) // PAGE).to(tl.int64)
    for start in tl.range(first, end, PAGE, num_stages=2):
        at = kv_ptr + place + tl.minimum(t, last - start)[:, None] * token + d[None, :]
        k = tl.load(at, mask=(d < DIM)[None, :], other=0.0)
        v = tl.load(at + values_at, mask=(d < DIM)[None, :], other=0.0)
        place = page * PAGE * token
        page = tl.load(block_table_ptr + tl.minimum(start + 2 * PAGE, last) // PAGE).to(tl.int64)
        seen = is_seen(start + t, first_seen, last, WINDOW)
        top, total, acc = attend_page(k, tl.trans(v), top, top, q, seen, scale, top, total, acc, False)
    return top, total, acc


@triton.jit
def attend_scaled_span(
    q, words_ptr, scales_ptr, block_table_ptr, group, first, end, first_seen, last, scale, kv_heads, top, total, acc,
    DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, MULTIPLY: tl.constexpr,
):  # fmt: skip
    """A span of an E4M3 cache, whose values lie across. A page is brought into registers while the one before is worked
    on, in words of four numbers: single ones would be given a register each between two turns of the loop, and by way
    of shared memory E4M3 would be transposed byte by byte."""
    t, d = tl.arange(0, PAGE), tl.arange(0, acc.shape[0])
    key_word, value_word = tl.arange(0, acc.shape[0] // 4)[None, :], tl.arange(0, PAGE // 4)[None, :]
    token = kv_heads * (DIM // 4)  # words from one token's keys to the next's
    keys = words_ptr + group * (DIM // 4) + key_word
    values = words_ptr + PAGE * token + (group * DIM + d)[:, None] * (PAGE // 4) + value_word
    key_there, value_there = key_word < DIM // 4, (d < DIM)[:, None]
    scales_ptr += group * PAGE
    page = tl.load(block_table_ptr + first // PAGE).to(tl.int64)
    here = tl.minimum(t, last - first)
    begin, scales = page * (2 * PAGE * token), scales_ptr + page * (2 * kv_heads * PAGE) + here
    next_k = tl.load(keys + begin + here[:, None] * token, mask=key_there, other=0)
    next_v = tl.load(values + begin, mask=value_there, other=0)
    next_k_scale, next_v_scale = tl.load(scales), tl.load(scales + kv_heads * PAGE)
    page = tl.load(block_table_ptr + tl.minimum(first + PAGE, last) // PAGE).to(tl.int64)
    for start in tl.range(first, end, PAGE, num_stages=1):
        seen = is_seen(start + t, first_seen, last, WINDOW)
        k, v, k_scale, v_scale = opened(next_k, MULTIPLY), opened(next_v, MULTIPLY), next_k_scale, next_v_scale
        v = tl.where(seen[None, :], v, 0.0)  # what another row has left there may be no number
        more = start + PAGE < end
        here = tl.maximum(tl.minimum(t, last - start - PAGE), 0)
        begin, scales = page * (2 * PAGE * token), scales_ptr + page * (2 * kv_heads * PAGE) + here
        next_k = tl.load(keys + begin + here[:, None] * token, mask=key_there & more, other=0)
        next_v = tl.load(values + begin, mask=value_there & more, other=0)
        next_k_scale = tl.load(scales, mask=more, other=1.0)
        next_v_scale = tl.load(scales + kv_heads * PAGE, mask=more, other=1.0)
        page = tl.load(block_table_ptr + tl.minimum(start + 2 * PAGE, last) // PAGE).to(tl.int64)
        top, total, acc = attend_page(k, v, k_scale, v_scale, q, seen, scale, top, total, acc, True)
    return top, total, acc


@triton.jit
def gqa_decode_kernel(
    q_ptr, kv_ptr, scales_ptr, block_table_ptr, seq_lens_ptr, acc_ptr, top_ptr, total_ptr, scale, heads, per_group,
    block_table_row, kv_heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, SCALED: tl.constexpr, MULTIPLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row's spans, every so many (the third dimension's programs), for up to BLOCK_H heads that share keys. `scale`
    is in units of log 2, and so is `top`. SCALED: the cache holds E4M3, in words of four, which is multiplied as
    MULTIPLY, exactly."""
    row, blocks = tl.program_id(0), tl.cdiv(per_group, BLOCK_H)
    group = tl.program_id(1) // blocks
    member = tl.program_id(1) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    last = tl.load(seq_lens_ptr + row) - 1
    first_seen, begin = window_of(last + 1, WINDOW, PAGE)
    span = span_of(last + 1 - begin, PAGE, SPLITS)
    block_table_ptr += row * block_table_row
    let_next_start(PDL)
    wait_for_previous(PDL)
    whole = (row * heads + group * per_group + member).to(tl.int64)
    inside = (member < per_group)[None, :]
    q = tl.load(q_ptr + whole[None, :] * DIM + d[:, None], mask=inside & (d < DIM)[:, None], other=0.0).to(MULTIPLY)
    for split in tl.range(tl.program_id(2), tl.cdiv(last + 1 - begin, span), tl.num_programs(2), num_stages=1):
        top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_H,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_D, BLOCK_H), dtype=tl.float32)
        first = begin + split * span
        end = tl.minimum(first + span, last + 1)
        if SCALED:
            top, total, acc = attend_scaled_span(
                q, kv_ptr, scales_ptr, block_table_ptr, group, first, end, first_seen, last, scale, kv_heads, top,
                total, acc, DIM, PAGE, WINDOW, MULTIPLY,
            )  # fmt: skip
        else:
            top, total, acc = attend_span(
                q, kv_ptr, block_table_ptr, group, first, end, first_seen, last, scale, kv_heads, top, total, acc,
                DIM, PAGE, WINDOW,
            )  # fmt: skip
        place = whole * SPLITS + split
        tl.store(top_ptr + place, top, mask=member < per_group)
        tl.store(total_ptr + place, total, mask=member < per_group)
        tl.store(acc_ptr + place[None, :] * DIM + d[:, None], acc, mask=inside & (d < DIM)[:, None])


def paged_gqa(
    q, cache: KV, block_table, seq_lens, scratch, scale: float, kv_heads: int, splits: int, window: int | None
) -> None:
    """Spans of every row, into `scratch`. `scale` is in units of log 2."""
    (rows, heads, dim), scaled = q.shape, cache.scales is not None
    per_group = heads // kv_heads
    columns = kv_heads * triton.cdiv(per_group, HEADS_PER_PROGRAM)
    gqa_decode_kernel[(rows, columns, programs_for(rows * columns, splits))](
        q, cache.values.view(torch.int32) if scaled else cache.values, cache.scales if scaled else q, block_table,
        seq_lens, *scratch, scale, heads, per_group, block_table.stride(0), kv_heads,
        DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_H=HEADS_PER_PROGRAM, PAGE=cache.page_size,
        SPLITS=splits, WINDOW=window, SCALED=scaled, MULTIPLY=TRITON_DTYPE[multiplied(q, cache)], num_warps=4,
        **overlap(q),
    )  # fmt: skip
