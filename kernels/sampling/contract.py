"""The draw and what stood behind it: what the ops take and give. Filters and the multinomial draw are in `filters.py`,
noise in `noise.py`: they are made of these ops and of torch, on every device."""

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
    return draw_and_normaliser(logits, temperature, seeds, positions)[:2]


def draw_and_normaliser(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    changed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`draw`, and the logsumexp `[R]` float32 of each row's logits, which the log-probability of any of its tokens is
    made of: `logits[id].float() - logsumexp` has the bits that `draw` returns for `id`, whatever drew it and whoever
    shares the step. (Torch's own `logsumexp` adds in an order that depends on the number of rows.)

    `changed [R, V]` are the logits to draw from, where they are others: the rest is of `logits` still."""
    return implementation("draw_and_normaliser", logits)(logits, temperature, seeds, positions, changed)


def penalise(
    logits: torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    penalised: torch.Tensor,
) -> torch.Tensor:
    """`logits [R, V]` float32 after penalties, `[R, V]` float32, in this order: logits of tokens that were seen are
    divided by `repetition` where positive and multiplied by it elsewhere (Keskar et al., 2019, arXiv:1909.05858);
    `frequency` times as often as a token was written, and `presence` once, are subtracted; `bias [R, V]` float32 is
    added. `counts [R, V]` int32: how often each token was written, plus `PROMPTED` where the prompt holds it. The
    others are `[R]`: float64, and `penalised` int64, 0 for rows that keep their logits as they are. Reckoned in
    float64."""
    if counts.shape != logits.shape or bias.shape != logits.shape or not counts.is_contiguous():
        raise ValueError(f"counts {tuple(counts.shape)} and bias {tuple(bias.shape)} don't fit {tuple(logits.shape)}")
    return implementation("penalise", logits)(logits, counts, bias, repetition, frequency, presence, penalised)


def cumulative(probs: torch.Tensor) -> torch.Tensor:
    """Running sums along each row of probabilities `[R, V]`, whose sum is at most 1: `[R, V]` float64.

    Summed as whole numbers of 2^-62, so that a row has the same bits alone, in a batch and on any device. The sums
    never fall, and rise only at probabilities of at least 2^-62. The last column is the row's sum."""
    return implementation("cumulative", probs)(probs)


def survey(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    ids: torch.Tensor,
    changed: torch.Tensor | None = None,
    scored: bool = True,
) -> torch.Tensor:
    """What stood behind the draw of `ids [R]` by `draw` from the other arguments: `[R, SURVEYED]` float64, of which
    `Survey.of` takes a row apart. With `changed [R, V]`, of the dtype of `logits`, that of `logits` without candidates
    and then that of `changed`, `[R, 2 * SURVEYED]`. Without `scored` there are no candidates at all: their ids are 0,
    their values -inf."""
    return implementation("survey", logits)(logits, temperature, seeds, positions, ids, changed, scored)
