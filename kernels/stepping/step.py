"""What begins and ends a step, in Triton: looking tokens up, handing results to the host, moving rows on.

Little work, but on a card a step would wait for each of torch's own operations, which don't begin early, and for each
transfer twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, wait_for_previous


@triton.jit
def look_up_kernel(
    tokens_ptr, positions_ptr, weight_ptr, table_ptr, x_ptr, rope_ptr, dim, angles,
    BLOCK: tl.constexpr, BLOCK_A: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a token's embedding; the first program brings its position's angles as well."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, angle = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_A)
    let_next_start(PDL)
    wait_for_previous(PDL)
    token, position = tl.load(tokens_ptr + row), tl.load(positions_ptr + row)
    x = tl.load(weight_ptr + token * dim + column, mask=column < dim)
    turned = (angle < angles) & (part == 0)
    cos_sin = tl.load(table_ptr + position * angles + angle, mask=turned)
    tl.store(x_ptr + row * dim + column, x, mask=column < dim)
    tl.store(rope_ptr + row * angles + angle, cos_sin, mask=turned)


def look_up(tokens, positions, weight, table) -> tuple[torch.Tensor, torch.Tensor]:
    rows, dim, angles = len(tokens), weight.shape[1], table[0].numel()
    x, rope = weight.new_empty(rows, dim), table.new_empty(rows, *table.shape[1:])
    block = min(1024, triton.next_power_of_2(dim))
    if rows:
        look_up_kernel[(rows, triton.cdiv(dim, block))](
            tokens, positions, weight, table, x, rope, dim, angles,
            BLOCK=block, BLOCK_A=triton.next_power_of_2(angles), num_warps=4, **overlap(weight),
        )  # fmt: skip
    return x, rope


@triton.jit
def deliver_kernel(sources, words, starts, host_ptr, turn_ptr, half, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK words of each source, as far as it has them, to the half of the host's memory whose turn it is."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    let_next_start(PDL)
    wait_for_previous(PDL)
    host_ptr += tl.load(turn_ptr) * half
    for i in tl.static_range(len(sources)):
        inside = at < words[i]
        tl.store(host_ptr + starts[i] + at, tl.load(sources[i] + at, mask=inside), mask=inside)


def deliver(tensors, starts, host, turn) -> None:
    sources = tuple(t.view(torch.int32) for t in tensors)
    words, block = tuple(t.numel() for t in sources), 1024
    deliver_kernel[(triton.cdiv(max(words), block),)](
        sources, words, tuple(starts), host, turn, host.stride(0), BLOCK=block, num_warps=4, **overlap(turn)
    )


@triton.jit
def advance_kernel(
    ids_ptr, moves_ptr, block_table_ptr, tokens_ptr, positions_ptr, seq_lens_ptr, slots_ptr, turn_ptr, rows,
    block_table_row,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    real = row < rows
    let_next_start(PDL)
    wait_for_previous(PDL)
    moves = tl.load(moves_ptr + row, mask=real, other=0)
    position = tl.load(positions_ptr + row, mask=real, other=0) + moves
    page = tl.load(block_table_ptr + row * block_table_row + position // PAGE, mask=real, other=0).to(tl.int64)
    tl.store(tokens_ptr + row, tl.load(ids_ptr + row, mask=real, other=0), mask=real)
    tl.store(positions_ptr + row, position, mask=real)
    tl.store(seq_lens_ptr + row, (position + 1).to(tl.int32), mask=real)
    tl.store(slots_ptr + row, page * PAGE + position % PAGE, mask=real)
    tl.store(turn_ptr, 1 - tl.load(turn_ptr))


def advance(ids, moves, block_table, *, tokens, positions, lengths, slots, turn, page_size: int) -> None:
    advance_kernel[(1,)](
        ids, moves, block_table, tokens, positions, lengths, slots, turn, len(ids), block_table.stride(0),
        PAGE=page_size, BLOCK=triton.next_power_of_2(len(ids)), num_warps=1, **overlap(ids),
    )  # fmt: skip
