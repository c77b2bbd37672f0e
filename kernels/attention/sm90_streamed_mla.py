"""Decode attention of MLA in its latent space, on Hopper (sm_90): pages of latents come by TMA into a ring in shared
memory, and are multiplied where they lie, as keys and as values.

As in `sm90_streamed_gqa.py` all pages but the newest are asked for before the kernel waits for the one before it. What
comes out is as in `mla.py`, which also does what is left: an E4M3 cache, whose latents a tensor core could not take
as values (it multiplies FP8 only along what is contiguous), other cards, and the joining of spans.
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

from kernels.attention.sm90_streamed_gqa import PAGE, described, first_turns, spans_of, store_span, turn_after
from kernels.forms import KV
from kernels.launch import overlap

HEADS = 16  # of a program
STAGES = 2  # pages that are on their way or being read
COLUMNS = 64  # of latents that are cleared at a time
MOST_COLUMNS = 768  # of latents and rotary keys: what fits into the ring


@gluon.jit
def copy_latents(k_desc, r_desc, k_ring, r_ring, bar, at, page, pred, PAGE: gl.constexpr):
    """Begins to copy a page's latents and rotary keys to place `at` of the ring, where `pred` says so."""
    tma.async_copy_global_to_shared(k_desc, [page * PAGE, 0], bar, k_ring.index(at), pred=pred)
    column: gl.constexpr = k_ring.shape[2]
    tma.async_copy_global_to_shared(r_desc, [page * PAGE, column], bar, r_ring.index(at), pred=pred)


