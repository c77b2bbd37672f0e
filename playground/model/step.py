"""What one forward knows about its tokens besides their ids: where they stand, and which cache they use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class ScaleTrace:
    """Collects the 1x128 activation scales of a forward, by the name of the projection that they feed.

    `rows[name]` says which of the step's rows the scales belong to, where not all of them passed through (experts).
    """

    scales: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> [rows, K/128] float32
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> [rows] int64

    def record(self, names: tuple[str, ...], scales: torch.Tensor, rows: torch.Tensor | None) -> None:
        for name in names:
            self.scales[name] = scales
            if rows is not None:
                self.rows[name] = rows


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
