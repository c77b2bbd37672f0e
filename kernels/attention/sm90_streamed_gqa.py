"""Decode attention for heads in groups that share keys (GQA), on Hopper (sm_90): pages come by TMA into a ring in
shared memory, and are multiplied where they lie.

All pages but the newest were written in earlier steps. A program therefore starts copying as many as its ring holds and
only then waits for the kernel before it, as `gemm/sm90_streamed.py` does with weights. An E4M3 cache is not converted:
it is multiplied as E4M3, by queries and softmax weights that are sums of two E4M3 numbers each (see `split_e4m3`). The
results are those of `gqa.py`.
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

from kernels.attention.spans import programs_for
from kernels.forms import KV
from kernels.launch import overlap

PAGE = 64  # tokens: what four warps multiply
HEADS = 8  # of a program: the narrowest side that the tensor core has
FINER = 32.0  # what the second of two E4M3 numbers is multiplied by
HIGHEST = 256.0  # what weights, which are 1 at most, are multiplied by: a power of two that E4M3 holds
STAGES = {1: 3, 2: 4}  # by PARTS: pages that are on their way or being read
GLUON = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def split_e4m3(x, FINER: gl.constexpr):
    """`x [N, M]`, at most 256, as two E4M3 numbers, the second FINER times too large: `[N, 2 * M]`, first all of the
    first. Eight bits of x are kept down to 2^-6, where E4M3 begins to lose bits, and four from there to 2^-11; what is
    below 2^-15 is nothing. Rounded to four bits as an integer: a number just packed into E4M3 and unpacked again is
    what ptxas of CUDA 12.8 takes from the wrong register."""
    high = ((x.to(gl.int32, bitcast=True) + 0x80000) & -0x100000).to(gl.float32, bitcast=True)
    high = gl.where(gl.abs(x) < 0.015625, 0.0, high)
    low = ((x - high) * FINER).to(gl.float8e4nv)
    return gl.join(high.to(gl.float8e4nv), low).permute((0, 2, 1)).reshape([x.shape[0], 2 * x.shape[1]])


@gluon.jit
def sum_of_parts(x, PARTS: gl.constexpr, FINER: gl.constexpr, layout: gl.constexpr):
    """A product `[N, PARTS * M]` by what `split_e4m3` has parted."""
    if PARTS == 1:
        return x
    else:
        high, low = gl.split(x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)))
        return gl.convert_layout(high + low * (1.0 / FINER), layout)


@gluon.jit
def copy_page(
    k_desc, v_desc, scales_desc, k_ring, v_ring, scales_ring, bar, at, page, group, kv_heads, pred,
    DIM: gl.constexpr, PAGE: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Begins to copy a page of one head's keys and values to place `at` of the ring, where `pred` says so."""
    column, width = group * DIM, kv_heads * DIM
    if PARTS == 1:
        tma.async_copy_global_to_shared(k_desc, [page * PAGE, column], bar, k_ring.index(at), pred=pred)
        tma.async_copy_global_to_shared(v_desc, [page * PAGE, width + column], bar, v_ring.index(at), pred=pred)
    else:
        row = (page * 2 + 1) * width + column
        tma.async_copy_global_to_shared(k_desc, [page * (2 * PAGE), column], bar, k_ring.index(at), pred=pred)
        tma.async_copy_global_to_shared(v_desc, [row, 0], bar, v_ring.index(at), pred=pred)
        tma.async_copy_global_to_shared(scales_desc, [page * 2, group * PAGE], bar, scales_ring.index(at), pred=pred)


@gluon.jit
def clear_behind(v, seen, PARTS: gl.constexpr):
    """Zeros where a page has no value of the row: what another row left there may be NaN."""
    flat: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    if PARTS == 1:
        token = gl.arange(0, v.shape[0], layout=gl.SliceLayout(1, flat))[:, None]
        x = v.load(flat)
        v.store(gl.where(token < seen, x, gl.zeros_like(x)))
    else:
        token = gl.arange(0, v.shape[1], layout=gl.SliceLayout(0, flat))[None, :]
        x = v.load(flat).to(gl.uint8, bitcast=True)
        v.store(gl.where(token < seen, x, gl.zeros_like(x)).to(gl.float8e4nv, bitcast=True))
    fence_async_shared()


