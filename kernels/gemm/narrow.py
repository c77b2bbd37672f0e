"""Products of few rows: decode, where a weight is read once and the time is what reading it takes.

The small side of the product becomes the N of the tensor core ("swap AB"). Split-K: K is cut so that enough programs
read the weight at once, and the result is partial sums. The op that reads them adds them up in order, which costs less
than a kernel of its own. The cuts follow N and K alone, and each row of the result is a fixed sequence of operations on
that row of `a`, so a row gets the same bits alone and in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, prefetch, wait_for_previous
from kernels.quant.e4m3 import decode_e4m3, operands


class Tile(NamedTuple):
    block_n: int
    splits: int  # along K
    num_warps: int
    num_stages: int
    ahead: int  # blocks of weight that a program prefetches before its input is there


def narrow_tile(n: int, k_blocks: int, alone: bool) -> Tile:
    """By N and the blocks of K, never by the number of rows. K is cut until 256 programs share the weight: about two
    for every multiprocessor; more partial sums cost their readers more than they bring, and experts have each other.
    The pipeline is as deep as lets all programs run at the same time."""
    tiles, splits = -(-n // 64), 1
    while alone and splits < 4 and tiles * splits < 256 and k_blocks >= 4 * splits:
        splits *= 2
    return Tile(64, splits, 4, 3 if tiles * splits > 640 else 5, 2)


@triton.jit
def narrow_gemm_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, c_ptr, experts_ptr, weights_ptr, M, N, K, a_row, a_share, c_part, c_row,
    FP8: tl.constexpr, DECODE: tl.constexpr, EXPERTS: tl.constexpr, WEIGHTED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A `[BLOCK_N, BLOCK_M]` tile of the transposed result over one split of K; BLOCK_N divides 128, so a tile meets
    one weight scale per K-block. EXPERTS: the third grid dimension is a row's choice of an expert instead of rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_blocks = tl.cdiv(K, BLOCK_K)
    first = k_blocks * tl.program_id(1) // SPLITS
    last = k_blocks * (tl.program_id(1) + 1) // SPLITS
    if EXPERTS:  # one row: the rest of the tile is empty
        if AHEAD == 0:
            wait_for_previous(PDL)
        choice = tl.program_id(2)
        expert = tl.load(experts_ptr + choice).to(tl.int64)
        b_ptr += expert * N * K
        b_s_ptr += expert * (tl.cdiv(N, 128) * k_blocks)
        m = choice + tl.arange(0, BLOCK_M)
        used = tl.arange(0, BLOCK_M) < 1
        source = m // a_share
    else:
        m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        used = m < M
        source = m
    if AHEAD > 0:  # no kernel writes weights: prefetch them while the kernel before still runs
        ahead = tl.minimum(first + tl.arange(0, AHEAD), last - 1)
        prefetch(b_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + ahead[None, :] * BLOCK_K)
        wait_for_previous(PDL)
    elif not EXPERTS:
        wait_for_previous(PDL)
    let_next_start(PDL)  # late: so the product after the next finds the chosen experts written
    a_ptrs = a_ptr + source[None, :].to(tl.int64) * a_row + k[:, None]
    b_ptrs = b_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    a_s_ptrs = a_s_ptr + source * k_blocks
    b_s_ptrs = b_s_ptr + (tl.program_id(0) * BLOCK_N // 128) * k_blocks
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        if EVEN:
            a = tl.load(a_ptrs + i * BLOCK_K, mask=used[None, :], other=0.0)
            b = tl.load(b_ptrs + i * BLOCK_K, mask=(n < N)[:, None], other=0.0)
        else:
            there = i * BLOCK_K + k < K
            a = tl.load(a_ptrs + i * BLOCK_K, mask=used[None, :] & there[:, None], other=0.0)
            b = tl.load(b_ptrs + i * BLOCK_K, mask=(n < N)[:, None] & there[None, :], other=0.0)
        if FP8:
            if DECODE:
                a, b = decode_e4m3(a), decode_e4m3(b)
            a_s = tl.load(a_s_ptrs + i, mask=used, other=0.0)
            # the tensor core's own accumulator keeps too few bits for a long K: promote every 128
            acc += tl.dot(b, a) * (a_s * tl.load(b_s_ptrs + i))[None, :]
        else:
            acc += tl.dot(b, a, input_precision="ieee")
    if WEIGHTED:
        acc *= tl.load(weights_ptr + m, mask=used, other=0.0)[None, :]
    c_ptrs = c_ptr + tl.program_id(1).to(tl.int64) * c_part + m[None, :].to(tl.int64) * c_row + n[:, None]
    tl.store(c_ptrs, acc, mask=used[None, :] & (n < N)[:, None])


def narrow(
    a, b, a_s, b_s, experts=None, weights=None, decode: bool | None = None, tile: Tile | None = None
) -> torch.Tensor:
    """Partial sums `[P, M, N]` float32; with `experts [T, k]` one product per choice, `[1, T * k, N]`."""
    like, (rows, k), n = a, a.shape, b.shape[-2]
    a, b, flags = operands(a, b, a_s, decode)
    block_k = 128 if a_s is not None or a.element_size() == 2 else 32
    tile = tile or narrow_tile(n, triton.cdiv(k, 128), experts is None)
    block_m = 16 if rows <= 16 or experts is not None else 32
    out_rows = rows if experts is None else experts.numel()
    known = weights is not None or experts is None  # weighted products come last: the choice was made kernels before
    c = torch.empty(tile.splits, out_rows, n, dtype=torch.float32, device=like.device)
    columns = triton.cdiv(rows, block_m) if experts is None else out_rows
    if out_rows:
        narrow_gemm_kernel[(triton.cdiv(n, tile.block_n), tile.splits, columns)](
            a, c if a_s is None else a_s.contiguous(), b, c if b_s is None else b_s, c,
            c if experts is None else experts, c if weights is None else weights, rows, n, k,
            a.stride(0), out_rows // rows, c.stride(0), n,
            **flags, EXPERTS=experts is not None, WEIGHTED=weights is not None, EVEN=k % block_k == 0,
            BLOCK_M=block_m, BLOCK_N=tile.block_n, BLOCK_K=block_k, SPLITS=tile.splits, STAGES=tile.num_stages,
            AHEAD=tile.ahead if like.is_cuda and known else 0, num_warps=tile.num_warps, **overlap(like),
        )  # fmt: skip
    return c
