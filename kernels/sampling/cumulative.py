"""Cumulative sums of probabilities in Triton, in whole numbers, so that no order of additions changes a bit.

Two levels, so that a row is spread over the card: the sum of every tile, then each tile's own running sums on top of
those of the tiles before it. Torch's own kernels for one row and for many add in different orders.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import UNIT
from kernels.launch import let_next_start, overlap, wait_for_previous

TILE = 1024
_UNIT = tl.constexpr(UNIT)


@triton.jit
def load_whole(x_ptr, row, vocab, tile, TILE: tl.constexpr):
    """A tile's probabilities as whole numbers of 2^-62."""
    at = tile * TILE + tl.arange(0, TILE)
    return (tl.load(x_ptr + row * vocab + at, mask=at < vocab, other=0.0) * _UNIT).to(tl.int64)


@triton.jit
def sum_tiles_kernel(x_ptr, sums_ptr, vocab, tiles, TILE: tl.constexpr, PDL: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    let_next_start(PDL)
    wait_for_previous(PDL)
    tl.store(sums_ptr + row * tiles + tile, tl.sum(load_whole(x_ptr, row, vocab, tile, TILE), axis=0))


@triton.jit
def cumulative_kernel(
    x_ptr, sums_ptr, out_ptr, vocab, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    before, at = tl.arange(0, BLOCK), tile * TILE + tl.arange(0, TILE)
    let_next_start(PDL)
    wait_for_previous(PDL)
    start = tl.sum(tl.load(sums_ptr + row * tiles + before, mask=before < tile, other=0), axis=0)
    total = start + tl.cumsum(load_whole(x_ptr, row, vocab, tile, TILE), axis=0)
    tl.store(out_ptr + row * vocab + at, total.to(tl.float64) / _UNIT, mask=at < vocab)


def cumulative(probs: torch.Tensor) -> torch.Tensor:
    probs = probs.double().contiguous()
    (rows, vocab), tiles = probs.shape, triton.cdiv(probs.shape[1], TILE)
    sums = torch.empty(rows, tiles, dtype=torch.int64, device=probs.device)
    out = torch.empty_like(probs)
    if probs.numel():
        sum_tiles_kernel[(rows, tiles)](probs, sums, vocab, tiles, TILE=TILE, num_warps=4, **overlap(probs))
        cumulative_kernel[(rows, tiles)](
            probs, sums, out, vocab, tiles, TILE=TILE, BLOCK=triton.next_power_of_2(tiles), num_warps=4,
            **overlap(probs),
        )  # fmt: skip
    return out
