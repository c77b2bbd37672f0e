"""The scales of a model as a picture needs them: the grid of a weight's tiles, the strip of a token's blocks."""

from __future__ import annotations

import base64
import statistics
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScaleGrid:
    """`data` is base64 of row-major little-endian float32."""

    rows: int
    columns: int
    data: str
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> ScaleGrid:
        values = np.atleast_2d(np.asarray(values, dtype="<f4"))
        data = base64.b64encode(values.tobytes()).decode()
        flat = values.ravel().tolist()  # few: Python's own functions are faster than numpy's
        return cls(*values.shape, data, min(flat), statistics.median(flat), max(flat))
