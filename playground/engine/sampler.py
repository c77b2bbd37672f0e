"""One sampling pass over all rows of a step, each with its own sampler, filters, seed and position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels
from playground.engine.graph import sent
from playground.engine.history import Histories
from playground.engine.settings import Sampler, SamplingParams


class Settings(NamedTuple):
    """The parameters of R rows as tensors `[R]`, so that a step can read them where it runs."""

    temperature: torch.Tensor  # float64; 0 is greedy
    seeds: torch.Tensor  # int64
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float64
    multinomial: torch.Tensor  # int64, 0 or 1
    repetition: torch.Tensor  # float64, and the two that follow: penalties
    frequency: torch.Tensor
    presence: torch.Tensor
    penalised: torch.Tensor  # int64, 0 or 1

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Settings:
        used = [(0.0, 0, 1.0, 0.0) if p.is_greedy else (p.temperature, p.top_k, p.top_p, p.min_p) for p in params]
        temperature, top_k, top_p, min_p = zip(*used, strict=True)
        penalties = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        real = torch.tensor([temperature, top_p, min_p, *zip(*penalties, strict=True)], dtype=torch.float64)
        seeds, multinomial = [max(p.seed, 0) for p in params], [p.sampler is Sampler.MULTINOMIAL for p in params]
        whole = torch.tensor([seeds, top_k, multinomial, [p.is_penalised for p in params]], dtype=torch.int64)
        packed = torch.cat([real.view(torch.int64), whole])  # for one transfer
        padded = F.pad(packed, (0, len(used) % 2))  # each begins at 16 bytes, as kernels like it
        there = sent(padded, device)[:, : len(used)]
        temperature, top_p, min_p, *penalties = there[: len(real)].view(torch.float64)
        seeds, top_k, multinomial, penalised = there[len(real) :]
        return cls(temperature, seeds, top_k, top_p, min_p, multinomial, *penalties, penalised)


class Needs(NamedTuple):
    """What a step's draws need besides logits and noise, as soon as one of its rows does."""

    filtered: bool  # a sorted distribution
    summed: bool  # a cumulative one, for multinomials
    penalised: bool = False  # what rows have seen, to change logits by

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> Needs:
        params = list(params)
        drawing = [p for p in params if not p.is_greedy]
        filtered = any(p.is_filtered for p in drawing)
        summed = any(p.sampler is Sampler.MULTINOMIAL for p in drawing)
        return cls(filtered, summed, any(p.is_penalised for p in params))


def penalised_rows(logits: torch.Tensor, s: Settings, needs: Needs, histories: Histories | None) -> torch.Tensor | None:
    """What temperature and filters begin with where rows have penalties: the logits `[R, V]` after them, with the bits
    that they had in other rows. None where no row has any."""
    if not needs.penalised:
        return None
    return kernels.penalise(logits, *histories, s.repetition, s.frequency, s.presence, s.penalised)


def processed_rows(logits: torch.Tensor, s: Settings, needs: Needs) -> torch.Tensor:
    """The processed distribution of every row, log-probabilities `[R, V]` float64; of greedy rows at T=1."""
    heated = torch.where(s.temperature > 0, s.temperature, 1.0)
    if needs.filtered:
        return kernels.process_logits(logits, heated, s.top_k, s.top_p, s.min_p)
    return kernels.log_softmax(logits.double() / heated[:, None])  # the same numbers, unsorted


def draw_rows(
    logits: torch.Tensor,
    settings: Settings,
    positions: torch.Tensor,
    needs: Needs,
    changed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token per row. `logits [R, V]`; `positions [R]` is where each token will stand: its noise's address;
    `needs` of all rows together; `changed` what `penalised_rows` makes of the logits. Returns ids and raw
    log-probabilities (natural logarithm, softmax at T=1).

    A row goes the way that its own parameters say, whatever the others need: its draw has the same bits in any company.
    """
    s = settings
    ids, logprobs, normaliser = kernels.draw_and_normaliser(logits, s.temperature, s.seeds, positions, changed)
    if not (needs.filtered or needs.summed):
        return ids, logprobs
    one = torch.ones_like(s.temperature)  # made before what follows it: a draw reads it before it waits
    drawn, processed = s.temperature > 0, processed_rows(logits if changed is None else changed, s, needs)
    if needs.filtered:
        by_noise, _ = kernels.draw(processed, one, s.seeds, positions)
        ids = torch.where(drawn & ((s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)), by_noise, ids)
    if needs.summed:
        by_sum = kernels.draw_multinomial(processed, s.seeds, positions.long())
        ids = torch.where(drawn & (s.multinomial > 0), by_sum, ids)
    return ids, logits.gather(-1, ids[:, None])[:, 0].float() - normaliser  # as the draw itself reckons it


def explain_rows(
    logits: torch.Tensor,
    settings: Settings,
    positions: torch.Tensor,
    ids: torch.Tensor,
    needs: Needs,
    changed: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `Insight` takes apart, `[R, N]` float64, of the draw by `draw_rows` from these arguments that gave `ids`."""
    s = settings
    one = torch.ones_like(s.temperature) if needs.filtered else None  # long before a survey reads it without waiting
    # candidates are those of what the row drew from: the last survey has them
    told = [kernels.survey(logits, s.temperature, s.seeds, positions, ids, changed, not needs.filtered)]
    changed = logits if changed is None else changed
    processed = processed_rows(changed, s, needs) if needs.filtered or needs.summed else None
    if needs.filtered:
        heated = torch.where(s.temperature > 0, s.temperature, 1.0)
        before = kernels.log_softmax(changed.double() / heated[:, None]).exp()
        cut = kernels.cumulative(torch.where(processed > float("-inf"), 0.0, before))[:, -1:]
        told += [cut, kernels.survey(processed, one, s.seeds, positions, ids)]
    if needs.summed:
        cumulative, chosen = kernels.cumulative(processed.exp()), ids[:, None]
        total, low = cumulative[:, -1:], cumulative.gather(-1, (chosen - 1).clamp(min=0))
        uniform = kernels.uniform_noise(s.seeds, positions.long())[:, None]
        told += [uniform, torch.where(chosen > 0, low, 0.0) / total, cumulative.gather(-1, chosen) / total]
    return torch.cat(told, dim=-1) if len(told) > 1 else told[0]
