"""The scales of a model: which projections have them, the grid of a weight's tiles, the strip of a token's blocks."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch

from playground.model.layers import Linear
from playground.model.transformer import Transformer


@dataclass(frozen=True)
class ScaleGrid:
    """Scales as a picture needs them; `data` is base64 of row-major little-endian float32."""

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
        return cls(*values.shape, data, float(values.min()), float(np.median(values)), float(values.max()))


def projections(model: Transformer) -> list[list[str]]:
    """The names of each layer's FP8 projections, such as `self_attn.o_proj` or `mlp.experts.3.up_proj`."""
    return [
        [name for name, part in layer.named_modules() if isinstance(part, Linear) and hasattr(part, "weight_scale_inv")]
        for layer in model.model.layers
    ]


def weight_scales(model: Transformer, layer: int, projection: str) -> tuple[ScaleGrid, tuple[int, int]]:
    """The 128x128 tile scales of one projection, and the shape `[N, K]` of its weight."""
    linear = model.model.layers[layer].get_submodule(projection)
    with torch.inference_mode():
        return ScaleGrid.of(linear.weight_scale_inv.float().cpu().numpy()), tuple(linear.weight.shape)
