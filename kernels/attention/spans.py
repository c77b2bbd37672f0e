"""Split-KV decode: what the decode attentions share.

A row's blocks of cache are cut into spans that run at the same time, and a second kernel joins them in order. The cuts
follow the row's own length: nothing depends on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import KV, Form, Formed
from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.quant.e4m3 import allocate, emit, emitted

PROGRAMS = 384  # of one kernel, about: what runs at the same time, one and a half times over


@triton.jit
def span_of(length, PAGE: tl.constexpr, SPLITS: tl.constexpr):
    """Tokens that each of a row's spans covers: whole pages, as evenly as they go."""
    return tl.cdiv(tl.cdiv(length, PAGE), SPLITS) * PAGE


@triton.jit
def window_of(length, WINDOW: tl.constexpr, PAGE: tl.constexpr):
    """The first token that is seen of a row, and the first of its page, where the row's spans begin."""
    if WINDOW is None:
        return 0, 0
    else:
        first_seen = tl.maximum(length - WINDOW, 0)
        return first_seen, first_seen // PAGE * PAGE


@triton.jit
def join_some_spans(
    acc_ptr, top_ptr, total_ptr, head, d, active,
    DIM: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """`join_spans`, AT_ONCE at a time: their loads are all on their way before the first is needed. Each thread joins
    its own columns, so that threads never meet."""
    top = tl.full(d.shape, float("-inf"), dtype=tl.float32)
    total = tl.zeros(d.shape, dtype=tl.float32)
    acc = tl.zeros(d.shape, dtype=tl.float32)
    place = head.to(tl.int64) * SPLITS
    for start in tl.range(0, active, AT_ONCE):
        tops, totals, accs = (), (), ()
        new_top = top
        for s in tl.static_range(AT_ONCE):
            there = (d < DIM) & (start + s < active)
            at = place + start + s
            tops += (tl.load(top_ptr + at, mask=there, other=float("-inf")),)
            totals += (tl.load(total_ptr + at, mask=there, other=0.0),)
            accs += (tl.load(acc_ptr + at * DIM + d, mask=there, other=0.0),)
        for s in tl.static_range(AT_ONCE):
            new_top = tl.maximum(new_top, tops[s])
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - finite)
        total, acc, top = total * shrink, acc * shrink, new_top
        for s in tl.static_range(AT_ONCE):
            weight = tl.exp2(tops[s] - finite)
            total += weight * totals[s]
            acc += weight * accs[s]
    return acc / tl.where(total == 0.0, 1.0, total)


@triton.jit
def join_spans(acc_ptr, top_ptr, total_ptr, head, d, active, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Attention output at columns `d` of `head` (of one shape), from the row's spans in order. Few spans are not made
    to wait for the loads of none."""
    if active <= 8:
        out = join_some_spans(acc_ptr, top_ptr, total_ptr, head, d, active, DIM, SPLITS, 8)
    else:
        out = join_some_spans(acc_ptr, top_ptr, total_ptr, head, d, active, DIM, SPLITS, 32)
    return out


@triton.jit
def emit_block(
    y, row, block, width, plain_ptr, q_ptr, s_ptr, PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr
):  # fmt: skip
    """`emit` for the one block `y [1, 128]` that a program has made of a row `width` wide."""
    cols = (block * 128 + tl.arange(0, 128))[None, :]
    one = tl.arange(0, 1)
    emit(
        y, row.to(tl.int64) * width + cols, cols < width, row * (width // 128) + block + one, one == 0,
        plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0,
    )  # fmt: skip


@triton.jit
def join_heads_kernel(
    acc_ptr, top_ptr, total_ptr, seq_lens_ptr, plain_ptr, q_ptr, s_ptr, heads, like_ptr,
    DIM: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, PLAIN: tl.constexpr,
    FP8: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of 128 columns of all heads' outputs, which lie side by side in a row."""
    row, block = tl.program_id(0), tl.program_id(1)
    cols = block * 128 + tl.arange(0, 128)
    width = heads * DIM
    length = tl.load(seq_lens_ptr + row)
    length -= window_of(length, WINDOW, PAGE)[1]
    active = tl.cdiv(length, span_of(length, PAGE, SPLITS))
    let_next_start(PDL)
    wait_for_previous(PDL)
    head = row * heads + tl.minimum(cols, width - 1) // DIM
    y = join_spans(acc_ptr, top_ptr, total_ptr, head, cols % DIM, active, DIM, SPLITS)
    y = y.to(like_ptr.dtype.element_ty).to(tl.float32)[None, :]
    emit_block(y, row, block, width, plain_ptr, q_ptr, s_ptr, PLAIN, FP8, UE8M0)


def spans(q: torch.Tensor, dim: int, splits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for each span's unscaled output `[R, H, SPLITS, dim]`, largest score and sum of weights `[R, H, SPLITS]`."""
    shape = (*q.shape[:2], splits)
    acc = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    return acc, top, total


def programs_for(columns: int, splits: int) -> int:
    """How many programs share the spans of each of so many columns of work. A graph does not know how long its rows
    will be: programs that find nothing to do cost many rows more than taking several spans in turn."""
    return max(1, min(splits, PROGRAMS // max(columns, 1)))


def multiplied(q: torch.Tensor, cache: KV) -> torch.dtype:
    """In which dtype keys and values are multiplied: float16 holds E4M3 exactly, and converting to it costs least."""
    return torch.float16 if cache.scales is not None and q.element_size() == 2 else q.dtype


def join_heads(
    scratch: tuple, seq_lens: torch.Tensor, form: Form, q: torch.Tensor, page_size: int, window: int | None
) -> Formed:
    """The spans in `scratch` of all rows and heads of `q`, joined: `[R, H * dim]` in `form`."""
    (rows, heads), (splits, dim) = q.shape[:2], scratch[0].shape[2:]
    out = allocate(form, rows, heads * dim, q)
    pointers, flags = emitted(form, out, q)
    join_heads_kernel[(rows, triton.cdiv(heads * dim, 128))](
        *scratch, seq_lens, *pointers, heads, q, DIM=dim, PAGE=page_size, SPLITS=splits, WINDOW=window,
        **flags, num_warps=4, **overlap(q),
    )  # fmt: skip
    return out
