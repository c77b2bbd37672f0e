"""Causal attention of a prefill chunk in Triton: one pass over the keys with a running softmax, no scores in memory
(FlashAttention, Dao et al., 2022, arXiv:2205.14135)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention.sm90_specialized_prefill import as_matrix
from kernels.forms import LOG2_E, Form, Formed
from kernels.launch import has_tma, let_next_start, overlap, shared_memory, wait_for_previous
from kernels.quant.e4m3 import allocate, emit, emitted, formed


@triton.jit
def rows_of(
    source, start, column, stride, tokens,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`[COUNT, BLOCK]`: WIDTH columns of the tokens from `start` on, 0 where there is none. `source` is a descriptor
    of what TMA copies, or a pointer."""
    if TMA:
        return source.load([start, column])
    else:
        token, at = start + tl.arange(0, COUNT), tl.arange(0, BLOCK)
        pointers = source + token[:, None].to(tl.int64) * stride + column + at[None, :]
        return tl.load(pointers, mask=(token < tokens)[:, None] & (at < WIDTH)[None, :], other=0.0)


@triton.jit
def attend(
    top, total, acc, q, q_rest, k, k_rest, v, start, last, tokens, scale, k_at, k_token, v_at, v_token,
    DIM: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Takes in the keys and values of BLOCK_N tokens; `last [BLOCK_M]` is the last that a query may see, used only
    where MASKED, and WINDOW how many it sees, if not all. `scale` is in units of log 2. Returns the largest score, the
    sum and the output so far."""
    keys = rows_of(k, start, k_at, k_token, tokens, DIM, BLOCK_N, BLOCK_D, TMA)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if REST:
        rest = rows_of(k_rest, start, k_at + DIM, k_token, tokens, REST, BLOCK_N, BLOCK_R, TMA)
        scores = tl.dot(q_rest, rest.T, scores, input_precision="ieee")
    if MASKED:
        seen = start + tl.arange(0, BLOCK_N)
        there = seen[None, :] <= last[:, None]
        if WINDOW is not None:
            there &= seen[None, :] > (last - WINDOW)[:, None]
        scores = tl.where(there, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    if WINDOW is None:
        finite = new_top
    else:  # a query may see none of the first keys that another of its block sees
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale - finite[:, None])
    shrink = tl.exp2(top - finite)
    values = rows_of(v, start, v_at, v_token, tokens, VALUE, BLOCK_N, BLOCK_V, TMA)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(p, axis=1), acc


@triton.jit
def causal_attention_kernel(
    q_ptr, k, k_rest, v, plain_ptr, q8_ptr, s_ptr, queries, tokens, scale, heads, share, q_token, q_head, k_token,
    k_head, v_token, v_head,
    DIM: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    WINDOW: tl.constexpr, PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a head: first the keys that all of them see, then those where they differ; within a WINDOW
    they differ from the first key on. A head's width is DIM, a power of two, and REST."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest rows first
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, r, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    let_next_start(PDL)
    wait_for_previous(PDL)
    inside = (t < queries)[:, None]
    q_rows = q_ptr + t[:, None].to(tl.int64) * q_token + head * q_head
    q = tl.load(q_rows + d[None, :], mask=inside & (d < DIM)[None, :], other=0.0)
    q_rest = q
    if REST:
        q_rest = tl.load(q_rows + DIM + r[None, :], mask=inside & (r < REST)[None, :], other=0.0)
    k_at, v_at = head // share * k_head, head // share * v_head
    before = tokens - queries
    last = t + before
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    common = (block * BLOCK_M + before + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum((block + 1) * BLOCK_M + before, tokens)
    if WINDOW is not None:
        common = tl.maximum(block * BLOCK_M + before + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    else:
        for start in tl.range(0, common, BLOCK_N, num_stages=STAGES):
            top, total, acc = attend(
                top, total, acc, q, q_rest, k, k_rest, v, start, last, tokens, scale, k_at, k_token, v_at, v_token,
                DIM, REST, VALUE, BLOCK_D, BLOCK_R, BLOCK_V, BLOCK_N, False, TMA, WINDOW,
            )  # fmt: skip
    for start in tl.range(common, end, BLOCK_N, num_stages=1):
        top, total, acc = attend(
            top, total, acc, q, q_rest, k, k_rest, v, start, last, tokens, scale, k_at, k_token, v_at, v_token,
            DIM, REST, VALUE, BLOCK_D, BLOCK_R, BLOCK_V, BLOCK_N, True, TMA, WINDOW,
        )  # fmt: skip
    row = t.to(tl.int64) * heads + head
    y = (acc / total[:, None]).to(q_ptr.dtype.element_ty).to(tl.float32)
    emit(
        y, row[:, None] * VALUE + column[None, :], inside & (column < VALUE)[None, :], row, t < queries,
        plain_ptr, q8_ptr, s_ptr, PLAIN, FP8, UE8M0,
    )  # fmt: skip


class Blocks(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def blocks_for(q: torch.Tensor, width: int) -> Blocks:
    if q.element_size() == 4 or shared_memory(q) < 160 << 10:
        return Blocks(32, 32, 4, 1)
    if len(q) <= 256 or (has_tma(q) and width <= 128):  # two programs to a multiprocessor: one multiplies, one weighs
        return Blocks(64, 64, 4, 3 if has_tma(q) else 2)
    return Blocks(128, 64, 8, 3)


def described(x: torch.Tensor, tokens: int, columns: int) -> TensorDescriptor:
    """What TMA copies of `x [S, G, W]` at once: `columns` of `tokens` tokens."""
    return TensorDescriptor(x, *as_matrix(x), [tokens, columns])


def tiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, *, scale: float, window: int | None
) -> Formed:
    (queries, heads, width), (tokens, groups, value) = q.shape, v.shape
    dim = 1 << (width.bit_length() - 1)
    rest = width - dim
    blocks = blocks_for(q, width)
    powers = all(w & (w - 1) == 0 and w >= 16 for w in (dim, rest or dim, value))
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (k, v))
    tma = has_tma(q) and powers and aligned
    sources = (k, k, v)
    if tma:
        sources = tuple(described(x, blocks.keys, w) for x, w in ((k, dim), (k, rest or dim), (v, value)))
    fused = form if value == 128 else Form(plain=True, fp8=False)  # a head is a block
    out = allocate(fused, queries, heads * value, q)
    pointers, flags = emitted(fused, out, q)
    causal_attention_kernel[(triton.cdiv(queries, blocks.queries), heads)](
        q, *sources, *pointers, queries, tokens, scale * LOG2_E, heads, heads // groups, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2],
        DIM=dim, REST=rest, VALUE=value, BLOCK_D=max(dim, 16), BLOCK_R=max(16, triton.next_power_of_2(rest)),
        BLOCK_V=max(16, triton.next_power_of_2(value)), BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
        STAGES=blocks.num_stages, TMA=tma, WINDOW=window, **flags, num_warps=blocks.num_warps,
        num_stages=blocks.num_stages, **overlap(q),
    )  # fmt: skip
    return out if fused == form else formed(out.plain, form)
