"""Products of many rows: prefill, where a weight meets enough rows to keep the tensor cores busy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.forms import Form, Formed
from kernels.gemm.sm90_specialized import WHOLE, Cut, cut_for, specialized_product, specialized_swiglu
from kernels.launch import (
    has_tma,
    is_hopper,
    let_next_start,
    multiprocessors,
    overlap,
    shared_memory,
    wait_for_previous,
)
from kernels.moe.route import Schedule, schedule
from kernels.norm.add_norm import swiglu
from kernels.quant.e4m3 import decode_e4m3, operands

SPLIT_ROWS = 256  # up to this many, K is cut to have enough programs


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


@triton.jit
def tma_gemm_kernel(
    a_desc, a_s_ptr, b_desc, b_s_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_N]` tile of an FP8 product over one piece of K. Tiles go in bands of GROUP along M, so that
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
    rows have too few such tiles to go round: smaller ones, and K in up to four pieces."""
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


def special_cut(like: torch.Tensor, rows: int, n: int, k: int, dtype: torch.dtype) -> Cut | None:
    """How a product on the card of `like` falls into units for warps with roles; None where it is not theirs."""
    if not is_hopper(like) or dtype.itemsize != 2 or n % 8:
        return None
    return cut_for(rows, n, triton.cdiv(k, 128), multiprocessors(like))


def wide_swiglu(a, b, a_s, b_s, form: Form, dtype: torch.dtype) -> Formed:
    """SwiGLU of `b [2 * I, K]`, gate and then up, in one kernel where there is one."""
    quantised = a_s is not None and form.fp8 and not form.plain and not form.ue8m0
    if quantised and special_cut(a, len(a), len(b), a.shape[1], dtype) == WHOLE:
        return specialized_swiglu(a.contiguous(), b, a_s, b_s, dtype)
    return swiglu(wide(a, b, a_s, b_s, dtype), dtype, form)


def wide(a, b, a_s, b_s, out_dtype, experts=None, weights=None, decode: bool | None = None) -> torch.Tensor:
    """Partial sums `[P, M, N]`, as `tma_product`; with `experts [T, k]` one row per choice, `[1, T * k, N]`."""
    like, (rows, k), n = a, a.shape, b.shape[-2]
    a, b, flags = operands(a, b, a_s, decode)
    if experts is None and a_s is not None and has_tma(like) and not flags["DECODE"]:
        if cut := special_cut(like, rows, n, k, out_dtype):
            return specialized_product(a, b, a_s, b_s, out_dtype, cut)
        return tma_product(a, b, a_s, b_s, out_dtype)
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
