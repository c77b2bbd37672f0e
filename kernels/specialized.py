"""FP8 products of many rows on Hopper (sm_90), where the warps of a program have roles: one asks for the next blocks of
K, groups of four multiply 64x128 of the program's tile each.

The tensor core's own accumulator keeps too few bits for a long K, so every block of 128 is scaled and added to a sum in
float32 outside of it. That must not cost the tensor core its time. Two groups (a tile of 128x128) begin the second of
two blocks before they scale the first. Three groups (192x128) have no registers left for that, but while one scales,
two multiply; and the next tile's first product begins before the one that has ended goes to memory, which makes up for
a short K. Written in Gluon, Triton's language one level down, where layouts, barriers and who waits for what are ours
to say.
"""

from __future__ import annotations

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

from kernels.launch import multiprocessors

PART = 64  # rows of a group
WIDTH = 128  # columns of a tile
STAGES = 4  # blocks of K that are on their way or being read
BAND = 4  # tiles along M that are worked on together: what they read of `b` is then in the L2 cache
GL_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def tile_at(number, M, N, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, BAND: gl.constexpr):
    """Where the tile begins: tiles go in bands along M. A number past the last begins below the matrix."""
    n_tiles = gl.cdiv(N, WIDTH)
    band, inside = number // (BAND * n_tiles), number % (BAND * n_tiles)
    height = gl.maximum(gl.minimum(gl.cdiv(M, HEIGHT) - band * BAND, BAND), 1)
    return (band * BAND + inside % height) * HEIGHT, inside // height * WIDTH


@gluon.jit
def load_block(a_desc, b_desc, a_ring, b_ring, full, empty, turn, m, n, k):
    """Asks for one block of K as soon as its stage is `empty`; the copies themselves say when it is `full`."""
    STAGES: gl.constexpr = b_ring.shape[0]
    GROUPS: gl.constexpr = a_ring.shape[0] // STAGES
    PART: gl.constexpr = a_ring.shape[1]
    stage = turn % STAGES
    mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)
    mbarrier.expect(full.index(stage), (GROUPS * PART + b_ring.shape[1]) * 128)
    tma.async_copy_global_to_shared(b_desc, [n, k], full.index(stage), b_ring.index(stage))
    for group in gl.static_range(GROUPS):
        a = a_ring.index(stage * GROUPS + group)
        tma.async_copy_global_to_shared(a_desc, [m + group * PART, k], full.index(stage), a)


@gluon.jit
def load_blocks(a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, GROUPS: gl.constexpr, BAND: gl.constexpr):
    """The role of one warp. With three groups one block more than there are: a product too many is begun."""
    HEIGHT: gl.constexpr = GROUPS * a_ring.shape[1]
    WIDTH: gl.constexpr = b_ring.shape[1]
    turn = 0
    for number in range(gl.program_id(0), gl.cdiv(M, HEIGHT) * gl.cdiv(N, WIDTH), gl.num_programs(0)):
        m, n = tile_at(number, M, N, HEIGHT, WIDTH, BAND)
        for block in range(gl.cdiv(K, 128)):
            load_block(a_desc, b_desc, a_ring, b_ring, full, empty, turn, m, n, block * 128)
            turn += 1
    if GROUPS == 3:
        load_block(a_desc, b_desc, a_ring, b_ring, full, empty, turn, 0, 0, 0)


