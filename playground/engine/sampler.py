"""One sampling pass over all rows of a step, each with its own sampler, filters, seed and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

import kernels
from playground.engine.request import Sampler, SamplingParams


class Settings(NamedTuple):
    """The parameters of R rows as tensors `[R]`, so that a step can read them where it runs."""

    temperature: torch.Tensor  # float64; 0 is greedy
    seeds: torch.Tensor  # int64
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float64
    multinomial: torch.Tensor  # bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Settings:
        def column(values, dtype=torch.float64):
            return torch.tensor(list(values), dtype=dtype).to(device)

        return cls(
            column(0.0 if p.is_greedy else p.temperature for p in params),
            column((max(p.seed, 0) for p in params), torch.int64),
            column((p.top_k for p in params), torch.int64),
            column(p.top_p for p in params),
            column(p.min_p for p in params),
            column((p.sampler is Sampler.MULTINOMIAL for p in params), torch.bool),
        )


def is_shaped(params: SamplingParams) -> bool:
    """Whether a draw needs the processed distribution: for a filter, or for the cumulative sum of a multinomial."""
    filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return not params.is_greedy and (filters or params.sampler is Sampler.MULTINOMIAL)


def draw_rows(
    logits: torch.Tensor, settings: Settings, positions: torch.Tensor, shaped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token per row. `logits [R, V]`; `positions [R]` is where each token will stand: its noise's address;
    `shaped` where any row `is_shaped`. Returns ids and raw log-probabilities (natural logarithm, softmax at T=1).

    A row goes the way that its own parameters say, whatever the others need: its draw has the same bits in any company.
    """
    s = settings
    ids, logprobs = kernels.draw(logits, s.temperature, s.seeds, positions)
    if not shaped:
        return ids, logprobs
    filtered = (s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)
    drawn = s.temperature > 0
    temperature, one = torch.where(drawn, s.temperature, 1.0), torch.ones_like(s.temperature)
    processed = kernels.process_logits(logits, temperature, s.top_k, s.top_p, s.min_p)
    by_noise, _ = kernels.draw(processed, one, s.seeds, positions)
    by_sum = kernels.draw_multinomial(processed, s.seeds, positions.long())
    ids = torch.where(drawn & filtered, by_noise, ids)
    ids = torch.where(drawn & s.multinomial, by_sum, ids)
    return ids, (logits.gather(-1, ids[:, None]) - logits.logsumexp(-1, keepdim=True))[:, 0]


def explain_rows(
    logits: torch.Tensor, settings: Settings, positions: torch.Tensor, ids: torch.Tensor, shaped: bool
) -> torch.Tensor:
    """What `Insight` takes apart, `[R, N]` float64, of the draw by `draw_rows` from these arguments that gave `ids`."""
    s, one = settings, torch.ones_like(settings.temperature)
    raw = kernels.survey(logits, s.temperature, s.seeds, positions, ids)
    heated = torch.where(s.temperature > 0, s.temperature, one)
    if not shaped:  # processed is raw at another temperature: the same order, nothing cut, no multinomial
        zero = torch.zeros_like(raw.rank)
        single = [
            *(raw.logit - raw.logsumexp, raw.entropy, raw.rank),
            *(raw.logit / heated - raw.heated_logsumexp, raw.heated_entropy, zero + logits.shape[-1]),
            *[zero] * 4,
        ]
        after = raw.top_logits / heated[:, None] - raw.heated_logsumexp[:, None]
        scored, own = raw, raw.heated - raw.heated_logsumexp[:, None]
        kept_ids = raw.top
    else:
        processed = kernels.process_logits(logits, heated, s.top_k, s.top_p, s.min_p)
        scored = kernels.survey(processed, one, s.seeds, positions, ids)
        cumulative, chosen = processed.exp().cumsum(-1), ids[:, None]
        total, high = cumulative[:, -1], cumulative.gather(-1, chosen)[:, 0]
        low = torch.where(ids > 0, cumulative.gather(-1, (chosen - 1).clamp(min=0))[:, 0], 0.0)
        kept = processed > float("-inf")
        tempered = (logits.double() / heated[:, None]).sub_(raw.heated_logsumexp[:, None]).exp_()
        single = [
            *(raw.logit - raw.logsumexp, raw.entropy, raw.rank),
            *(scored.logit, scored.entropy, kept.sum(-1).double()),
            *((tempered * ~kept).sum(-1), kernels.uniform_noise(s.seeds, positions.long()), low / total, high / total),
        ]
        kept_ids, after, own = scored.top, scored.top_logits, scored.heated
    blocks = [raw.top.double(), raw.top_logits - raw.logsumexp[:, None], kept_ids.double(), after]
    blocks += [scored.scored.double(), own, scored.noise]
    return torch.cat([torch.stack(single, -1), *blocks], -1)
