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


def projections(model: Transformer, layer: int) -> list[str]:
    """The names of a layer's FP8 projections, such as `self_attn.o_proj` or `mlp.experts.3.up_proj`."""
    modules = model.model.layers[layer].named_modules()
    return [name for name, part in modules if isinstance(part, Linear) and part.is_fp8]


@dataclass(frozen=True)
class WeightScales:
    """The 128x128 tile scales of one projection, the shape `[N, K]` of its weight, and, where it was quantised as it
    was loaded, each tile's relative error: median and largest."""

    grid: ScaleGrid
    shape: tuple[int, int]
    error: tuple[float, float] | None


@torch.inference_mode()
def weight_scales(model: Transformer, layer: int, projection: str) -> WeightScales:
    linear, error = model.model.layers[layer].get_submodule(projection), None
    if linear.tile_errors is not None:
        error = (linear.tile_errors.median().item(), linear.tile_errors.max().item())
    return WeightScales(ScaleGrid.of(linear.weight_scale_inv.float().cpu().numpy()), linear.stored, error)
