"""Causal attention of a piece of a prompt in Triton: one pass over the keys with a running softmax, no scores in memory
(FlashAttention, Dao et al., 2022, arXiv:2205.14135)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, shared_memory, wait_for_previous


@triton.jit
def attend(
    top, total, acc, q, q_rest, k_ptr, v_ptr, seen, last, tokens, scale, k_token, v_token,
    DIM: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes in the keys and values of the tokens `seen [BLOCK_N]`; `last [BLOCK_M]` is the last that a query may see,
    asked only where MASKED. `scale` is in units of log 2. Returns the largest score, the sum and the output so far."""
    d, r, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    there = (seen < tokens)[:, None]
    k_rows = k_ptr + seen[:, None].to(tl.int64) * k_token
    keys = tl.load(k_rows + d[None, :], mask=there & (d < DIM)[None, :], other=0.0)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if REST:
        rest = tl.load(k_rows + DIM + r[None, :], mask=there & (r < REST)[None, :], other=0.0)
        scores = tl.dot(q_rest, rest.T, scores, input_precision="ieee")
    scores *= scale
    if MASKED:
        scores = tl.where(seen[None, :] <= last[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    values = v_ptr + seen[:, None].to(tl.int64) * v_token + v[None, :]
    values = tl.load(values, mask=there & (v < VALUE)[None, :], other=0.0)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(p, axis=1), acc


@triton.jit
def causal_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, queries, tokens, scale, heads, share, q_token, q_head, k_token, k_head, v_token,
    v_head,
    DIM: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a head: first the keys that all of them see, then those where they differ. A head's width is
    DIM, a power of two, and REST."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest rows first
    t, n = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, r, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    wait_for_previous(PDL)
    let_next_start(PDL)
    inside = (t < queries)[:, None]
    q_rows = q_ptr + t[:, None].to(tl.int64) * q_token + head * q_head
    q = tl.load(q_rows + d[None, :], mask=inside & (d < DIM)[None, :], other=0.0)
    q_rest = q
    if REST:
        q_rest = tl.load(q_rows + DIM + r[None, :], mask=inside & (r < REST)[None, :], other=0.0)
    k_ptr += head // share * k_head
    v_ptr += head // share * v_head
    before = tokens - queries
    last = t + before
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    common = (block * BLOCK_M + before + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum((block + 1) * BLOCK_M + before, tokens)
    for start in tl.range(0, common, BLOCK_N, num_stages=STAGES):
        top, total, acc = attend(
            top, total, acc, q, q_rest, k_ptr, v_ptr, start + n, last, tokens, scale, k_token, v_token,
            DIM, REST, VALUE, BLOCK_D, BLOCK_R, BLOCK_V, False,
        )  # fmt: skip
    for start in tl.range(common, end, BLOCK_N, num_stages=1):
        top, total, acc = attend(
            top, total, acc, q, q_rest, k_ptr, v_ptr, start + n, last, tokens, scale, k_token, v_token,
            DIM, REST, VALUE, BLOCK_D, BLOCK_R, BLOCK_V, True,
        )  # fmt: skip
    out = out_ptr + (t[:, None].to(tl.int64) * heads + head) * VALUE + v[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside & (v < VALUE)[None, :])


LOG2_E = 1.4426950408889634


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    (queries, heads, width), (tokens, groups, value) = q.shape, v.shape
    out = torch.empty(queries, heads, value, dtype=q.dtype, device=q.device)
    dim = 1 << (width.bit_length() - 1)
    if q.element_size() == 4 or shared_memory(q) < 160 << 10:
        block_m, block_n, warps, stages = 32, 32, 4, 1
    elif queries <= 256:
        block_m, block_n, warps, stages = 64, 64, 4, 2
    else:
        block_m, block_n, warps, stages = 128, 64, 8, 3
    causal_attention_kernel[(triton.cdiv(queries, block_m), heads)](
        q, k, v, out, queries, tokens, scale * LOG2_E, heads, heads // groups, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2],
        DIM=dim, REST=width - dim, VALUE=value, BLOCK_D=max(dim, 16),
        BLOCK_R=max(16, triton.next_power_of_2(width - dim)), BLOCK_V=max(16, triton.next_power_of_2(value)),
        BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, num_warps=warps, num_stages=stages, **overlap(q),
    )  # fmt: skip
    return out
