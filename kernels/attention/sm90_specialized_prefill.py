"""Causal attention of a prefill chunk on Hopper (sm_90), where the warps of a program have roles: one copies
queries, keys and values, two groups of four attend from 64 queries of a head each (after FlashAttention-3, Shah et al.,
2024, arXiv:2407.08608).

A group starts the scores of one block of keys together with the weighted sum of values of the block before it, and
computes the softmax of the scores while that sum is under way. While one group does so, the other uses the tensor core.
Blocks go from the newest to the oldest, so that the masked ones come first. As many programs as there are
multiprocessors take tiles in turn, the longest first, and every second round from the other end: so all of them get
about as many blocks.
"""

from __future__ import annotations

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

from kernels.forms import LOG2_E, Form, Formed
from kernels.launch import multiprocessors, overlap
from kernels.quant.e4m3 import allocate, block_scale, formed, quantise

PART = 64  # queries of a group
KEYS = 128  # of a block
STAGES = 2  # blocks of keys, and of values, that are on their way or being read
GL_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.uint8: gl.uint8}


@gluon.jit
def rounds_of(tiles):
    """How many tiles this program takes."""
    programs = gl.num_programs(0)
    whole = tiles // programs
    place = gl.program_id(0) if whole % 2 == 0 else programs - 1 - gl.program_id(0)
    return whole + (place < tiles % programs).to(gl.int32)


@gluon.jit
def tile_of(round, queries, tokens, heads, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Of a program's round: the first query, the head, how many blocks of keys the tile sees, and how many of them all
    of its queries see."""
    programs = gl.num_programs(0)
    place = gl.program_id(0) if round % 2 == 0 else programs - 1 - gl.program_id(0)
    number = round * programs + place
    block = gl.cdiv(queries, ROWS) - 1 - number // heads
    seen = block * ROWS + tokens - queries  # before the first query
    count = gl.cdiv(gl.minimum(seen + ROWS, tokens), KEYS)
    return block * ROWS, number % heads, count, (seen + 1) // KEYS


@gluon.jit
def load_tiles(
    q_desc, k_desc, v_desc, q_shared, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    queries, tokens, heads, share, k_head, v_head, PDL: gl.constexpr,
):  # fmt: skip
    """The role of one warp: each tile's queries, then its blocks from the last to the first; values follow their keys
    one block later."""
    GROUPS: gl.constexpr = q_shared.shape[0]
    PART: gl.constexpr = q_shared.shape[1]
    DIM: gl.constexpr = q_shared.shape[2]
    STAGES: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    BYTES: gl.constexpr = KEYS * DIM * 2
    if PDL:
        tl.extra.cuda.gdc_wait()
    turn = 0
    for round in range(rounds_of(gl.cdiv(queries, GROUPS * PART) * heads)):
        m, head, count, _ = tile_of(round, queries, tokens, heads, GROUPS * PART, KEYS)
        k_at, v_at = head // share * k_head, head // share * v_head
        mbarrier.wait(q_empty, round & 1 ^ 1)
        mbarrier.expect(q_full, GROUPS * PART * DIM * 2)
        for group in gl.static_range(GROUPS):
            q = q_shared.index(group)
            tma.async_copy_global_to_shared(q_desc, [m + group * PART, head * DIM], q_full, q)
        for block in range(count + 1):
            pred, at = block < count, turn % STAGES
            mbarrier.wait(k_empty.index(at), turn // STAGES & 1 ^ 1, pred=pred)
            mbarrier.expect(k_full.index(at), BYTES, pred=pred)
            start = (count - 1 - block) * KEYS
            tma.async_copy_global_to_shared(k_desc, [start, k_at], k_full.index(at), k_ring.index(at), pred=pred)
            before, pred = turn - 1, block > 0
            at = (before + STAGES) % STAGES
            mbarrier.wait(v_empty.index(at), before // STAGES & 1 ^ 1, pred=pred)
            mbarrier.expect(v_full.index(at), BYTES, pred=pred)
            start += KEYS
            tma.async_copy_global_to_shared(v_desc, [start, v_at], v_full.index(at), v_ring.index(at), pred=pred)
            turn += 1
        turn -= 1


@gluon.jit
def begin_scores(q, k_ring, k_full, turn, zero):
    """Starts `[PART, KEYS]` products of queries and keys, once those are there."""
    at = turn % k_ring.shape[0]
    mbarrier.wait(k_full.index(at), turn // k_ring.shape[0] & 1)
    return warpgroup_mma(q, k_ring.index(at).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def begin_sum(weights, v_ring, v_full, turn, acc):
    """Starts adding a block's values, times their weights, to `acc`."""
    at = turn % v_ring.shape[0]
    mbarrier.wait(v_full.index(at), turn // v_ring.shape[0] & 1)
    return warpgroup_mma(weights, v_ring.index(at), acc, is_async=True)


@gluon.jit
def weigh(scores, top, total, start, last, scale, MASKED: gl.constexpr, layout: gl.constexpr, DTYPE: gl.constexpr):
    """The running softmax takes in a block of scores: its weights, by what the sums before it shrink, the largest score
    (in units of log 2, `scale` included) and the sum of weights."""
    if MASKED:
        key = start + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] <= last[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, axis=1) * scale)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = gl.exp2(scores * scale - shift[:, None])
    shrink = gl.exp2(top - shift)
    total = total * shrink + gl.sum(p, axis=1)
    return gl.convert_layout(p.to(DTYPE), layout), shrink, new_top, total


