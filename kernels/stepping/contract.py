"""What begins and ends a step: what the ops take and give."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.dispatch import implementation


def look_up(
    tokens: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a forward begins with: rows `tokens [T]` of the embeddings `weight [V, D]`, and rows `positions [T]` (both
    int64) of the angles `table [P, 2, R/2]`. No index is checked on a card."""
    return implementation("look_up", weight)(tokens, positions, weight, table)


def deliver(tensors: Sequence[torch.Tensor], starts: Sequence[int], host: torch.Tensor, turn: torch.Tensor) -> None:
    """Copies each tensor, contiguous, of elements of 4 or 8 bytes, word by word to its start in row `turn [1]` (int32)
    of `host [2, W]` int32. With tensors on a card this is pinned memory, and the words are there when what has been
    launched so far has ended."""
    implementation("deliver", turn)(tensors, starts, host, turn)


def advance(
    ids: torch.Tensor,
    moves: torch.Tensor,
    block_table: torch.Tensor,
    *,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    turn: torch.Tensor,
    page_size: int,
) -> None:
    """Moves R rows on by `moves [R]` (0 or 1): the drawn `ids [R]` become `tokens`, and `positions`, the sequence
    `lengths` (int32, position + 1) and `slots` (places in the flattened cache, through `block_table [R, P]` int32)
    follow; `turn [1]` (int32, 0 or 1) becomes the other. All in place."""
    implementation("advance", ids)(
        ids, moves, block_table, tokens=tokens, positions=positions, lengths=lengths, slots=slots, turn=turn,
        page_size=page_size,
    )  # fmt: skip
