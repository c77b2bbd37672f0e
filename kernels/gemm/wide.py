"""Products of many rows, by pointers: prefill, where a weight meets enough rows to keep the tensor cores busy. Plain
numbers, experts, and FP8 on cards without TMA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, shared_memory, wait_for_previous
from kernels.moe.schedule import Schedule, schedule
from kernels.quant.e4m3 import decode_e4m3, operands


@triton.jit
def wide_gemm_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, c_ptr, order_ptr, block_expert_ptr, block_first_ptr, block_last_ptr, weights_ptr,
    M, N, K, a_row, a_share, c_row,
    FP8: tl.constexpr, DECODE: tl.constexpr, EXPERTS: tl.constexpr, WEIGHTED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_N]` tile. EXPERTS: its rows are choices of one expert, in the schedule's order."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_blocks = tl.cdiv(K, BLOCK_K)
    if EXPERTS:
        place = tl.load(block_first_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
        used = place < tl.load(block_last_ptr + tl.program_id(0))
        expert = tl.load(block_expert_ptr + tl.program_id(0)).to(tl.int64)
        m = tl.load(order_ptr + place, mask=used, other=0)
        b_ptr += expert * N * K
        b_s_ptr += expert * (tl.cdiv(N, 128) * k_blocks)
        source = m // a_share
    else:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        used = m < M
        source = m
    a_ptrs = a_ptr + source[:, None].to(tl.int64) * a_row + k[None, :]
    b_ptrs = b_ptr + n[None, :].to(tl.int64) * K + k[:, None]
    a_s_ptrs = a_s_ptr + source * k_blocks
    b_s_ptrs = b_s_ptr + (tl.program_id(1) * BLOCK_N // 128) * k_blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(0, k_blocks):
        if EVEN:
            a = tl.load(a_ptrs + i * BLOCK_K, mask=used[:, None], other=0.0)
            b = tl.load(b_ptrs + i * BLOCK_K, mask=(n < N)[None, :], other=0.0)
        else:
            there = i * BLOCK_K + k < K
            a = tl.load(a_ptrs + i * BLOCK_K, mask=used[:, None] & there[None, :], other=0.0)
            b = tl.load(b_ptrs + i * BLOCK_K, mask=(n < N)[None, :] & there[:, None], other=0.0)
        if FP8:
            if DECODE:
                a, b = decode_e4m3(a), decode_e4m3(b)
            a_s = tl.load(a_s_ptrs + i, mask=used, other=0.0)
            acc += tl.dot(a, b) * a_s[:, None] * tl.load(b_s_ptrs + i)
        else:
            acc += tl.dot(a, b, input_precision="ieee")
    if WEIGHTED:
        acc *= tl.load(weights_ptr + m, mask=used, other=0.0)[:, None]
    c_ptrs = c_ptr + m[:, None].to(tl.int64) * c_row + n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=used[:, None] & (n < N)[None, :])


def wide(a, b, a_s, b_s, out_dtype, experts=None, weights=None, decode: bool | None = None) -> torch.Tensor:
    """`[1, M, N]` in `out_dtype`: K is not split; with `experts [T, k]` one row per choice, `[1, T * k, N]`."""
    like, (rows, k), n = a, a.shape, b.shape[-2]
    a, b, flags = operands(a, b, a_s, decode)
    block_k = 128 if a_s is not None else 64 if a.element_size() == 2 else 32
    out_rows = rows if experts is None else experts.numel()
    c = torch.empty(1, out_rows, n, dtype=out_dtype, device=like.device)
    small = out_rows <= 256 or n < 1024 or experts is not None or a.element_size() == 4
    block_m, block_n, warps = (64, 64, 4) if small else (128, 128, 8)
    stages = 4 if shared_memory(like) > 160 << 10 or small else 2
    if experts is None:
        plan, blocks = Schedule(c, c, c, c), triton.cdiv(rows, block_m)
    else:
        plan = schedule(experts, len(b), block_m)
        blocks = len(plan.expert)
    if out_rows:
        wide_gemm_kernel[(blocks, triton.cdiv(n, block_n))](
            a, c if a_s is None else a_s.contiguous(), b, c if b_s is None else b_s, c, *plan,
            c if weights is None else weights, rows, n, k, a.stride(0), out_rows // rows, n,
            **flags, EXPERTS=experts is not None, WEIGHTED=weights is not None, EVEN=k % block_k == 0,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages, **overlap(like),
        )  # fmt: skip
    return c