@gluon.jit
def place_queries(
    q_ptr, target, first, members, scale,
    DIM: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr, FINER: gl.constexpr,
):  # fmt: skip
    """HEADS heads' queries, of which `members` are there, from head `first` on, into shared memory. Returns what their
    scores are to be multiplied by. A fence follows each store at once, before the barrier that other warps wait at."""
    flat: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, 4], [0, 1])
    d = gl.arange(0, DIM, layout=gl.SliceLayout(1, flat))[:, None]
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, flat))[None, :]
    q = gl.load(q_ptr + (first + head).to(gl.int64) * DIM + d, mask=head < members, other=0.0)
    if PARTS == 1:
        target.permute((1, 0)).store(q)
        fence_async_shared()
        return gl.full([HEADS], scale, gl.float32, gl.SliceLayout(0, flat))
    else:  # times the power of two that brings the largest between 128 and 256, by way of exponents
        q = q.to(gl.float32)
        amax = gl.maximum(gl.max(gl.abs(q), axis=0), 1e-30)
        unit = ((261 - (amax.to(gl.int32, bitcast=True) >> 23)) << 23).to(gl.float32, bitcast=True)
        target.permute((1, 0)).store(split_e4m3(q * unit[None, :], FINER))
        fence_async_shared()
        return scale / unit


@gluon.jit
def attend_page(
    k, v, scale_of, queries, weights, at, begin, length, unit, top, sums, acc,
    PARTS: gl.constexpr, FINER: gl.constexpr, HIGHEST: gl.constexpr,
):  # fmt: skip
    """One page more, at place `at` of the ring, the first with token `begin` of `length`. `sums` are of the weights,
    token by token of a page: they are added up at the end."""
    layout: gl.constexpr = sums.type.layout
    N: gl.constexpr = queries.shape[0]
    PAGE: gl.constexpr = sums.shape[0]
    parted: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16 * PARTS])
    seen = begin + gl.arange(0, PAGE, layout=gl.SliceLayout(1, layout)) < length
    none = gl.zeros([PAGE, N], gl.float32, parted)
    x = warpgroup_mma(k, queries.permute((1, 0)), none, use_acc=False, is_async=True)
    x = sum_of_parts(warpgroup_mma_wait(0, deps=(x,)), PARTS, FINER, layout) * unit[None, :]
    if PARTS > 1:  # a value's scale goes into its token's weight
        key_scale = scale_of.index(at * 2).load(gl.SliceLayout(1, layout))
        value_log = gl.log2(gl.where(seen, scale_of.index(at * 2 + 1).load(gl.SliceLayout(1, layout)), 1.0))
        x = x * key_scale[:, None] + value_log[:, None]
    x = gl.where(seen[:, None], x, float("-inf"))
    new_top = gl.maximum(top, gl.max(x, axis=0))
    shrink = gl.exp2(top - new_top)
    weight = gl.exp2(x - new_top[None, :])
    if PARTS > 1:  # ... and out of the sum of weights again
        weights.permute((1, 0)).store(split_e4m3(weight * HIGHEST, FINER))
        sums = sums * shrink[None, :] + weight * gl.exp2(-value_log)[:, None]
    else:
        weights.permute((1, 0)).store(weight.to(k.dtype))
        sums = sums * shrink[None, :] + weight
    fence_async_shared()
    if begin + PAGE > length:
        clear_behind(v, length - begin, PARTS)
    values = v if PARTS > 1 else v.permute((1, 0))
    out = gl.zeros([acc.shape[0], N], gl.float32, parted)
    out = warpgroup_mma(values, weights.permute((1, 0)), out, use_acc=False, is_async=True)
    out = warpgroup_mma_wait(0, deps=(out,))
    return new_top, sums, acc * shrink[None, :] + sum_of_parts(out, PARTS, FINER, layout)


