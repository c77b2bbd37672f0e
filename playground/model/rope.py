"""Rotary position embeddings with YaRN: the table of angles, and the rotation of interleaved pairs."""

from __future__ import annotations

import math

import torch

from playground.config import ModelConfig, YarnConfig


def _yarn_ramp(yarn: YarnConfig, dim: int, theta: float) -> torch.Tensor:
    """Share of extrapolation per frequency, `[dim/2]`: 1 keeps a fast frequency, 0 divides a slow one by `factor`."""

    def pair_that_turns(rotations: float) -> float:
        """Index of the pair that makes this many turns over the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return 1.0 - ramp.clamp(0, 1)


def rope_table(config: ModelConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cosines and sines of every position, `[max_position_embeddings, 2, qk_rope_head_dim / 2]` float32.

    Computed on the CPU whatever the device, so that all devices rotate by the same numbers.
    """
    dim = config.qk_rope_head_dim
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    magnitude = 1.0
    if config.yarn:
        keep = _yarn_ramp(config.yarn, dim, config.rope_theta)
        freqs = freqs / config.yarn.factor * (1 - keep) + freqs * keep
        magnitude = config.yarn.attention_scale(config.yarn.mscale)
        magnitude /= config.yarn.attention_scale(config.yarn.mscale_all_dim)
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), freqs)
    return (torch.stack([angles.cos(), angles.sin()], dim=1) * magnitude).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs `(x[2i], x[2i+1])` of the last dimension, as DeepSeek-V3's weights are laid out.

    `x` is `[..., dim]`, `cos` and `sin` broadcast against `[..., dim/2]`; the arithmetic is float32, the result
    has the dtype of `x`.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
