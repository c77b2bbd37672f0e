"""FP8 products of few rows on Hopper (sm_90): the weight comes into shared memory before its input is there.

A decode step is a chain of products with small kernels between them, and reading weights is nearly all of its time. A
weight is nobody's output, so a program asks for as much of its piece as it has room for, by TMA, and only then waits
for the kernel before it: memory works on while the small kernel runs. What comes out is as in `narrow.py`; cuts follow
N and K and what `tuned.csv` says of them, never the rows. Written in Gluon, where a copy may begin long before the loop
that reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.launch import multiprocessors, overlap, shared_memory
from kernels.tuned import Tuned, tuned

BLOCK_N = 64  # rows of the weight: what four warps multiply
MOST_BLOCKS = 16  # of K that are on their way
LONGEST_K = 1 << 16  # the scales of a whole piece of K lie in shared memory
RESERVED = 1024  # bytes of shared memory that the card takes for each program


class Tile(NamedTuple):
    splits: int  # along K
    chunk: int  # blocks of K that one copy brings: 1 or 2
    stages: int  # chunks that are on their way or being read
    block_m: int


def streamed_tile(
    rows: int, n: int, k_blocks: int, programs_at_once: int, room: int, tuned: Tuned | None = None
) -> Tile:
    """K is cut by N and the blocks of K alone, never by the rows: as `tuned` says, or until there are about as many
    programs as an H200 has multiprocessors. As deep as lets all programs of one of the card's multiprocessors
    (`programs_at_once`, `room` bytes each) run at the same time, with two blocks at least; up to MOST_BLOCKS or what
    `tuned` says, because the rest is room for the programs of the product after it."""
    tiles, splits, block_m = triton.cdiv(n, BLOCK_N), 1, max(16, triton.next_power_of_2(rows))
    while splits < 4 and tiles * splits < 128 and k_blocks >= 4 * splits:
        splits *= 2
    most = MOST_BLOCKS
    if tuned:
        splits, most = tuned.splits, tuned.blocks_16 if block_m == 16 else tuned.blocks_32
    blocks = triton.cdiv(triton.cdiv(k_blocks, 2), splits) * 2
    each = room // triton.cdiv(tiles * splits, programs_at_once) - RESERVED
    each -= triton.next_power_of_2(blocks) * block_m * 4  # scales
    blocks_at_once = max(2, min(each // ((BLOCK_N + block_m) * 128), blocks, most))
    chunk = 2 if blocks_at_once >= 6 or blocks_at_once >= blocks else 1
    return Tile(splits, chunk, blocks_at_once // chunk, block_m)


def streams(k: int) -> bool:
    """Whether a product over `k` can be one of these."""
    return k % 128 == 0 and k <= LONGEST_K


@gluon.jit
def ask(desc, ring, full, turn, row, chunk, count):
    """Begins the copy of one chunk `[CHUNK, rows, 128]` of K, where there is one."""
    STAGES: gl.constexpr = ring.shape[0]
    CHUNK: gl.constexpr = ring.shape[1]
    at = turn % STAGES
    tma.async_copy_global_to_shared(desc, [chunk * CHUNK, row, 0], full.index(at), ring.index(at), pred=turn < count)


@gluon.jit
def streamed_gemm_kernel(
    a_desc, a_s_ptr, b_desc, b_s_ptr, c_ptr, M, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLITS: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr,
    BLOCKS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A `[BLOCK_N, BLOCK_M]` tile of the transposed result over one piece of K: chunks of CHUNK blocks of 128, at most
    BLOCKS blocks in all. What lies behind K is zeros, with a scale of zero."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    BYTES: gl.constexpr = CHUNK * (BLOCK_M + BLOCK_N) * 128
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, CHUNK, BLOCK_M, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, CHUNK, BLOCK_N, 128], b_desc.layout)
    a_blocks = a_ring._reinterpret(gl.float8e4nv, [STAGES * CHUNK, BLOCK_M, 128], tile)
    b_blocks = b_ring._reinterpret(gl.float8e4nv, [STAGES * CHUNK, BLOCK_N, 128], tile)
    scales = gl.allocate_shared_memory(gl.float32, [BLOCKS, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    scale_of = scales._reinterpret(gl.float32, [BLOCKS, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    n0, k_blocks = gl.program_id(0) * BLOCK_N, gl.cdiv(K, 128)
    pairs = gl.cdiv(k_blocks, 2)  # K is cut between pairs of blocks, whatever the chunk
    first = pairs * gl.program_id(1) // SPLITS * (2 // CHUNK)
    count = pairs * (gl.program_id(1) + 1) // SPLITS * (2 // CHUNK) - first
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(STAGES):
        mbarrier.expect(full.index(stage), BYTES, pred=stage < count)
    for stage in gl.static_range(STAGES):
        ask(b_desc, b_ring, full, stage, n0, first + stage, count)
    block = first * CHUNK + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, flat))
    b_s = gl.load(b_s_ptr + n0 // 128 * k_blocks + block, mask=block < k_blocks, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for stage in gl.static_range(STAGES):
        ask(a_desc, a_ring, full, stage, 0, first + stage, count)
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, flat))
    there = (block < k_blocks)[:, None] & (row < M)[None, :]
    a_s = gl.load(a_s_ptr + row[None, :] * k_blocks + block[:, None], mask=there, other=0.0)
    scales.store(a_s * b_s[:, None])
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    acc = zero
    for turn in range(count):
        at = turn % STAGES
        mbarrier.wait(full.index(at), turn // STAGES & 1)
        products = ()
        for j in gl.static_range(CHUNK):
            b, a = b_blocks.index(at * CHUNK + j), a_blocks.index(at * CHUNK + j).permute((1, 0))
            products += (warpgroup_mma(b, a, zero, use_acc=False, is_async=True),)
        for j in gl.static_range(CHUNK):  # the tensor core's own accumulator keeps too few bits: promote every 128
            scale = scale_of.index(turn * CHUNK + j).load(gl.SliceLayout(0, layout))
            acc += warpgroup_mma_wait(CHUNK - 1 - j, deps=(products[j],)) * scale[None, :]
        tl.debug_barrier()  # all warps have read the stage
        mbarrier.expect(full.index(at), BYTES, pred=turn + STAGES < count)
        ask(b_desc, b_ring, full, turn + STAGES, n0, first + turn + STAGES, count)
        ask(a_desc, a_ring, full, turn + STAGES, 0, first + turn + STAGES, count)
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    c_ptrs = c_ptr + (gl.program_id(1) * M + m)[None, :].to(gl.int64) * N + n[:, None]
    gl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def described(t: torch.Tensor, chunk: int, rows: int) -> TensorDescriptor:
    """`t [rows, K]` as blocks of 128 along K, `[K / 128, rows, 128]`, of which one copy brings `chunk`."""
    block = [chunk, rows, 128]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return TensorDescriptor(t, [t.shape[1] // 128, t.shape[0], 128], [128, t.stride(0), 1], block, layout)


def streamed(a, b, a_s, b_s, out_dtype: torch.dtype, tile: Tile | None = None) -> torch.Tensor:
    """Partial sums `[P, M, N]`, of one part in `out_dtype`, of more in float32. `a` and `b` float8_e4m3fn, K a multiple
    of 128."""
    a, (rows, k), n = a.contiguous(), a.shape, len(b)
    tile = tile or streamed_tile(rows, n, k // 128, multiprocessors(a), shared_memory(a), tuned(b))
    splits, chunk, stages, block_m = tile
    c = torch.empty(splits, rows, n, dtype=out_dtype if splits == 1 else torch.float32, device=a.device)
    blocks = triton.next_power_of_2(triton.cdiv(triton.cdiv(k // 128, 2), splits) * 2)
    if rows:
        streamed_gemm_kernel[(triton.cdiv(n, BLOCK_N), splits)](
            described(a, chunk, block_m), a_s.contiguous(), described(b, chunk, BLOCK_N), b_s, c, rows, n, k,
            BLOCK_M=block_m, BLOCK_N=BLOCK_N, SPLITS=splits, CHUNK=chunk, STAGES=stages, BLOCKS=blocks, num_warps=4,
            **overlap(a),
        )  # fmt: skip
    return c