@gluon.jit
def spans_of(length, PAGE: gl.constexpr, SPLITS: gl.constexpr):
    """Of a row: the page that this step still writes to; pages of a span, of which the last may have fewer; and how
    many spans are this program's (every so many, along the third dimension)."""
    newest = gl.cdiv(length, PAGE) - 1
    span = gl.cdiv(newest + 1, SPLITS)
    return newest, span, gl.maximum(gl.cdiv(gl.cdiv(newest + 1, span) - gl.program_id(2), gl.num_programs(2)), 0)


@gluon.jit
def first_turns(block_table_ptr, span, newest, COUNT: gl.constexpr):
    """The first pages of a program's spans: their numbers in the row, and where they are. Loads that wait for each
    other take long, so all of them come before the first copy."""
    starts, pages = (), ()
    for turn in gl.static_range(COUNT):
        start = (gl.program_id(2) + turn // span * gl.num_programs(2)) * span + turn % span
        starts += (start,)
        pages += (gl.load(block_table_ptr + gl.minimum(start, newest)),)
    return starts, pages


@gluon.jit
def turn_after(start, inside, span):
    """The next page of a program's spans, and its number in its span."""
    inside += 1
    start += 1
    if inside == span:
        inside = 0
        start += (gl.num_programs(2) - 1) * span
    return start, inside


@gluon.jit
def store_span(acc_ptr, top_ptr, total_ptr, place, there, top, sums, acc):
    """What a span leaves for each of its heads, at `place`: see `spans.join_spans`."""
    DIM: gl.constexpr = acc.shape[0]
    d = gl.arange(0, DIM, layout=gl.SliceLayout(1, acc.type.layout))
    gl.store(top_ptr + place, top, mask=there)
    gl.store(total_ptr + place, gl.sum(sums, axis=0), mask=there)
    gl.store(acc_ptr + place[None, :] * DIM + d[:, None], acc, mask=there[None, :])


@gluon.jit
def streamed_attention_kernel(
    q_ptr, k_desc, v_desc, scales_desc, block_table_ptr, seq_lens_ptr, acc_ptr, top_ptr, total_ptr, scale, heads,
    per_group, block_table_row, kv_heads,
    DIM: gl.constexpr, PAGE: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, FINER: gl.constexpr, HIGHEST: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A row's spans, every so many (the third dimension's programs), for up to HEADS heads that share keys. Tokens are
    the rows of the products. `scale` is in units of log 2, and so is `top`. PARTS: how many numbers of the cache's
    dtype a query or a weight is the sum of."""
    N: gl.constexpr = HEADS * PARTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16 * PARTS])
    by_head: gl.constexpr = gl.SliceLayout(0, layout)
    held: gl.constexpr = k_desc.dtype
    v_shape: gl.constexpr = v_desc.block_shape
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, DIM], held)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, PAGE], held)
    BYTES: gl.constexpr = 4 * PAGE * DIM if PARTS == 1 else 2 * PAGE * DIM + 8 * PAGE
    k_ring = gl.allocate_shared_memory(held, [STAGES, PAGE, DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(held, [STAGES, v_shape[0], v_shape[1]], v_desc.layout)
    scales_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 2, PAGE], scales_desc.layout)
    scale_of = scales_ring._reinterpret(gl.float32, [STAGES * 2, PAGE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = gl.allocate_shared_memory(held, [N, DIM], q_layout)
    weights = gl.allocate_shared_memory(held, [N, PAGE], w_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, blocks = gl.program_id(0), gl.cdiv(per_group, HEADS)
    group, block = gl.program_id(1) // blocks, gl.program_id(1) % blocks
    length = gl.load(seq_lens_ptr + row)
    newest, span, mine = spans_of(length, PAGE, SPLITS)
    if mine == 0:
        return  # before it waits: the next product's weights take its shared memory. Programs with work do wait
    block_table_ptr += row * block_table_row
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    starts, pages = first_turns(block_table_ptr, span, newest, STAGES + 1)
    for stage in gl.static_range(STAGES):
        mbarrier.expect(full.index(stage), BYTES, pred=starts[stage] <= newest)
        copy_page(
            k_desc, v_desc, scales_desc, k_ring, v_ring, scales_ring, full.index(stage), stage, pages[stage], group,
            kv_heads, starts[stage] < newest, DIM, PAGE, PARTS,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    for stage in gl.static_range(STAGES):
        copy_page(
            k_desc, v_desc, scales_desc, k_ring, v_ring, scales_ring, full.index(stage), stage, pages[stage], group,
            kv_heads, starts[stage] == newest, DIM, PAGE, PARTS,
        )  # fmt: skip
    first = row * heads + group * per_group + block * HEADS
    members = gl.minimum(per_group - block * HEADS, HEADS)
    unit = place_queries(q_ptr, queries, first, members, scale, DIM, HEADS, PARTS, FINER)
    unit = gl.convert_layout(unit, by_head)
    head = gl.arange(0, HEADS, layout=by_head)
    start, inside, page = starts[STAGES], STAGES % span, pages[STAGES]  # the next to copy; its number in its span
    for s in range(mine):
        split = gl.program_id(2) + s * gl.num_programs(2)
        top = gl.full([HEADS], float("-inf"), gl.float32, by_head)
        sums = gl.zeros([PAGE, HEADS], gl.float32, layout)
        acc = gl.zeros([DIM, HEADS], gl.float32, layout)
        for j in range(gl.minimum(span, newest + 1 - split * span)):
            turn = s * span + j
            at = turn % STAGES
            mbarrier.wait(full.index(at), turn // STAGES & 1)
            top, sums, acc = attend_page(
                k_ring.index(at), v_ring.index(at), scale_of, queries, weights, at, (split * span + j) * PAGE, length,
                unit, top, sums, acc, PARTS, FINER, HIGHEST,
            )  # fmt: skip
            tl.debug_barrier()  # all warps have read the stage
            mbarrier.expect(full.index(at), BYTES, pred=start <= newest)
            copy_page(
                k_desc, v_desc, scales_desc, k_ring, v_ring, scales_ring, full.index(at), at, page, group, kv_heads,
                start <= newest, DIM, PAGE, PARTS,
            )  # fmt: skip
            start, inside = turn_after(start, inside, span)
            page = gl.load(block_table_ptr + gl.minimum(start, newest))
        if PARTS > 1:
            acc = acc * (1.0 / HIGHEST)
        place = (first + head).to(gl.int64) * SPLITS + split
        store_span(acc_ptr, top_ptr, total_ptr, place, head < members, top, sums, acc)


def described(values: torch.Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
    """Contiguous memory as rows `shape`, of which one copy brings `block`."""
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON.get(values.dtype, gl.float32))
    return TensorDescriptor(values, shape, [shape[1], 1], block, layout)


def streams_pages(q: torch.Tensor, cache: KV) -> bool:
    """Whether decode attention over this cache can be one of these."""
    fits = cache.page_size == PAGE and q.shape[-1] in (64, 128)
    return fits and q.element_size() == 2 and (cache.scales is not None or q.dtype == cache.values.dtype)


def streamed_attention(q, cache: KV, block_table, seq_lens, scratch, scale: float, kv_heads: int, splits: int) -> None:
    """Spans of every row, into `scratch`. `scale` is in units of log 2."""
    (rows, heads, dim), width, held = q.shape, cache.width, len(cache.values)
    if cache.scales is None:
        parts = 1
        keys = values = described(cache.values, [held * PAGE, width], [PAGE, dim])
        scales = described(scratch[0], [scratch[0].numel() // PAGE, PAGE], [2, PAGE])  # a placeholder, never read
    else:
        parts = 2
        keys = described(cache.values, [held * 2 * PAGE, width // 2], [PAGE, dim])
        values = described(cache.values, [held * width, PAGE], [dim, PAGE])
        scales = described(cache.scales, [held * 2, kv_heads * PAGE], [2, PAGE])
    per_group = heads // kv_heads
    columns = kv_heads * triton.cdiv(per_group, HEADS)
    if rows:
        streamed_attention_kernel[(rows, columns, programs_for(rows * columns, splits))](
            q, keys, values, scales, block_table, seq_lens, *scratch, scale, heads, per_group, block_table.stride(0),
            kv_heads,
            DIM=dim, PAGE=PAGE, HEADS=HEADS, PARTS=parts, SPLITS=splits, STAGES=STAGES[parts], FINER=FINER,
            HIGHEST=HIGHEST, num_warps=4, **overlap(q),
        )  # fmt: skip
