"""Decode attention in Triton over a paged cache: MLA in its latent space, and grouped-query attention.

Heads that read the same keys share a program, so a page is loaded once for up to 16 of them: with MLA that is every
head (after absorption it is multi-query attention), with GQA the heads of a group. The loop over pages has a row's own
length: nothing depends on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS_PER_PROGRAM = 16  # the smallest M that a tensor core takes


@triton.jit
def mla_decode_kernel(
    q_ptr, cache_ptr, pages_ptr, lengths_ptr, out_ptr, scale, heads, pages_row,
    VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    v, r, t = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R), tl.arange(0, PAGE)
    length = tl.load(lengths_ptr + row)
    dim: tl.constexpr = VALUE_DIM + ROPE_DIM
    q_row = q_ptr + (row * heads + head[:, None]).to(tl.int64) * dim
    q_v = tl.load(q_row + v[None, :], mask=(head < heads)[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
    q_r = tl.load(q_row + VALUE_DIM + r[None, :], mask=(head < heads)[:, None] & (r < ROPE_DIM)[None, :], other=0.0)
    top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_V), dtype=tl.float32)
    for start in range(0, length, PAGE):
        page = tl.load(pages_ptr + row * pages_row + start // PAGE).to(tl.int64)
        seen = start + t < length
        keys = cache_ptr + (page * PAGE + t)[:, None] * dim
        k_v = tl.load(keys + v[None, :], mask=seen[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
        k_r = tl.load(keys + VALUE_DIM + r[None, :], mask=seen[:, None] & (r < ROPE_DIM)[None, :], other=0.0)
        scores = tl.dot(q_v, tl.trans(k_v), input_precision="ieee") + tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(k_v.dtype), k_v, input_precision="ieee")
        top = new_top
    out = out_ptr + (row * heads + head[:, None]).to(tl.int64) * VALUE_DIM + v[None, :]
    inside = (head < heads)[:, None] & (v < VALUE_DIM)[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def mla_decode(
    q: torch.Tensor, cache: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, scale: float, value_dim: int
) -> torch.Tensor:
    rows, heads, dim = q.shape
    out = torch.empty(rows, heads, value_dim, dtype=q.dtype, device=q.device)
    rope_dim = dim - value_dim
    mla_decode_kernel[(rows, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        q.contiguous(), cache, pages, lengths, out, scale, heads, pages.stride(0),
        VALUE_DIM=value_dim, ROPE_DIM=rope_dim,
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)), BLOCK_R=max(16, triton.next_power_of_2(rope_dim)),
        BLOCK_H=HEADS_PER_PROGRAM, PAGE=cache.shape[1], num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def gqa_decode_kernel(
    q_ptr, cache_ptr, pages_ptr, lengths_ptr, out_ptr, scale, heads, kv_heads, pages_row,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0), tl.program_id(1)
    per_group = heads // kv_heads
    member = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    d, t = tl.arange(0, BLOCK_D), tl.arange(0, PAGE)
    length = tl.load(lengths_ptr + row)
    at = (row * heads + group * per_group + member[:, None]).to(tl.int64) * DIM + d[None, :]
    inside = (member < per_group)[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    for start in range(0, length, PAGE):
        page = tl.load(pages_ptr + row * pages_row + start // PAGE).to(tl.int64)
        seen = start + t < length
        keys = cache_ptr + (page * PAGE + t)[:, None] * (2 * kv_heads * DIM) + group * DIM + d[None, :]
        mask = seen[:, None] & (d < DIM)[None, :]
        k = tl.load(keys, mask=mask, other=0.0)
        v = tl.load(keys + kv_heads * DIM, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def gqa_decode(
    q: torch.Tensor, cache: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, scale: float, kv_heads: int
) -> torch.Tensor:
    rows, heads, dim = q.shape
    out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    gqa_decode_kernel[(rows, kv_heads, triton.cdiv(heads // kv_heads, HEADS_PER_PROGRAM))](
        q.contiguous(), cache, pages, lengths, out, scale, heads, kv_heads, pages.stride(0),
        DIM=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_H=HEADS_PER_PROGRAM, PAGE=cache.shape[1], num_warps=4,
    )  # fmt: skip
    return out
