"""Where a file's weights lie in ours: padded where kernels want whole blocks, pairs that rotate beside each other."""

from __future__ import annotations

import torch

Layout = tuple[int, ...]
"""For each row (or column) of ours, the one of the file that it comes from; -1: zeros."""


def padded(size: int, width: int) -> Layout:
    """Zeros behind it."""
    return (*range(size), *[-1] * (width - size))


def padded_halves(size: int, width: int) -> Layout:
    """Zeros behind each half: rotary embedding turns `x[i]` with `x[i + size / 2]`."""
    half = padded(size // 2, width // 2)
    return (*half, *(i if i < 0 else i + size // 2 for i in half))


def pairs_of_halves(size: int) -> Layout:
    """`x[i]` and `x[i + size / 2]`, which rotate together, beside each other."""
    return tuple(i // 2 + i % 2 * (size // 2) for i in range(size))


def behind(*layouts: Layout) -> Layout:
    """Of things that lie behind each other in the file, and here."""
    out: list[int] = []
    start = 0
    for layout in layouts:
        out += [i if i < 0 else start + i for i in layout]
        start += max(layout) + 1
    return tuple(out)


def lay_out(tensor: torch.Tensor, layout: Layout | None, dim: int) -> torch.Tensor:
    """`tensor` as in the file, in this layout along `dim`."""
    if layout is None:
        return tensor
    index = torch.tensor(layout, device=tensor.device)
    out = tensor.index_select(dim, index.clamp(min=0))
    return out.index_fill(dim, (index < 0).nonzero()[:, 0], 0)


def as_stored(tensor: torch.Tensor, layout: Layout | None, dim: int) -> torch.Tensor:
    """The way back of `lay_out`."""
    if layout is None:
        return tensor
    places = [0] * (max(layout) + 1)
    for ours, theirs in enumerate(layout):
        if theirs >= 0:
            places[theirs] = ours
    return tensor.index_select(dim, torch.tensor(places, device=tensor.device))
