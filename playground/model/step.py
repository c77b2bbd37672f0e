"""What one forward knows about its tokens besides their ids: where they stand, and which cache they use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Traced(NamedTuple):
    """The scales of one feed, and who reads them."""

    readers: tuple[str, ...]  # names of projections
    scales: torch.Tensor  # [T, K/128] float32; with `experts` [T * k, K/128]
    experts: torch.Tensor | None  # [T, k]: each choice's scales are read by that reader alone


@dataclass
class ScaleTrace:
    """Collects the 1x128 activation scales of a forward."""

    feeds: list[Traced] = field(default_factory=list)

    def record(self, readers: tuple[str, ...], scales: torch.Tensor, experts: torch.Tensor | None) -> None:
        self.feeds.append(Traced(readers, scales, experts))

    def flat(self) -> torch.Tensor:
        """Everything in one float32 tensor, so that one transfer brings it to the host."""
        pieces = [t.flatten().float() for feed in self.feeds for t in (feed.scales, feed.experts) if t is not None]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def read(self, flat: list[float], rows: Iterable[int]) -> list[dict[str, list[float]]]:
        """Each row's scales by the name of the projection that they feed, from what `flat` holds. Experts that a row
        did not choose are absent from its dictionary."""
        rows = list(rows)
        out: list[dict[str, list[float]]] = [{} for _ in rows]
        at = 0
        for readers, scales, experts in self.feeds:
            (count, width), start = scales.shape, at
            at += count * width
            for seen, row in zip(out, rows, strict=True):
                if experts is None:
                    seen.update(dict.fromkeys(readers, flat[start + row * width : start + (row + 1) * width]))
                    continue
                chosen = experts.shape[1]
                for choice in range(row * chosen, (row + 1) * chosen):
                    reader = readers[int(flat[at + choice])]
                    piece = flat[start + choice * width : start + (choice + 1) * width]
                    seen[reader] = seen.get(reader, []) + piece  # shared experts are the pieces of one wide projection
            at += 0 if experts is None else experts.numel()
        return out


@dataclass
class Step:
    """One forward: either a piece of one row's prompt (prefill), or one token of each of R rows (decode)."""

    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor | None  # [T] int64 places in the flattened cache; None: nothing is kept
    context: torch.Tensor | None = None  # [S] int64 places of the whole prompt so far, for a piece after the first
    pages: torch.Tensor | None = None  # [R, P] int32, decode only
    lengths: torch.Tensor | None = None  # [R] int32 tokens seen, the new one included; decode only
    trace: ScaleTrace | None = None

    @property
    def is_decode(self) -> bool:
        return self.pages is not None
