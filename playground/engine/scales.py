"""Activation scales of what was written last: every step leaves all of them in one array, which stays as it is until
somebody asks for one projection of one token."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from playground.model.step import ScaleLayout

KEPT_BYTES = 256 << 20


class StepScales(NamedTuple):
    """Of all rows of one step."""

    flat: np.ndarray  # float32
    layout: ScaleLayout

    def read(self, place: int, projection: str) -> np.ndarray | None:
        """`[K/128]` of the row at `place` in the step."""
        return self.layout.read(self.flat, place, projection)


class ScaleStore:
    """The newest steps that fit into `limit` bytes."""

    def __init__(self, limit: int = KEPT_BYTES):
        self.limit, self.bytes = limit, 0
        self.steps: deque[tuple[StepScales, list[tuple[int, int]]]] = deque()
        self.found: dict[tuple[int, int], tuple[StepScales, int]] = {}

    def add(self, step: StepScales, tokens: list[tuple[int, int, int]]) -> None:
        """`tokens` of the step: id of the row, index of the token, its place in the step."""
        keys = [(row, index) for row, index, _ in tokens]
        self.found.update({key: (step, place) for key, (_, _, place) in zip(keys, tokens, strict=True)})
        self.steps.append((step, keys))
        self.bytes += step.flat.nbytes
        while self.bytes > self.limit and len(self.steps) > 1:
            old, keys = self.steps.popleft()
            self.bytes -= old.flat.nbytes
            for key in keys:
                self.found.pop(key, None)

    def find(self, row: int, index: int) -> tuple[StepScales, int] | None:
        """The step that wrote a token, and the token's place in it."""
        return self.found.get((row, index))
