"""In which order a product of many rows visits the experts that they chose."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import let_next_start, overlap, wait_for_previous


class Schedule(NamedTuple):
    """Choices sorted by expert, and for every block of a product the expert and the range of choices that it takes;
    int32."""

    order: torch.Tensor  # [T * k]: places in the flattened choices
    expert: torch.Tensor  # [blocks]
    first: torch.Tensor  # [blocks]
    last: torch.Tensor  # [blocks]; not above `first` where a block has nothing to do


@triton.jit
def schedule_kernel(
    chosen_ptr, order_ptr, expert_ptr, first_ptr, last_ptr, count, experts, blocks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One expert's choices, in order, and the blocks of BLOCK that take them. All experts' choices are counted by each
    program: reading them again costs less than a kernel that hands on counts. BINS is more than there are experts."""
    expert, bin, at = tl.program_id(0), tl.arange(0, BINS), tl.arange(0, CHUNK)
    let_next_start(PDL)
    wait_for_previous(PDL)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, count, CHUNK):
        counts += tl.histogram(tl.load(chosen_ptr + start + at, mask=start + at < count, other=BINS - 1), BINS)
    first = tl.sum(tl.where(bin < expert, counts, 0), axis=0)
    ours = tl.sum(tl.where(bin == expert, counts, 0), axis=0)
    needed = (counts + BLOCK - 1) // BLOCK
    number = tl.sum(tl.where(bin < expert, needed, 0), axis=0)
    place = first
    for start in range(0, count, CHUNK):
        mine = (tl.load(chosen_ptr + start + at, mask=start + at < count, other=BINS - 1) == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, axis=0) - 1, start + at, mask=mine > 0)
        place += tl.sum(mine, axis=0)
    end = tl.where(expert == experts - 1, blocks, number + (ours + BLOCK - 1) // BLOCK)  # the last has the empty ones
    for block in range(number, end):
        begin = first + (block - number) * BLOCK
        tl.store(expert_ptr + block, expert)
        tl.store(first_ptr + block, begin)
        tl.store(last_ptr + block, tl.minimum(first + ours, begin + BLOCK))


def schedule(chosen: torch.Tensor, experts: int, block: int) -> Schedule:
    """Made on the device, without the host knowing who chose what: as many blocks as there could be at most."""
    count = chosen.numel()
    blocks = triton.cdiv(count, block) + min(experts, count)
    storage = torch.empty(count + 3 * blocks, dtype=torch.int32, device=chosen.device)
    plan = Schedule(*storage.split([count, blocks, blocks, blocks]))
    schedule_kernel[(experts,)](
        chosen, *plan, count, experts, blocks, BLOCK=block, CHUNK=1024, BINS=triton.next_power_of_2(experts + 1),
        num_warps=4, **overlap(chosen),
    )  # fmt: skip
    return plan
