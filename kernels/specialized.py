"""FP8 products of many rows on Hopper (sm_90), where the warps of a program have roles: one asks for the next blocks of
K, two groups of four multiply the halves, 64x128 each, of a tile of 128x128.

The tensor core's own accumulator keeps too few bits for a long K, so every block of 128 is scaled and added to a sum in
float32 outside of it. That must not cost the tensor core its time: a group begins the second of two blocks before it
scales the first, and while it scales the second, the other group multiplies. Written in Gluon, Triton's language one
level down, where layouts, barriers and who waits for what are ours to say.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
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

TILE = 128  # along M and N
STAGES = 4  # blocks of K that are on their way or being read
BAND = 4  # tiles along M that are worked on together: what they read of `b` is then in the L2 cache
SHARED = gl.NVMMASharedLayout.get_default_for([TILE, 128], gl.float8e4nv)
WORKERS = 232  # registers of each thread of the second group; the first gets the rest, the warp that loads 24


@gluon.jit
def tile_at(number, M, N, TILE: gl.constexpr, BAND: gl.constexpr):
    """Where the tile begins: tiles go in bands along M."""
    n_tiles = gl.cdiv(N, TILE)
    band, inside = number // (BAND * n_tiles), number % (BAND * n_tiles)
    height = gl.minimum(gl.cdiv(M, TILE) - band * BAND, BAND)
    return (band * BAND + inside % height) * TILE, inside // height * TILE


@gluon.jit
def load_blocks(a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, TILE: gl.constexpr, BAND: gl.constexpr):
    """The role of one warp: fills the ring's stages as they become `empty`; the copies themselves say when `full`."""
    STAGES: gl.constexpr = a_ring.shape[0]
    turn = 0
    for number in range(gl.program_id(0), gl.cdiv(M, TILE) * gl.cdiv(N, TILE), gl.num_programs(0)):
        m, n = tile_at(number, M, N, TILE, BAND)
        for block in range(gl.cdiv(K, 128)):
            stage = turn % STAGES
            mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), 2 * TILE * 128)
            tma.async_copy_global_to_shared(a_desc, [m, block * 128], full.index(stage), a_ring.index(stage))
            tma.async_copy_global_to_shared(b_desc, [n, block * 128], full.index(stage), b_ring.index(stage))
            turn += 1


@gluon.jit
def begin_block(a_ring, b_ring, full, turn, zero, HALF: gl.constexpr):
    """Starts the product of one block, for the upper or the lower HALF of the tile, once it is there."""
    stage = turn % a_ring.shape[0]
    mbarrier.wait(full.index(stage), turn // a_ring.shape[0] & 1)
    a = a_ring.index(stage).slice(HALF * 64, 64, dim=0)
    return warpgroup_mma(a, b_ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def multiply_blocks(
    a_s_ptr, b_s_ptr, c_ptr, a_ring, b_ring, full, empty, M, N, K,
    HALF: gl.constexpr, TILE: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """The role of four warps: 64 rows of each tile."""
    STAGES: gl.constexpr = a_ring.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // TILE, TILE // 8], [4, 1], [1, 0])
    zero = gl.zeros([64, TILE], gl.float32, layout)
    k_blocks = gl.cdiv(K, 128)
    turn = 0
    for number in range(gl.program_id(0), gl.cdiv(M, TILE) * gl.cdiv(N, TILE), gl.num_programs(0)):
        first_m, first_n = tile_at(number, M, N, TILE, BAND)
        first_m += HALF * 64
        rows = gl.minimum(first_m + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), M - 1)
        a_s, b_s = a_s_ptr + rows * k_blocks, b_s_ptr + first_n // 128 * k_blocks
        total = zero
        scale = gl.load(a_s) * gl.load(b_s)  # of the block that is scaled next
        for block in range(0, k_blocks - 1, 2):
            one = begin_block(a_ring, b_ring, full, turn, zero, HALF)
            next_scale = gl.load(a_s + block + 1) * gl.load(b_s + block + 1)
            two = begin_block(a_ring, b_ring, full, turn + 1, zero, HALF)
            done = warpgroup_mma_wait(1, deps=(one,))
            mbarrier.arrive(empty.index(turn % STAGES), count=1)
            total += done * scale[:, None]
            following = gl.minimum(block + 2, k_blocks - 1)
            scale = gl.load(a_s + following) * gl.load(b_s + following)
            done = warpgroup_mma_wait(0, deps=(two,))
            mbarrier.arrive(empty.index((turn + 1) % STAGES), count=1)
            total += done * next_scale[:, None]
            turn += 2
        if k_blocks % 2 == 1:
            done = warpgroup_mma_wait(0, deps=(begin_block(a_ring, b_ring, full, turn, zero, HALF),))
            mbarrier.arrive(empty.index(turn % STAGES), count=1)
            total += done * scale[:, None]
            turn += 1
        c = gl.convert_layout(total.to(c_ptr.dtype.element_ty), stored)
        m = first_m + gl.arange(0, 64, layout=gl.SliceLayout(1, stored))
        n = first_n + gl.arange(0, TILE, layout=gl.SliceLayout(0, stored))
        place = c_ptr + m[:, None].to(gl.int64) * N + n[None, :]
        gl.store(place, c, mask=(m < M)[:, None] & (n < N)[None, :])


@gluon.jit
def specialized_gemm_kernel(
    a_desc, a_s_ptr, b_desc, b_s_ptr, c_ptr, M, N, K,
    TILE: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, WORKERS: gl.constexpr,
):  # fmt: skip
    """As many programs as there are multiprocessors take tiles in turn: a tile's first blocks are loaded while the one
    before is stored."""
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE, 128], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both groups have read it
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_blocks, (a_s_ptr, b_s_ptr, c_ptr, a_ring, b_ring, full, empty, M, N, K, 0, TILE, BAND)),
            (multiply_blocks, (a_s_ptr, b_s_ptr, c_ptr, a_ring, b_ring, full, empty, M, N, K, 1, TILE, BAND)),
            (load_blocks, (a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, TILE, BAND)),
        ],
        [4, 1],
        [WORKERS, 24],
    )


def tiles_of(rows: int, n: int) -> int:
    return triton.cdiv(rows, TILE) * triton.cdiv(n, TILE)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def specialized_product(a, b, a_s, b_s, out_dtype: torch.dtype, programs: int | None = None) -> torch.Tensor:
    """`[1, M, N]` in `out_dtype`; `a` and `b` float8_e4m3fn. `programs`: default one for each multiprocessor."""
    (rows, k), n = a.shape, len(b)
    c = torch.empty(1, rows, n, dtype=out_dtype, device=a.device)
    a_desc, b_desc = (TensorDescriptor.from_tensor(t, [TILE, 128], SHARED) for t in (a, b))
    specialized_gemm_kernel[(min(tiles_of(rows, n), programs or _multiprocessors(a.get_device())),)](
        a_desc, a_s.contiguous(), b_desc, b_s, c, rows, n, k,
        TILE=TILE, STAGES=STAGES, BAND=BAND, WORKERS=WORKERS, num_warps=4,
    )  # fmt: skip
    return c
