"""What the cache holds of chosen tokens, restored for later prefill chunks, in Triton."""

from __future__ import annotations

from itertools import groupby

import torch
import triton
import triton.language as tl

from kernels.forms import KV
from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.quant.e4m3 import decode_e4m3
from kernels.rope.cache import scale_place

TOKENS = 64  # of a program: about a page, whose tokens lie side by side where values lie across


@triton.jit
def gather_kernel(
    values_ptr, scales_ptr, places_ptr, out_ptr, count, column, first, vectors, width, along,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ACROSS: tl.constexpr, PAGE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens' vector of DIM columns: number `first` + program 1 of `vectors`, the first of which begins at
    `column`. `along`: how many columns of a token lie along."""
    token, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    vector, at = first + tl.program_id(1), column + tl.program_id(1) * DIM
    let_next_start(PDL)
    wait_for_previous(PDL)
    place = tl.load(places_ptr + token, mask=token < count, other=0)
    page = values_ptr + place // PAGE * PAGE * width
    scale = tl.load(scales_ptr + scale_place(place, vector, vectors, PAGE), mask=token < count, other=0.0)
    if ACROSS:  # neighbours in memory are tokens: so they are neighbours in the tile
        codes = page[None, :] + PAGE * along + (at - along + d[:, None]) * PAGE + (place % PAGE)[None, :]
        x = tl.load(codes, mask=(d < DIM)[:, None] & (token < count)[None, :], other=0)
        y = tl.trans(decode_e4m3(x).to(tl.float32) * scale[None, :])
    else:
        codes = page[:, None] + (place % PAGE)[:, None] * along + at + d[None, :]
        x = tl.load(codes, mask=(d < DIM)[None, :] & (token < count)[:, None], other=0)
        y = decode_e4m3(x).to(tl.float32) * scale[:, None]
    out = out_ptr + token[:, None].to(tl.int64) * width + at + d[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(token < count)[:, None] & (d < DIM)[None, :])


@triton.jit
def copy_rows_kernel(values_ptr, places_ptr, out_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One token of a cache that is not scaled."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    let_next_start(PDL)
    wait_for_previous(PDL)
    x = tl.load(values_ptr + tl.load(places_ptr + token) * width + at, mask=at < width)
    tl.store(out_ptr + token * width + at, x, mask=at < width)


def gather_kv(kv: KV, slots: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    dtype = kv.values.dtype if kv.scales is None else dtype
    out = torch.empty(len(slots), kv.width, dtype=dtype, device=slots.device)
    if kv.scales is None:
        copy_rows_kernel[(len(slots),)](
            kv.values, slots, out, kv.width, BLOCK=triton.next_power_of_2(kv.width), num_warps=4, **overlap(out)
        )
        return out
    column, first, along, codes = 0, 0, kv.width - kv.across, kv.values.view(torch.uint8)
    starts = [sum(kv.widths[:i]) for i in range(len(kv.widths))]
    for (dim, across), run in groupby(zip(kv.widths, starts, strict=True), key=lambda v: (v[0], v[1] >= along)):
        number = len(list(run))
        gather_kernel[(triton.cdiv(len(slots), TOKENS), number)](
            codes, kv.scales, slots, out, len(slots), column, first, len(kv.widths), kv.width, along,
            DIM=dim, BLOCK=triton.next_power_of_2(dim), TOKENS=TOKENS, ACROSS=across, PAGE=kv.page_size, num_warps=4,
            **overlap(out),
        )  # fmt: skip
        column, first = column + number * dim, first + number
    return out
