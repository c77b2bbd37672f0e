"""FP8 products of few rows on Hopper (sm_90): the weight comes into shared memory before its input is there.

A decode step is a chain of products with small kernels between them, and nearly all of its time goes into reading
weights. No kernel writes a weight, so a program starts copying as much of its split as fits into its shared memory, by
TMA, and only then waits for the kernel before it: memory stays busy while the small kernel runs. (Experts that were
only just chosen are copied once the choice is there.) The result is as in `narrow.py`; splits follow N, K and
`tuned.csv`, never the rows. Written in Gluon, where a copy may begin long before the loop that reads it.
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

from kernels.gemm.tuned import Tuned, tuned
from kernels.launch import multiprocessors, overlap, shared_memory

BLOCK_N = 64  # rows of the weight: what four warps multiply
MOST_BLOCKS = 16  # of K that are on their way
WAVE = 3  # programs of experts that share a multiprocessor, at most
LONGEST_K = 1 << 16  # the scales of a whole split of K lie in shared memory
RESERVED = 1024  # bytes of shared memory that the card takes for each program


class Tile(NamedTuple):
    splits: int  # along K
    chunk: int  # blocks of K that one copy brings: 1 or 2
    stages: int  # chunks that are on their way or being read
    block_m: int


def streamed_tile(
    rows: int, n: int, k_blocks: int, at_once: int, shared_bytes: int, tuned: Tuned | None = None
) -> Tile:
    """K is cut by N and the blocks of K alone, never by the rows: as `tuned` says, or until there are about as many
    programs as an H200 has multiprocessors. As deep as lets all programs of one of the card's multiprocessors
    (`at_once`, `shared_bytes` bytes each) run at the same time, with two blocks at least; up to MOST_BLOCKS or what
    `tuned` says, because the next product's programs need shared memory, too."""
    tiles, splits, block_m = triton.cdiv(n, BLOCK_N), 1, max(16, triton.next_power_of_2(rows))
    while splits < 4 and tiles * splits < 128 and k_blocks >= 4 * splits:
        splits *= 2
    most = MOST_BLOCKS
    if tuned:
        splits, most = tuned.splits, tuned.blocks_16 if block_m == 16 else tuned.blocks_32
    blocks = triton.cdiv(triton.cdiv(k_blocks, 2), splits) * 2
    return deepest_tile(tiles * splits, blocks, splits, block_m, most, at_once, shared_bytes)


def expert_tile(choices: int, n: int, k_blocks: int, at_once: int, shared_bytes: int) -> Tile:
    """K is not cut: experts have each other. Depth as in `streamed_tile`; with many choices programs come in waves."""
    programs = min(triton.cdiv(n, BLOCK_N) * max(choices, 1), WAVE * at_once)
    return deepest_tile(programs, triton.cdiv(k_blocks, 2) * 2, 1, 16, MOST_BLOCKS, at_once, shared_bytes)