@gluon.jit
def begin_block(a_ring, b_ring, full, turn, zero, GROUP: gl.constexpr):
    """Starts a group's product of one block, once that is there."""
    STAGES: gl.constexpr = b_ring.shape[0]
    stage = turn % STAGES
    mbarrier.wait(full.index(stage), turn // STAGES & 1)
    a, b = a_ring.index(stage * (a_ring.shape[0] // STAGES) + GROUP), b_ring.index(stage).permute((1, 0))
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def end_block(product, empty, turn, STAGES: gl.constexpr, UNDER_WAY: gl.constexpr):
    """Waits until no more than UNDER_WAY products are, and gives the block's stage back."""
    done = warpgroup_mma_wait(UNDER_WAY, deps=(product,))
    mbarrier.arrive(empty.index(turn % STAGES), count=1)
    return done


@gluon.jit
def store_tile(c_desc, c_shared, total, m, n):
    """64 rows of C through TMA, which writes nothing outside of it."""
    tma.store_wait(0)
    c_shared.store(total.to(c_shared.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [m, n], c_shared)


@gluon.jit
def multiply_in_pairs(
    a_s_ptr, b_s_ptr, c_desc, c_shared, a_ring, b_ring, full, empty, M, N, K, GROUP: gl.constexpr, BAND: gl.constexpr
):  # fmt: skip
    """The role of four warps of a program with two such groups."""
    STAGES: gl.constexpr = b_ring.shape[0]
    PART: gl.constexpr = a_ring.shape[1]
    WIDTH: gl.constexpr = b_ring.shape[1]
    HEIGHT: gl.constexpr = a_ring.shape[0] // STAGES * PART
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    zero = gl.zeros([PART, WIDTH], gl.float32, layout)
    k_blocks = gl.cdiv(K, 128)
    turn = 0
    for number in range(gl.program_id(0), gl.cdiv(M, HEIGHT) * gl.cdiv(N, WIDTH), gl.num_programs(0)):
        m, n = tile_at(number, M, N, HEIGHT, WIDTH, BAND)
        m += GROUP * PART
        rows = gl.minimum(m + gl.arange(0, PART, layout=gl.SliceLayout(1, layout)), M - 1)
        a_s, b_s = a_s_ptr + rows * k_blocks, b_s_ptr + n // 128 * k_blocks
        total = zero
        scale = gl.load(a_s) * gl.load(b_s)  # of the block that is scaled next
        for block in range(0, k_blocks - 1, 2):
            one = begin_block(a_ring, b_ring, full, turn, zero, GROUP)
            next_scale = gl.load(a_s + block + 1) * gl.load(b_s + block + 1)
            two = begin_block(a_ring, b_ring, full, turn + 1, zero, GROUP)
            total += end_block(one, empty, turn, STAGES, 1) * scale[:, None]
            following = gl.minimum(block + 2, k_blocks - 1)
            scale = gl.load(a_s + following) * gl.load(b_s + following)
            total += end_block(two, empty, turn + 1, STAGES, 0) * next_scale[:, None]
            turn += 2
        if k_blocks % 2 == 1:
            one = begin_block(a_ring, b_ring, full, turn, zero, GROUP)
            total += end_block(one, empty, turn, STAGES, 0) * scale[:, None]
            turn += 1
        store_tile(c_desc, c_shared.index(GROUP), total, m, n)
    tma.store_wait(0)


@gluon.jit
def add_scaled(total, done, scale):
    """`total + done * scale`, where it stands: never moved behind the next product's beginning."""
    asm: gl.constexpr = "fma.rn.f32 $0, $1, $2, $3;"
    operands = [done, scale[:, None].broadcast_to(done.shape), total]
    return gl.inline_asm_elementwise(asm, "=f,f,f,0", operands, dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def multiply_in_turn(
    a_s_ptr, b_s_ptr, c_desc, c_shared, a_ring, b_ring, full, empty, M, N, K, GROUP: gl.constexpr, BAND: gl.constexpr
):  # fmt: skip
    """The role of four warps of a program with three such groups: a product is under way wherever a loop turns. The
    compiler allows that as long as each is waited for with nothing else under way, and nothing is moved between."""
    STAGES: gl.constexpr = b_ring.shape[0]
    PART: gl.constexpr = a_ring.shape[1]
    WIDTH: gl.constexpr = b_ring.shape[1]
    HEIGHT: gl.constexpr = a_ring.shape[0] // STAGES * PART
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    zero = gl.zeros([PART, WIDTH], gl.float32, layout)
    offsets = GROUP * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    k_blocks, columns = gl.cdiv(K, 128), gl.cdiv(N, 128)
    turn = 0
    m, n = tile_at(gl.program_id(0), M, N, HEIGHT, WIDTH, BAND)
    a_s = a_s_ptr + gl.minimum(m + offsets, M - 1) * k_blocks
    b_s = b_s_ptr + n // 128 * k_blocks
    a_scale, b_scale = gl.load(a_s), gl.load(b_s)
    product = begin_block(a_ring, b_ring, full, 0, zero, GROUP)
    for number in range(gl.program_id(0), gl.cdiv(M, HEIGHT) * gl.cdiv(N, WIDTH), gl.num_programs(0)):
        total = zero
        for block in range(1, k_blocks):
            scale = a_scale * b_scale
            a_scale, b_scale = gl.load(a_s + block), gl.load(b_s + block)
            total = add_scaled(total, end_block(product, empty, turn, STAGES, 0), scale)
            product = begin_block(a_ring, b_ring, full, turn + 1, zero, GROUP)
            turn += 1
        scale, here_m, here_n = a_scale * b_scale, m + GROUP * PART, n
        m, n = tile_at(number + gl.num_programs(0), M, N, HEIGHT, WIDTH, BAND)
        a_s = a_s_ptr + gl.minimum(m + offsets, M - 1) * k_blocks
        b_s = b_s_ptr + gl.minimum(n // 128, columns - 1) * k_blocks
        a_scale, b_scale = gl.load(a_s), gl.load(b_s)
        total = add_scaled(total, end_block(product, empty, turn, STAGES, 0), scale)
        product = begin_block(a_ring, b_ring, full, turn + 1, zero, GROUP)
        turn += 1
        store_tile(c_desc, c_shared.index(GROUP), total, here_m, here_n)
    warpgroup_mma_wait(0, deps=(product,))
    tma.store_wait(0)


@gluon.jit
def specialized_gemm_kernel(
    a_desc, a_s_ptr, b_desc, b_s_ptr, c_desc, M, N, K,
    GROUPS: gl.constexpr, PART: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """As many programs as there are multiprocessors take tiles in turn: a tile's first blocks are loaded while the one
    before is stored."""
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * GROUPS, PART, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, WIDTH, 128], b_desc.layout)
    c = gl.allocate_shared_memory(c_desc.dtype, [GROUPS, PART, WIDTH], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)  # all groups have read it
    fence_async_shared()
    # registers of each thread: 232 for the second of two groups, 160 for those of three, 24 for the warp that loads;
    # the first group gets the rest
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (multiply_in_pairs, (a_s_ptr, b_s_ptr, c_desc, c, a_ring, b_ring, full, empty, M, N, K, 0, BAND)),
                (multiply_in_pairs, (a_s_ptr, b_s_ptr, c_desc, c, a_ring, b_ring, full, empty, M, N, K, 1, BAND)),
                (load_blocks, (a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, GROUPS, BAND)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize(
            [
                (multiply_in_turn, (a_s_ptr, b_s_ptr, c_desc, c, a_ring, b_ring, full, empty, M, N, K, 0, BAND)),
                (multiply_in_turn, (a_s_ptr, b_s_ptr, c_desc, c, a_ring, b_ring, full, empty, M, N, K, 1, BAND)),
                (multiply_in_turn, (a_s_ptr, b_s_ptr, c_desc, c, a_ring, b_ring, full, empty, M, N, K, 2, BAND)),
                (load_blocks, (a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, GROUPS, BAND)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def tiles_of(rows: int, n: int, groups: int = 2) -> int:
    return triton.cdiv(rows, groups * PART) * triton.cdiv(n, WIDTH)


def groups_for(rows: int, n: int, k: int, programs: int) -> int:
    """Two or three, whichever is through first: by how many tiles a program gets, and what one takes in units of a
    block of 64 rows. Measured on an H200: three groups are 3% faster a block; the end of a tile is worth three blocks
    of K to two groups, and half a one to three."""
    blocks = triton.cdiv(k, 128)
    two = triton.cdiv(tiles_of(rows, n, 2), programs) * 2 * (blocks + 3)
    three = triton.cdiv(tiles_of(rows, n, 3), programs) * 3 * (blocks + 0.5) * 0.97
    return 2 if two < three else 3


def specialized_product(
    a, b, a_s, b_s, out_dtype: torch.dtype, programs: int | None = None, groups: int | None = None
) -> torch.Tensor:
    """`[1, M, N]` in `out_dtype`, of 16 bits; `a` and `b` float8_e4m3fn, N a multiple of 8. `programs`: default one for
    each multiprocessor."""
    (rows, k), n = a.shape, len(b)
    c = torch.empty(1, rows, n, dtype=out_dtype, device=a.device)
    programs = programs or multiprocessors(a)
    groups = groups or groups_for(rows, n, k, programs)
    a_desc, b_desc, c_desc = (
        TensorDescriptor.from_tensor(t, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
        for t, block, dtype in (
            (a, [PART, 128], gl.float8e4nv),
            (b, [WIDTH, 128], gl.float8e4nv),
            (c[0], [PART, WIDTH], GL_DTYPE[out_dtype]),
        )
    )
    specialized_gemm_kernel[(min(tiles_of(rows, n, groups), programs),)](
        a_desc, a_s.contiguous(), b_desc, b_s, c_desc, rows, n, k,
        GROUPS=groups, PART=PART, WIDTH=WIDTH, STAGES=STAGES, BAND=BAND, num_warps=4,
    )  # fmt: skip
    return c
