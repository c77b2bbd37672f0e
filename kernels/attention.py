"""Decode attention of MLA in Triton, in the latent space: one program per row and group of heads, paged cache.

Every head reads the same latent (MLA is multi-query attention after absorption), so a program loads a page once for
16 heads. The loop over pages has a row's own length: nothing depends on the other rows.
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
