"""Adds up the partial sums of a split-K product, for readers that do not add them up themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, wait_for_previous


@triton.jit
def add_up_kernel(partials_ptr, c_ptr, count, COUNT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    let_next_start(PDL)
    wait_for_previous(PDL)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for p in tl.static_range(COUNT):
        total += tl.load(partials_ptr + p * count + at, mask=inside, other=0.0)
    tl.store(c_ptr + at, total.to(c_ptr.dtype.element_ty), mask=inside)


def add_up(partials: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    count = partials[0].numel()
    if len(partials) == 1 and partials.dtype == dtype:
        return partials[0]
    c = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    if count:
        grid = (triton.cdiv(count, 1024),)
        add_up_kernel[grid](partials, c, count, COUNT=len(partials), BLOCK=1024, **overlap(partials))
    return c