@gluon.jit
def attend_block(
    q, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turn, start, last, scale, zero, weights, top, total, acc,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of block `turn`, and meanwhile the sum over values of the one before it."""
    STAGES: gl.constexpr = k_ring.shape[0]
    operand: gl.constexpr = weights.type.layout
    DTYPE: gl.constexpr = weights.dtype
    scores = begin_scores(q, k_ring, k_full, turn, zero)
    adding = begin_sum(weights, v_ring, v_full, turn - 1, acc)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(turn % STAGES), count=1)
    new_weights, shrink, top, total = weigh(scores, top, total, start, last, scale, MASKED, operand, DTYPE)
    # Already passed. Waiting again ends a basic block: else ptxas moves the exponentials behind the wait below
    mbarrier.wait(v_full.index((turn - 1) % STAGES), (turn - 1) // STAGES & 1)
    acc, _, new_weights = warpgroup_mma_wait(0, deps=(adding, weights, new_weights))
    mbarrier.arrive(v_empty.index((turn - 1) % STAGES), count=1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))
    return new_weights, top, total, acc * shrink[:, None]


@gluon.jit
def attend_tiles(
    o_desc, s_ptr, q_shared, o_shared, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    queries, tokens, heads, scale, GROUP: gl.constexpr, FP8: gl.constexpr, UE8M0: gl.constexpr,
):  # fmt: skip
    """The role of four warps: 64 queries of each tile. They wait for the copies of the loading warp, which itself has
    waited for the kernel before this one."""
    GROUPS: gl.constexpr = q_shared.shape[0]
    PART: gl.constexpr = q_shared.shape[1]
    DIM: gl.constexpr = q_shared.shape[2]
    STAGES: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    DTYPE: gl.constexpr = q_shared.dtype
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    row: gl.constexpr = gl.SliceLayout(1, scored)
    zero = gl.zeros([PART, KEYS], gl.float32, scored)
    q, o = q_shared.index(GROUP), o_shared.index(GROUP)
    turn = 0
    for round in range(rounds_of(gl.cdiv(queries, GROUPS * PART) * heads)):
        m, head, count, common = tile_of(round, queries, tokens, heads, GROUPS * PART, KEYS)
        m += GROUP * PART
        last = m + tokens - queries + gl.arange(0, PART, layout=row)
        start = (count - 1) * KEYS
        mbarrier.wait(q_full, round & 1)
        scores = warpgroup_mma_wait(0, deps=(begin_scores(q, k_ring, k_full, turn, zero),))
        mbarrier.arrive(k_empty.index(turn % STAGES), count=1)
        top = gl.full([PART], float("-inf"), gl.float32, row)
        total = gl.zeros([PART], gl.float32, row)
        weights, _, top, total = weigh(scores, top, total, start, last, scale, True, operand, DTYPE)
        acc = gl.zeros([PART, DIM], gl.float32, summed)
        for _ in range(1, count - common):
            turn += 1
            start -= KEYS
            weights, top, total, acc = attend_block(
                q, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turn, start, last, scale, zero,
                weights, top, total, acc, True,
            )  # fmt: skip
        for _ in range(gl.maximum(count - common, 1), count):
            turn += 1
            start -= KEYS
            weights, top, total, acc = attend_block(
                q, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turn, start, last, scale, zero,
                weights, top, total, acc, False,
            )  # fmt: skip
        mbarrier.arrive(q_empty, count=1)
        acc, _ = warpgroup_mma_wait(0, deps=(begin_sum(weights, v_ring, v_full, turn, acc), weights))
        mbarrier.arrive(v_empty.index(turn % STAGES), count=1)
        turn += 1
        total = gl.convert_layout(total, gl.SliceLayout(1, summed))
        out = (acc / total[:, None]).to(DTYPE)
        tma.store_wait(0)
        if FP8:
            y = out.to(gl.float32)
            s = block_scale(gl.max(gl.abs(y), axis=1), UE8M0)
            at = m + gl.arange(0, PART, layout=gl.SliceLayout(1, summed))
            gl.store(s_ptr + at * heads + head, s, mask=at < queries)
            o.store(quantise(y, s[:, None]))
        else:
            o.store(out)
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [m, head * DIM], o)
    tma.store_wait(0)


@gluon.jit
def specialized_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, s_ptr, queries, tokens, heads, share, scale, k_head, v_head,
    PART: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr,
    UE8M0: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Queries, keys and values through TMA, the result likewise: plain, or in E4M3 with a scale for each head."""
    q = gl.allocate_shared_memory(q_desc.dtype, [2, PART, DIM], q_desc.layout)
    o = gl.allocate_shared_memory(o_desc.dtype, [2, PART, DIM], o_desc.layout)
    k_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)  # both groups have read them
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (attend_tiles, (
                o_desc, s_ptr, q, o, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                queries, tokens, heads, scale, 0, FP8, UE8M0,
            )),
            (attend_tiles, (
                o_desc, s_ptr, q, o, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                queries, tokens, heads, scale, 1, FP8, UE8M0,
            )),
            (load_tiles, (
                q_desc, k_desc, v_desc, q, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                queries, tokens, heads, share, k_head, v_head, PDL,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def as_matrix(x: torch.Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of `x [S, G, W]` as TMA is to see it: a row of columns for each token."""
    count, groups, width = x.shape
    return [count, (groups - 1) * x.stride(1) + width], [x.stride(0), 1]


def a_head(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """What TMA copies of `x [S, G, W]` at once: a head of `rows` tokens."""
    block = [rows, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, GL_DTYPE[x.dtype])
    return TensorDescriptor(x, *as_matrix(x), block, layout)


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether attention can be this: of 16 bits, keys and values both 64 or 128 wide, and where TMA can copy them."""
    aligned = all(x.data_ptr() % 16 == 0 for x in (q, k, v)) and all(x.stride(0) % 8 == 0 for x in (k, v))
    return aligned and q.element_size() == 2 and k.shape[-1] == v.shape[-1] and k.shape[-1] in (64, 128)


def specialized_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, *, scale: float) -> Formed:
    q = q.contiguous()
    (queries, heads, dim), (tokens, groups, _) = q.shape, v.shape
    fused = form.fp8 and not form.plain and dim == 128  # a head is a block
    out = allocate(form if fused else Form(True, False), queries, heads * dim, q)
    stored = (out.q.view(torch.uint8) if fused else out.plain).view(queries, heads, dim)
    tiles = triton.cdiv(queries, 2 * PART) * heads
    if queries:
        specialized_attention_kernel[(min(tiles, multiprocessors(q)),)](
            a_head(q, PART), a_head(k, KEYS), a_head(v, KEYS), a_head(stored, PART),
            out.s if fused else q, queries, tokens, heads, heads // groups, scale * LOG2_E, k.stride(1), v.stride(1),
            PART=PART, KEYS=KEYS, DIM=dim, STAGES=STAGES, FP8=fused, UE8M0=form.ue8m0, num_warps=4, **overlap(q),
        )  # fmt: skip
    return out if fused else formed(out.plain, form)
