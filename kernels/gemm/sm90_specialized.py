"""FP8 products of many rows on Hopper (sm_90), where the warps of a program have roles: one copies the next blocks of
K, two groups of four multiply 64x256 of the program's tile of 128x256 each.

Such a product is bound by what its tiles read from the L2 cache: `K * (128 + 256)` bytes each. The tensor core's own
accumulator keeps too few bits for a long K, so every block of 128 is scaled and added to a float32 sum outside of it.
To keep the tensor core busy meanwhile, one group scales while the other multiplies, and the next tile's first product
starts before the finished tile is stored. The two blocks of 128 columns of a tile need not be neighbours: with gate in
one and up in the other, SwiGLU and its quantisation become the end (epilogue) of the product. Written in
Gluon, Triton's language one level down, where layouts, barriers and who waits for what are ours to say.
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

from kernels.forms import Form, Formed
from kernels.launch import multiprocessors, overlap
from kernels.norm.swiglu import gated
from kernels.quant.e4m3 import allocate, block_scale, quantise

PART = 64  # rows of a group
GROUPS = 2
WIDTH = 128  # columns of a block, of which a tile has two, or one where few tiles have to go round
STAGES = {1: 6, 2: 4}  # by a tile's blocks of columns: blocks of K that are on their way or being read
BAND = 16  # tiles along M that are worked on together: what they read of `b` is then in the L2 cache
GL_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def unit_at(number, M, N, HEIGHT: gl.constexpr, COLUMNS: gl.constexpr, BAND: gl.constexpr, SPLITS: gl.constexpr):
    """A unit of work is a tile of `[M, N]` over one split of K: where the tile begins, and which split it is. Tiles go
    in bands along M. A number past the last is some unit, too."""
    m_tiles, n_tiles = gl.cdiv(M, HEIGHT), gl.cdiv(N, COLUMNS)
    tile, split = number % (m_tiles * n_tiles), gl.minimum(number // (m_tiles * n_tiles), SPLITS - 1)
    band, inside = tile // (BAND * n_tiles), tile % (BAND * n_tiles)
    height = gl.minimum(m_tiles - band * BAND, BAND)
    return (band * BAND + inside % height) * HEIGHT, inside // height * COLUMNS, split


@gluon.jit
def first_block(split, K, SPLITS: gl.constexpr):
    """The first block of a split of K. The split ends where the next one begins."""
    return gl.cdiv(K, 128) * split // SPLITS


@gluon.jit
def ask_weight(b_desc, b_ring, full, turn, n, other, k, BYTES: gl.constexpr, pred):
    """Begins the copies of a block's weights, with columns from `n` and, where a tile is wide, from `other` on."""
    WIDE: gl.constexpr = b_ring.shape[0] // full.shape[0]
    stage = turn % full.shape[0]
    mbarrier.expect(full.index(stage), BYTES, pred=pred)
    tma.async_copy_global_to_shared(b_desc, [n, k], full.index(stage), b_ring.index(stage * WIDE), pred=pred)
    if WIDE == 2:
        b = b_ring.index(stage * WIDE + 1)
        tma.async_copy_global_to_shared(b_desc, [other, k], full.index(stage), b, pred=pred)


