"""Rotary position embeddings: the table of angles (plain, linear, YaRN, Llama 3, LongRoPE)."""

from __future__ import annotations

import math

import torch

from playground.checkpoint.config import LinearScaling, Llama3Scaling, LongScaling, RopeConfig, YarnScaling


def _yarn(freqs: torch.Tensor, rope: RopeConfig, yarn: YarnScaling) -> torch.Tensor:
    """Keeps fast frequencies, divides slow ones by `factor`, and blends between (arXiv:2309.00071, section 3.2)."""

    def pair_that_turns(rotations: float) -> float:
        """Index of the pair that makes this many turns over the original context."""
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    keep = 1.0 - ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freqs / yarn.factor * (1 - keep) + freqs * keep


def _llama3(freqs: torch.Tensor, llama: Llama3Scaling) -> torch.Tensor:
    """As YaRN, but the passage runs linearly in the number of turns over the original context."""
    turns = llama.original_max_position_embeddings * freqs / (2 * math.pi)
    keep = ((turns - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor)).clamp(0, 1)
    return freqs / llama.factor * (1 - keep) + freqs * keep


def rope_table(rope: RopeConfig, positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cosines and sines of every position, `[positions, 2, dim / 2]` float32.

    Computed on the CPU whatever the device, so that all devices rotate by the same numbers.
    """
    freqs = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    magnitude = 1.0
    if isinstance(rope.scaling, YarnScaling):
        freqs, magnitude = _yarn(freqs, rope, rope.scaling), rope.scaling.magnitude
    elif isinstance(rope.scaling, Llama3Scaling):
        freqs = _llama3(freqs, rope.scaling)
    elif isinstance(rope.scaling, LinearScaling):
        freqs = freqs / rope.scaling.factor
    elif isinstance(rope.scaling, LongScaling):
        longer = positions > rope.scaling.original_max_position_embeddings
        freqs = freqs / torch.tensor(rope.scaling.long if longer else rope.scaling.short)
        magnitude = rope.scaling.magnitude
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), freqs)
    return (torch.stack([angles.cos(), angles.sin()], dim=1) * magnitude).to(device)
