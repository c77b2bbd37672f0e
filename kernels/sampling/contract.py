"""The draw and what stood behind it: what the ops take and give. Filters and the multinomial draw are in `filters.py`,
noise in `noise.py`: they are torch on every device."""

from __future__ import annotations

import torch

from kernels.dispatch import implementation


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by Gumbel-max: the argmax of `logits [R, V]` (float32 or float64) over `temperature [R]`
    (float64) plus `gumbel_noise` of `seeds [R]` int64 and `positions [R]`, any integers; equals go to the lowest id.
    Temperature 0 is greedy: no noise. Returns ids `[R]` int64 and their log-probabilities `[R]` float32 at
    temperature 1."""
    return implementation("draw", logits)(logits, temperature, seeds, positions)


def survey(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """What stood behind the draw of `ids [R]` by `draw` from the other arguments: `[R, SURVEYED]` float64, of which
    `Survey.of` takes a row apart."""
    return implementation("survey", logits)(logits, temperature, seeds, positions, ids)