@gluon.jit
def load_units(
    a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, APART,
    COLUMNS: gl.constexpr, BAND: gl.constexpr, SPLITS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One role: starts copying a block of K as soon as its stage is `empty`; the copies themselves say when it is
    `full`. No kernel writes a weight, so its first blocks are copied before the input is there. One block more
    than there are: a product too many is begun."""
    STAGES: gl.constexpr = full.shape[0]
    GROUPS: gl.constexpr = a_ring.shape[0] // STAGES
    PART: gl.constexpr = a_ring.shape[1]
    BYTES: gl.constexpr = (GROUPS * PART + b_ring.shape[0] // STAGES * b_ring.shape[1]) * 128
    units = gl.cdiv(M, GROUPS * PART) * gl.cdiv(N, COLUMNS) * SPLITS
    m, n, split = unit_at(gl.program_id(0), M, N, GROUPS * PART, COLUMNS, BAND, SPLITS)
    first = first_block(split, K, SPLITS)
    early = gl.minimum(first_block(split + 1, K, SPLITS) - first, STAGES)
    for block in gl.static_range(STAGES):
        ask_weight(b_desc, b_ring, full, block, n, n + APART, (first + block) * 128, BYTES, block < early)
    if PDL:
        tl.extra.cuda.gdc_wait()
    turn = 0
    for number in range(gl.program_id(0), units + gl.num_programs(0), gl.num_programs(0)):
        m, n, split = unit_at(number, M, N, GROUPS * PART, COLUMNS, BAND, SPLITS)
        first = first_block(split, K, SPLITS)
        end = gl.where(number < units, first_block(split + 1, K, SPLITS), first + 1)
        for k in range(first * 128, end * 128, 128):
            stage = turn % STAGES
            mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)
            ask_weight(b_desc, b_ring, full, turn, n, n + APART, k, BYTES, turn >= early)
            for group in gl.static_range(GROUPS):
                a = a_ring.index(stage * GROUPS + group)
                tma.async_copy_global_to_shared(a_desc, [m + group * PART, k], full.index(stage), a)
            turn += 1


@gluon.jit
def begin_product(a_ring, b_ring, full, turn, half, before, GROUP: gl.constexpr):
    """Starts a group's product of one block of K by one block of columns, once that is there. `before` is a product
    that has been added: nothing is added to it, but as the compiler can't know that (`turn < 0`), it must have been
    read when its registers are written; two products would have no room beside two sums."""
    STAGES: gl.constexpr = full.shape[0]
    stage = turn % STAGES
    mbarrier.wait(full.index(stage), turn // STAGES & 1)
    a = a_ring.index(stage * (a_ring.shape[0] // STAGES) + GROUP)
    b = b_ring.index(stage * (b_ring.shape[0] // STAGES) + half).permute((1, 0))
    return warpgroup_mma(a, b, before, use_acc=turn < 0, is_async=True)


@gluon.jit
def add_scaled(total, done, scale):
    """`total + done * scale`, in assembly: so the compiler does not move it behind the start of the next product."""
    asm: gl.constexpr = "fma.rn.f32 $0, $1, $2, $3;"
    operands = [done, scale[:, None].broadcast_to(done.shape), total]
    return gl.inline_asm_elementwise(asm, "=f,f,f,0", operands, dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def add_block(one, two, product, scale_one, scale_two, a_ring, b_ring, full, empty, turn, GROUP: gl.constexpr):
    """Scales and adds the product under way, then the other columns'; leaves the next block's first one under way."""
    done = warpgroup_mma_wait(0, deps=(product,))
    if b_ring.shape[0] == 2 * full.shape[0]:
        one = add_scaled(one, done, scale_one)
        product = begin_product(a_ring, b_ring, full, turn, 1, done, GROUP)
        done = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(turn % full.shape[0]), count=1)
        two = add_scaled(two, done, scale_two)
    else:
        mbarrier.arrive(empty.index(turn % full.shape[0]), count=1)
        one = add_scaled(one, done, scale_one)
    return one, two, begin_product(a_ring, b_ring, full, turn + 1, 0, done, GROUP)


@gluon.jit
def store_block(c_desc, c_shared, total, m, n):
    """64 rows of a block of columns through TMA, which writes nothing outside of C."""
    tma.store_wait(0)
    c_shared.store(total.to(c_shared.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [m, n], c_shared)


@gluon.jit
def store_part(c_ptr, total, m, n, M, N):
    """64 rows of a block of columns of a partial sum, in float32, as the tensor core leaves them."""
    layout: gl.constexpr = total.type.layout
    row = m + gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, layout))
    column = n + gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, layout))
    at = row[:, None].to(gl.int64) * N + column[None, :]
    gl.store(c_ptr + at, total, mask=(row < M)[:, None] & (column < N)[None, :])


@gluon.jit
def store_gated(c_desc, c_shared, s_ptr, gate, up, m, n, M, N, ROUND: gl.constexpr):
    """64 rows of `silu(gate) * up` in E4M3, with a scale for each row."""
    y = gated(gate.to(ROUND).to(gl.float32), up.to(ROUND).to(gl.float32), ROUND)
    scale = block_scale(gl.max(gl.abs(y), axis=1), False)
    tma.store_wait(0)
    c_shared.store(quantise(y, scale[:, None]))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [m, n], c_shared)
    row = m + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, y.type.layout))
    gl.store(s_ptr + row * gl.cdiv(N, 128) + n // 128, scale, mask=row < M)


@gluon.jit
def scales_at(a_s_ptr, b_s_ptr, m, n, other, first, M, K, columns, offsets):
    """Where the scales of a unit's rows and of its two blocks of columns begin; of no row or column past the last."""
    k_blocks = gl.cdiv(K, 128)
    a_s = a_s_ptr + gl.minimum(m + offsets, M - 1) * k_blocks + first
    one_s = b_s_ptr + gl.minimum(n // 128, columns - 1) * k_blocks + first
    return a_s, one_s, b_s_ptr + gl.minimum(other // 128, columns - 1) * k_blocks + first


@gluon.jit
def multiply_units(
    a_s_ptr, b_s_ptr, c, s_ptr, c_shared, a_ring, b_ring, full, empty, M, N, K, APART, columns,
    GROUP: gl.constexpr, COLUMNS: gl.constexpr, BAND: gl.constexpr, SPLITS: gl.constexpr, ROUND: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The role of four warps. A product is under way wherever a loop turns: the compiler allows that as long as each is
    waited for with nothing else under way, and nothing is moved between."""
    PART: gl.constexpr = a_ring.shape[1]
    WIDTH: gl.constexpr = b_ring.shape[1]
    WIDE: gl.constexpr = b_ring.shape[0] // full.shape[0]
    HEIGHT: gl.constexpr = a_ring.shape[0] // full.shape[0] * PART
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    zero = gl.zeros([PART, WIDTH], gl.float32, layout)
    offsets = GROUP * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    if PDL:
        tl.extra.cuda.gdc_wait()
    turn = 0
    m, n, split = unit_at(gl.program_id(0), M, N, HEIGHT, COLUMNS, BAND, SPLITS)
    first = first_block(split, K, SPLITS)
    a_s, one_s, two_s = scales_at(a_s_ptr, b_s_ptr, m, n, n + APART, first, M, K, columns, offsets)
    a_scale, one_scale, two_scale = gl.load(a_s), gl.load(one_s), gl.load(two_s)
    product = begin_product(a_ring, b_ring, full, 0, 0, zero, GROUP)
    units = gl.cdiv(M, HEIGHT) * gl.cdiv(N, COLUMNS) * SPLITS
    for number in range(gl.program_id(0), units, gl.num_programs(0)):
        one, two = zero, zero
        # reckoned here: of a bound that is assigned in this loop's body, Triton 3.6 takes the first value throughout
        for block in range(1, first_block(split + 1, K, SPLITS) - first_block(split, K, SPLITS)):
            scale_one, scale_two = a_scale * one_scale, a_scale * two_scale
            a_scale, one_scale, two_scale = gl.load(a_s + block), gl.load(one_s + block), gl.load(two_s + block)
            one, two, product = add_block(
                one, two, product, scale_one, scale_two, a_ring, b_ring, full, empty, turn, GROUP
            )  # fmt: skip
            turn += 1
        scale_one, scale_two = a_scale * one_scale, a_scale * two_scale
        here_m, here_n, here_c = m + GROUP * PART, n, c
        if SPLITS > 1:
            here_c += split.to(gl.int64) * M * N
        m, n, split = unit_at(number + gl.num_programs(0), M, N, HEIGHT, COLUMNS, BAND, SPLITS)
        first = first_block(split, K, SPLITS)
        a_s, one_s, two_s = scales_at(a_s_ptr, b_s_ptr, m, n, n + APART, first, M, K, columns, offsets)
        a_scale, one_scale, two_scale = gl.load(a_s), gl.load(one_s), gl.load(two_s)
        one, two, product = add_block(one, two, product, scale_one, scale_two, a_ring, b_ring, full, empty, turn, GROUP)
        turn += 1
        if SPLITS > 1:
            store_part(here_c, one, here_m, here_n, M, N)
            if WIDE == 2:
                store_part(here_c, two, here_m, here_n + WIDTH, M, N)
        elif COLUMNS < WIDE * WIDTH:
            store_gated(c, c_shared.index(GROUP), s_ptr, one, two, here_m, here_n, M, N, ROUND)
        else:
            store_block(c, c_shared.index(GROUP), one, here_m, here_n)
            if WIDE == 2:
                store_block(c, c_shared.index(GROUP), two, here_m, here_n + WIDTH)
    warpgroup_mma_wait(0, deps=(product,))
    tma.store_wait(0)


@gluon.jit
def specialized_gemm_kernel(
    a_desc, a_s_ptr, b_desc, b_s_ptr, c, s_ptr, M, N, K, APART, columns,
    GROUPS: gl.constexpr, PART: gl.constexpr, WIDTH: gl.constexpr, WIDE: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, BAND: gl.constexpr, SPLITS: gl.constexpr, ROUND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As many programs as there are multiprocessors take units in turn. A tile's columns are WIDTH from `n` on and,
    where it is WIDE (2), as many from `n + APART` on, of `columns` blocks that the weight has. All of them are COLUMNS
    of the result, or the second are gated by the first. `c`: a pointer to partial sums in float32 where K is split, or
    else a descriptor of the result, in ROUND or, gated, in E4M3 with scales `s_ptr`."""
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * GROUPS, PART, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * WIDE, WIDTH, 128], b_desc.layout)
    stored: gl.constexpr = gl.uint8 if COLUMNS < WIDE * WIDTH else ROUND
    staged: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PART, WIDTH], stored)
    c_shared = gl.allocate_shared_memory(stored, [GROUPS, PART, WIDTH], staged)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)  # all groups have read it
    fence_async_shared()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # 240 registers for each thread that multiplies leave 24 for the others. (As the first of the roles, multiplying
    # spills registers with Triton 3.6.)
    gl.warp_specialize(
        [
            (load_units, (a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, APART, COLUMNS, BAND, SPLITS, PDL)),
            (multiply_units, (
                a_s_ptr, b_s_ptr, c, s_ptr, c_shared, a_ring, b_ring, full, empty, M, N, K, APART, columns,
                0, COLUMNS, BAND, SPLITS, ROUND, PDL,
            )),
            (multiply_units, (
                a_s_ptr, b_s_ptr, c, s_ptr, c_shared, a_ring, b_ring, full, empty, M, N, K, APART, columns,
                1, COLUMNS, BAND, SPLITS, ROUND, PDL,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


class Cut(NamedTuple):
    """How a product falls into units of work."""

    wide: int  # blocks of columns of a tile: 1 or 2
    splits: int  # of K


WHOLE = Cut(wide=2, splits=1)


def tiles_of(rows: int, n: int, wide: int) -> int:
    return triton.cdiv(rows, GROUPS * PART) * triton.cdiv(n, wide * WIDTH)


def cut_for(rows: int, n: int, k_blocks: int, programs: int) -> Cut | None:
    """How it falls into units for `programs` multiprocessors; None where smaller tiles are faster. Measured on an H200:
    a round of wide tiles takes 5/3 of one of narrow ones. A K of 32 blocks is cut in two where all units then fit in
    0.6 of the card, one of 64 where they fit in the card; none is cut in more: reading three partial sums costs more
    than shorter splits bring."""
    wide, narrow = tiles_of(rows, n, 2), tiles_of(rows, n, 1)
    if triton.cdiv(wide, programs) * 5 <= triton.cdiv(narrow, programs) * 3:
        cut, units = WHOLE, wide
    else:
        share = 1.0 if k_blocks >= 64 else 0.6 if k_blocks >= 32 else 0.0  # of the card that two splits may take
        splits = 2 if 2 * narrow <= share * programs else 1
        cut, units = Cut(1, splits), narrow * splits
    return cut if rows > PART and units >= programs * 0.45 else None


def described(t: torch.Tensor, rows: int, dtype) -> TensorDescriptor:
    """`t`, whose numbers Gluon calls `dtype`, for copies of `rows` by 128 columns."""
    block = [rows, 128]
    return TensorDescriptor.from_tensor(t, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def _launch(a, b, a_s, b_s, c, s, n: int, gated: bool, cut: Cut, dtype: torch.dtype, programs: int) -> None:
    (rows, k), columns = a.shape, WIDTH if gated else cut.wide * WIDTH
    if cut.splits > triton.cdiv(k, 128):
        raise ValueError(f"K of {k} can't be cut in {cut.splits}: every piece needs a block")
    units = triton.cdiv(rows, GROUPS * PART) * triton.cdiv(n, columns) * cut.splits
    specialized_gemm_kernel[(min(units, programs),)](
        described(a, PART, gl.float8e4nv), a_s.contiguous(), described(b, WIDTH, gl.float8e4nv), b_s, c, s,
        rows, n, k, n if gated else WIDTH, len(b_s),
        GROUPS=GROUPS, PART=PART, WIDTH=WIDTH, WIDE=cut.wide, COLUMNS=columns, STAGES=STAGES[cut.wide], BAND=BAND,
        SPLITS=cut.splits, ROUND=GL_DTYPE[dtype], num_warps=4, **overlap(a),
    )  # fmt: skip


def specialized_product(
    a, b, a_s, b_s, out_dtype: torch.dtype, cut: Cut = WHOLE, programs: int | None = None
) -> torch.Tensor:
    """Partial sums `[P, M, N]`, of one part in `out_dtype`, of 16 bits, of more in float32. `a` and `b` float8_e4m3fn,
    N a multiple of 8. `programs`: default one for each multiprocessor."""
    c = torch.empty(cut.splits, len(a), len(b), dtype=out_dtype if cut.splits == 1 else torch.float32, device=a.device)
    target = c if cut.splits > 1 else described(c[0], PART, GL_DTYPE[out_dtype])
    _launch(a, b, a_s, b_s, target, a_s, len(b), False, cut, out_dtype, programs or multiprocessors(a))
    return c


def specialized_swiglu(a, b, a_s, b_s, dtype: torch.dtype, programs: int | None = None) -> Formed:
    """`swiglu` of the product, in E4M3: `b [2 * I, K]` holds gate, then up, I a multiple of 128; sums are rounded to
    `dtype`, of 16 bits."""
    n = len(b) // 2
    out = allocate(Form(False, True), len(a), n, a)
    codes = described(out.q.view(torch.uint8), PART, gl.uint8)
    _launch(a, b, a_s, b_s, codes, out.s, n, True, WHOLE, dtype, programs or multiprocessors(a))
    return out
