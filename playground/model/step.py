"""What one forward knows about its tokens besides their ids: where they stand, and which cache they use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


class Traced(NamedTuple):
    """The scales of one feed, and who reads them."""

    readers: tuple[str, ...] | tuple[tuple[str, ...], ...]  # names of projections; with `experts` of each expert
    scales: torch.Tensor  # [T, K/128] float32; with `experts` [T * k, K/128]
    experts: torch.Tensor | None  # [T, k]: a choice's scales are read by that expert alone; those beyond read elsewhere


@dataclass
class ScaleTrace:
    """Collects the 1x128 activation scales of a forward."""

    feeds: list[Traced] = field(default_factory=list)

    def record(self, readers: tuple, scales: torch.Tensor, experts: torch.Tensor | None) -> None:
        self.feeds.append(Traced(readers, scales, experts))

    def newest(self, last: torch.Tensor, size: int) -> ScaleTrace:
        """Copies the scales of the token at `last [1]` of a prefill chunk of `size` tokens. Every feed ends with the
        chunk: some have seen the prompt before it as well, those behind the last attention that token alone."""
        kept: list[Traced] = []
        places: dict[int, torch.Tensor] = {}  # by the tokens that a feed has seen
        for readers, scales, experts in self.feeds:
            each = 1 if experts is None else experts.shape[1]
            seen = len(scales) // each
            if seen not in places:
                places[seen] = last + (seen - size) if seen >= size else torch.zeros_like(last)
            at = places[seen]
            scales = scales.unflatten(0, (-1, each))[at].flatten(0, 1)
            kept.append(Traced(readers, scales, None if experts is None else experts[at]))
        return ScaleTrace(kept)

    def flat(self) -> torch.Tensor:
        """Everything in one float32 tensor, so that one transfer brings it to the host."""
        flat = [t.flatten().float() for feed in self.feeds for t in (feed.scales, feed.experts) if t is not None]
        return torch.cat(flat) if flat else torch.empty(0)

    def layout(self) -> ScaleLayout:
        """Where what `flat` holds belongs."""
        found: dict[str, list[Place]] = {}
        at = 0
        for readers, scales, experts in self.feeds:
            (count, width), start = scales.shape, at
            at += count * width
            if experts is None:
                found.update({reader: [Place(start, width)] for reader in readers})
                continue
            for expert, names in enumerate(readers):
                for name in names:
                    found.setdefault(name, []).append(Place(start, width, at, experts.shape[1], expert))
            at += experts.numel()
        return ScaleLayout(found)


class Place(NamedTuple):
    """Where the scales of one feed of a projection begin, row after row; with `chosen` choice after choice of each row,
    of which those count whose number, behind `experts`, is `expert`."""

    start: int
    width: int
    experts: int = 0
    chosen: int = 0
    expert: int = 0


class ScaleLayout(NamedTuple):
    """Takes a flat trace apart, one projection of one row at a time: a page shows one of hundreds."""

    places: dict[str, list[Place]]  # by the name of the projection that reads them

    def read(self, flat: np.ndarray, row: int, projection: str) -> np.ndarray | None:
        """`[K/128]` float32; None where no activation of the row met the projection. Shared experts are the pieces of
        one wide projection."""
        found = []
        for start, width, experts, chosen, expert in self.places.get(projection, ()):
            if not chosen:
                found.append(flat[start + row * width : start + (row + 1) * width])
                continue
            choices = flat[experts + row * chosen : experts + (row + 1) * chosen]
            for choice in np.flatnonzero(choices == expert).tolist():
                at = start + (row * chosen + choice) * width
                found.append(flat[at : at + width])
        return np.concatenate(found) if found else None


@dataclass
class Step:
    """One forward: either a chunk of one row's prompt (prefill), or one token of each of R rows (decode)."""

    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor | None  # [T] int64 places in the flattened cache; None: nothing is kept
    context: torch.Tensor | None = None  # [S] int64 slots of the whole prompt so far, for chunks after the first
    pages: torch.Tensor | None = None  # [R, P] int32, the block table; decode only
    lengths: torch.Tensor | None = None  # [R] int32 sequence lengths, the new token included; decode only
    wanted: torch.Tensor | None = None  # [W] int64: hidden states are returned at these tokens of a chunk; None: all
    trace: ScaleTrace | None = None

    @property
    def is_decode(self) -> bool:
        return self.pages is not None

    def of_wanted(self, x: torch.Tensor) -> torch.Tensor:
        """`x [T, ...]` at the tokens whose hidden states are returned: `[W, ...]`."""
        return x if self.wanted is None else x[self.wanted]