def deepest_tile(
    programs: int, blocks: int, splits: int, block_m: int, most: int, at_once: int, shared_bytes: int
) -> Tile:
    """As many of a program's `blocks` as fit into shared memory, two at least."""
    each = shared_bytes // triton.cdiv(programs, at_once) - RESERVED
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
    a_desc, a_s_ptr, b_desc, b_s_ptr, c_ptr, experts_ptr, weights_ptr, M, N, K, share, chosen, all_experts,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLITS: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr,
    BLOCKS: gl.constexpr, EXPERTS: gl.constexpr, WEIGHTED: gl.constexpr, SHARED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A `[BLOCK_N, BLOCK_M]` tile of the transposed result over one split of K: chunks of CHUNK blocks of 128, at most
    BLOCKS blocks in all. Past the end of K there are zeros, with a scale of zero.

    EXPERTS: the third grid dimension is a choice of one of `all_experts`. Each row makes `chosen` choices, of which the
    last SHARED are always the last experts; `share` choices read the same row of `a`, and the tile's other rows are not
    used."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    BYTES: gl.constexpr = CHUNK * (BLOCK_M + BLOCK_N) * 128
    KNOWN: gl.constexpr = WEIGHTED or not EXPERTS  # which weight to read, before the kernel before has ended
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
    if PDL and KNOWN:
        tl.extra.cuda.gdc_launch_dependents()
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(STAGES):
        mbarrier.expect(full.index(stage), BYTES, pred=stage < count)
    choice = gl.num_programs(2) - 1 - gl.program_id(2)  # so that a row's shared experts, which begin early, come first
    expert = 0
    if EXPERTS:
        expert = all_experts - chosen + choice % chosen
        if choice % chosen < chosen - SHARED:
            if PDL and not KNOWN:
                tl.extra.cuda.gdc_wait()
            expert = gl.load(experts_ptr + choice)
    a_row, b_row = choice // share, expert * N + n0  # 0 and n0 where there is one weight
    for stage in gl.static_range(STAGES):
        ask(b_desc, b_ring, full, stage, b_row, first + stage, count)
    block = first * CHUNK + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, flat))
    b_s_ptr += (expert * gl.cdiv(N, 128) + n0 // 128) * k_blocks
    b_s = gl.load(b_s_ptr + block, mask=block < k_blocks, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL and not KNOWN:  # late: so that the weighted product after this one finds the choice written
        tl.extra.cuda.gdc_launch_dependents()
    for stage in gl.static_range(STAGES):
        ask(a_desc, a_ring, full, stage, a_row, first + stage, count)
    row = a_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, flat))
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
        ask(b_desc, b_ring, full, turn + STAGES, b_row, first + turn + STAGES, count)
        ask(a_desc, a_ring, full, turn + STAGES, a_row, first + turn + STAGES, count)
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    there = (n < N)[:, None]
    if EXPERTS:
        place = choice + m
        there = there & (m < 1)[None, :]
    else:
        place = gl.program_id(1) * M + m
        there = there & (m < M)[None, :]
    if WEIGHTED:
        acc *= gl.load(weights_ptr + choice)
    gl.store(c_ptr + place[None, :].to(gl.int64) * N + n[:, None], acc.to(c_ptr.dtype.element_ty), mask=there)


def described(t: torch.Tensor, chunk: int, rows: int) -> TensorDescriptor:
    """`t [rows, K]` as blocks of 128 along K, `[K / 128, rows, 128]`, of which one copy brings `chunk`."""
    block = [chunk, rows, 128]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return TensorDescriptor(t, [t.shape[1] // 128, t.shape[0], 128], [128, t.stride(0), 1], block, layout)


def streamed(
    a, b, a_s, b_s, out_dtype: torch.dtype, experts=None, weights=None, shared: int = 0, tile: Tile | None = None
) -> torch.Tensor:
    """Partial sums `[P, M, N]`, of one part in `out_dtype`, of more in float32; with `experts [T, k]` one product per
    choice, `[1, T * k, N]` float32. `a` and `b` float8_e4m3fn, K a multiple of 128."""
    a, (rows, k), n, by_expert = a.contiguous(), a.shape, b.shape[-2], experts is not None
    choices, chosen, stacks = (experts.numel(), experts.shape[1], len(b)) if by_expert else (1, 1, 1)
    if tile is None:
        at_once, shared_bytes = multiprocessors(a), shared_memory(a)
        if by_expert:
            tile = expert_tile(choices, n, k // 128, at_once, shared_bytes)
        else:
            tile = streamed_tile(rows, n, k // 128, at_once, shared_bytes, tuned(b))
    splits, chunk, stages, block_m = tile
    dtype = torch.float32 if by_expert or splits > 1 else out_dtype
    c = torch.empty(splits, choices if by_expert else rows, n, dtype=dtype, device=a.device)
    blocks = triton.next_power_of_2(triton.cdiv(triton.cdiv(k // 128, 2), splits) * 2)
    if rows:
        streamed_gemm_kernel[(triton.cdiv(n, BLOCK_N), splits, choices)](
            described(a, chunk, block_m), a_s.contiguous(), described(b.flatten(0, -2), chunk, BLOCK_N), b_s, c,
            experts if by_expert else c, c if weights is None else weights, rows, n, k,
            choices // rows if by_expert else 1, chosen, stacks,
            BLOCK_M=block_m, BLOCK_N=BLOCK_N, SPLITS=splits, CHUNK=chunk, STAGES=stages, BLOCKS=blocks,
            EXPERTS=by_expert, WEIGHTED=weights is not None, SHARED=shared, num_warps=4, **overlap(a),
        )  # fmt: skip
    return c
