"""FP8 products of many rows on cards with TMA (sm_90 and newer): one instruction copies a whole tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import let_next_start, overlap, wait_for_previous

SPLIT_ROWS = 256  # up to this many, K is cut to have enough programs


@triton.jit
def tma_gemm_kernel(
    a_desc, a_s_ptr, b_desc, b_s_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_N]` tile of an FP8 product over one split of K. Tiles go in bands of GROUP along M, so that
    those at work at the same time share what they read in the L2 cache."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP * n_tiles)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - band * GROUP, GROUP)
    inside = pid % (GROUP * n_tiles)
    first_m, first_n = (band * GROUP + inside % height) * BLOCK_M, inside // height * BLOCK_N
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    k_blocks = tl.cdiv(K, 128)
    first = k_blocks * tl.program_id(1) // SPLITS
    last = k_blocks * (tl.program_id(1) + 1) // SPLITS
    a_s_ptrs = a_s_ptr + tl.minimum(m, M - 1) * k_blocks
    b_s_ptrs = b_s_ptr + (first_n // 128) * k_blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    let_next_start(PDL)
    wait_for_previous(PDL)
    for i in tl.range(first, last, num_stages=STAGES):
        a = a_desc.load([first_m, i * 128])
        b = b_desc.load([first_n, i * 128])
        scale = tl.load(a_s_ptrs + i) * tl.load(b_s_ptrs + i)
        # the tensor core's own accumulator keeps too few bits for a long K: promote every 128
        acc += tl.dot(a, b.T) * scale[:, None]
    c_ptrs = c_ptr + (tl.program_id(1).to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


class Tile(NamedTuple):
    block_m: int
    block_n: int
    splits: int  # along K
    num_stages: int


def tma_tile(rows: int, n: int, k_blocks: int) -> Tile:
    """Three programs of 64x128 share a multiprocessor: while one scales what it has summed, the others multiply. Few
    rows have too few such tiles to go round: smaller ones, and K split in up to four."""
    if rows > SPLIT_ROWS:
        return Tile(64, 128, 1, 3)
    tiles, splits = triton.cdiv(rows, 64) * triton.cdiv(n, 64), 1
    while splits < 4 and tiles * splits < 256 and k_blocks >= 4 * splits:
        splits *= 2
    return Tile(64, 64, splits, 4)


def tma_product(a, b, a_s, b_s, out_dtype, tile: Tile | None = None) -> torch.Tensor:
    """Partial sums `[P, M, N]`, of one part in `out_dtype`, of more in float32. `a` and `b` float8_e4m3fn."""
    (rows, k), n = a.shape, len(b)
    tile = tile or tma_tile(rows, n, triton.cdiv(k, 128))
    c = torch.empty(tile.splits, rows, n, dtype=out_dtype if tile.splits == 1 else torch.float32, device=a.device)
    described = (TensorDescriptor.from_tensor(t, [size, 128]) for t, size in ((a, tile.block_m), (b, tile.block_n)))
    a_desc, b_desc = described
    tma_gemm_kernel[(triton.cdiv(rows, tile.block_m) * triton.cdiv(n, tile.block_n), tile.splits)](
        a_desc, a_s.contiguous(), b_desc, b_s, c, rows, n, k,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=32, SPLITS=tile.splits, STAGES=tile.num_stages, num_warps=4,
        **overlap(a),
    )  # fmt: skip
    return c