@gluon.jit
def clear_latents_behind(k, seen, COLUMNS: gl.constexpr):
    """Zeros where a page has no token of the row: what another row left there may be NaN."""
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, k.shape[0], layout=gl.SliceLayout(1, flat))[:, None]
    for part in gl.static_range(k.shape[1] // COLUMNS):
        chunk = k.slice(part * COLUMNS, COLUMNS, dim=1)
        x = chunk.load(flat)
        chunk.store(gl.where(token < seen, x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def attend_latents(k, r, q, q_r, weights, begin, length, scale, top, sums, acc, COLUMNS: gl.constexpr):
    """One page more, whose first token is `begin` of `length`. `sums` are of the weights, token by token of a page:
    they are added up at the end."""
    layout: gl.constexpr = sums.type.layout
    PAGE: gl.constexpr = sums.shape[0]
    HEADS: gl.constexpr = sums.shape[1]
    seen = begin + gl.arange(0, PAGE, layout=gl.SliceLayout(1, layout)) < length
    x = gl.zeros([PAGE, HEADS], gl.float32, layout)
    x = warpgroup_mma(k, q.permute((1, 0)), x, use_acc=False, is_async=True)
    x = warpgroup_mma(r, q_r.permute((1, 0)), x, is_async=True)
    x = gl.where(seen[:, None], warpgroup_mma_wait(0, deps=(x,)) * scale, float("-inf"))
    new_top = gl.maximum(top, gl.max(x, axis=0))
    shrink = gl.exp2(top - new_top)
    weight = gl.exp2(x - new_top[None, :])
    weights.permute((1, 0)).store(weight.to(k.dtype))
    fence_async_shared()
    if begin + PAGE > length:
        clear_latents_behind(k, length - begin, COLUMNS)
    acc = warpgroup_mma(k.permute((1, 0)), weights.permute((1, 0)), acc * shrink[None, :], is_async=True)
    return new_top, sums * shrink[None, :] + weight, warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def streamed_latent_kernel(
    q_desc, q_r_desc, k_desc, r_desc, block_table_ptr, seq_lens_ptr, acc_ptr, top_ptr, total_ptr, scale, heads,
    block_table_row,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, HEADS: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, COLUMNS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A row's spans, every so many (the third dimension's programs), for HEADS heads, which are the narrow side of both
    products. `scale` is in units of log 2, and so is `top`."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    by_head: gl.constexpr = gl.SliceLayout(0, layout)
    held: gl.constexpr = k_desc.dtype
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, PAGE], held)
    k_ring = gl.allocate_shared_memory(held, [STAGES, PAGE, LATENT], k_desc.layout)
    r_ring = gl.allocate_shared_memory(held, [STAGES, PAGE, ROPE], r_desc.layout)
    q = gl.allocate_shared_memory(held, [HEADS, LATENT], q_desc.layout)
    q_r = gl.allocate_shared_memory(held, [HEADS, ROPE], q_r_desc.layout)
    weights = gl.allocate_shared_memory(held, [HEADS, PAGE], w_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())  # the last: of queries
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block = gl.program_id(0), gl.program_id(1)
    length = gl.load(seq_lens_ptr + row)
    newest, span, mine = spans_of(length, PAGE, SPLITS)
    if mine == 0:
        return  # before it waits, so that its shared memory is free for others. Programs with work do wait
    block_table_ptr += row * block_table_row
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    starts, pages = first_turns(block_table_ptr, span, newest, STAGES + 1)
    BYTES: gl.constexpr = 2 * PAGE * (LATENT + ROPE)
    for stage in gl.static_range(STAGES):
        mbarrier.expect(full.index(stage), BYTES, pred=starts[stage] <= newest)
        early = starts[stage] < newest
        copy_latents(k_desc, r_desc, k_ring, r_ring, full.index(stage), stage, pages[stage], early, PAGE)
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = row * heads + block * HEADS
    mbarrier.expect(full.index(STAGES), 2 * HEADS * (LATENT + ROPE))
    tma.async_copy_global_to_shared(q_desc, [first, 0], full.index(STAGES), q)
    tma.async_copy_global_to_shared(q_r_desc, [first, LATENT], full.index(STAGES), q_r)
    for stage in gl.static_range(STAGES):
        late = starts[stage] == newest
        copy_latents(k_desc, r_desc, k_ring, r_ring, full.index(stage), stage, pages[stage], late, PAGE)
    head = gl.arange(0, HEADS, layout=by_head)
    there = head < heads - block * HEADS
    start, inside, page = starts[STAGES], STAGES % span, pages[STAGES]  # the next to copy; its number in its span
    mbarrier.wait(full.index(STAGES), 0)
    for s in range(mine):
        split = gl.program_id(2) + s * gl.num_programs(2)
        top = gl.full([HEADS], float("-inf"), gl.float32, by_head)
        sums = gl.zeros([PAGE, HEADS], gl.float32, layout)
        acc = gl.zeros([LATENT, HEADS], gl.float32, layout)
        for j in range(gl.minimum(span, newest + 1 - split * span)):
            turn = s * span + j
            at = turn % STAGES
            mbarrier.wait(full.index(at), turn // STAGES & 1)
            top, sums, acc = attend_latents(
                k_ring.index(at), r_ring.index(at), q, q_r, weights, (split * span + j) * PAGE, length, scale, top,
                sums, acc, COLUMNS,
            )  # fmt: skip
            tl.debug_barrier()  # all warps have read the stage
            more = start <= newest
            mbarrier.expect(full.index(at), BYTES, pred=more)
            copy_latents(k_desc, r_desc, k_ring, r_ring, full.index(at), at, page, more, PAGE)
            start, inside = turn_after(start, inside, span)
            page = gl.load(block_table_ptr + gl.minimum(start, newest))
        place = (first + head).to(gl.int64) * SPLITS + split
        store_span(acc_ptr, top_ptr, total_ptr, place, there, top, sums, acc)


def streams_latents(q: torch.Tensor, cache: KV, latent: int) -> bool:
    """Whether decode attention over this cache can be one of these."""
    rotary = q.shape[-1] - latent
    fits = cache.page_size == PAGE and latent + rotary <= MOST_COLUMNS
    powers = all(n & (n - 1) == 0 and n >= 64 for n in (latent, rotary))
    return cache.scales is None and q.element_size() == 2 and q.dtype == cache.values.dtype and fits and powers


def streamed_latents(q, cache: KV, block_table, seq_lens, scratch, scale: float, splits: int, programs: int) -> None:
    """Spans of every row, into `scratch`. `scale` is in units of log 2."""
    (rows, heads, width), latent = q.shape, scratch[0].shape[-1]
    held, queries = [len(cache.values) * PAGE, width], [rows * heads, width]
    if rows:
        streamed_latent_kernel[(rows, triton.cdiv(heads, HEADS), programs)](
            described(q, queries, [HEADS, latent]), described(q, queries, [HEADS, width - latent]),
            described(cache.values, held, [PAGE, latent]), described(cache.values, held, [PAGE, width - latent]),
            block_table, seq_lens, *scratch, scale, heads, block_table.stride(0),
            LATENT=latent, ROPE=width - latent, PAGE=PAGE, HEADS=HEADS, SPLITS=splits, STAGES=STAGES, COLUMNS=COLUMNS,
            num_warps=4, **overlap(q),
        )  # fmt: skip
