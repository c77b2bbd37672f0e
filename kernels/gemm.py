"""Matrix products in Triton: block-scaled FP8, and the plain one for what stays BF16 (head, gate, absorbed MLA).

Row invariance: up to `INVARIANT_ROWS` rows use one tile shape, in which each row of the result is a fixed sequence of
operations on that row of `a` alone. A running row therefore gets the same bits alone and in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.quant import decode_e4m3
from kernels.reference import INVARIANT_ROWS, has_fp8_units


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def fp8_tile(m: int, n: int, k: int) -> Tile:
    """Tile by M-class, N and K. Few rows: the weight is what moves, so narrow tiles put it on many SMs."""
    if m <= INVARIANT_ROWS:
        return Tile(16, 32 if n <= 8192 else 64, 4, 5 if k >= 1024 else 3)
    if m <= 64:
        return Tile(64, 64, 4, 4)
    return Tile(64, 128, 4, 4) if m <= 256 or n < 1024 else Tile(128, 128, 8, 4)


@triton.jit
def fp8_gemm_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, c_ptr, M, N, K,
    DECODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_N]` tile; BLOCK_N divides 128, so a tile meets one weight scale per K-block."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_blocks = K // BLOCK_K
    a_ptrs = a_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    b_ptrs = b_ptr + n[None, :].to(tl.int64) * K + k[:, None]
    a_s_ptrs = a_s_ptr + m * k_blocks
    b_s_ptrs = b_s_ptr + (tl.program_id(1) * BLOCK_N // BLOCK_K) * k_blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(0, k_blocks):
        a = tl.load(a_ptrs + i * BLOCK_K, mask=(m < M)[:, None], other=0.0)
        b = tl.load(b_ptrs + i * BLOCK_K, mask=(n < N)[None, :], other=0.0)
        if DECODE:
            a, b = decode_e4m3(a), decode_e4m3(b)
        a_s = tl.load(a_s_ptrs + i, mask=m < M, other=0.0)
        # the tensor core's own accumulator keeps too few bits for a long K: promote every 128
        acc += tl.dot(a, b) * a_s[:, None] * tl.load(b_s_ptrs + i)
    c_ptrs = c_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, out_dtype: torch.dtype,
    decode: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """`decode=True` takes the path of cards without FP8 units on any card; None asks the card."""
    a, a_s, b, b_s = (t.contiguous() for t in (a, a_s, b, b_s))
    (m, k), n = a.shape, b.shape[0]
    c = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if decode is None:
        decode = not has_fp8_units(a.device)
    if decode:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    tile = fp8_tile(m, n, k)
    if m and n:
        fp8_gemm_kernel[(triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n))](
            a, a_s, b, b_s, c, m, n, k,
            DECODE=decode, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=128,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return c


@triton.jit
def plain_gemm_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, a_batch, a_row, b_batch, b_row, b_col, c_batch, c_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptrs = a_ptr + batch * a_batch + m[:, None].to(tl.int64) * a_row
    b_ptrs = b_ptr + batch * b_batch + n[None, :].to(tl.int64) * b_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptrs + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptrs + k[:, None] * b_col, mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        acc += tl.dot(a, b, input_precision="ieee")
    c_ptrs = c_ptr + batch * c_batch + m[:, None].to(tl.int64) * c_row + n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def plain_gemm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if a.stride(-1) != 1:
        a = a.contiguous()
    (m, k), n = a.shape[-2:], b.shape[-2]
    c = torch.empty(*a.shape[:-1], n, dtype=out_dtype, device=a.device)
    batches = a.shape[0] if a.ndim == 3 else 1
    batch_strides = [t.stride(0) if t.ndim == 3 else 0 for t in (a, b, c)]
    tile = Tile(16, 32, 4, 3) if m <= INVARIANT_ROWS else Tile(64, 64, 4, 3)
    if m:
        plain_gemm_kernel[(triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n), batches)](
            a, b, c, m, n, k,
            batch_strides[0], a.stride(-2), batch_strides[1], b.stride(-2), b.stride(-1),
            batch_strides[2], c.stride(-2),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=64,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return c
