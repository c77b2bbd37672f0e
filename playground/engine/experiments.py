"""Experiments with one next-token distribution: do the samplers agree, what settings do to it, a draw step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import kernels
from playground.engine.client import Service
from playground.engine.requests import RequestError, Sampler, SamplingParams
from playground.engine.sampler import Needs, Settings, draw_rows

CANDIDATES = 64  # tokens of a distribution that experiments draw from
MOST_DRAWS = 1_000_000
CHUNK = 20_000  # draws at once: 64 numbers of noise each
SHOWN = 12
STEPPED = 6
NEEDS = Needs(filtered=True, summed=True)  # every sampler on the same processed distribution


@dataclass(frozen=True)
class Distribution:
    """What may follow a prompt: the likeliest tokens, and what share of the probability they have together."""

    texts: tuple[str, ...]
    logits: torch.Tensor  # [C] float64, best first: raw log-probabilities
    covered: float


def next_distribution(service: Service, ids: Sequence[int], spelled) -> Distribution:
    """By the prefill that a run has, which leaves nothing in the cache. Raises `RequestError`."""
    logits = service.call(lambda engine: engine.logits_after(ids).cpu())
    best = logits.double().log_softmax(-1).topk(CANDIDATES)
    return Distribution(tuple(spelled(i) for i in best.indices.tolist()), best.values, best.values.exp().sum().item())


def processed(d: Distribution, params: SamplingParams) -> torch.Tensor:
    """Probabilities `[C]` after temperature and filters; 0 where a filter cut. Greedy: all on the best."""
    if params.is_greedy:
        return torch.nn.functional.one_hot(torch.tensor(0), len(d.texts)).double()
    s = Settings.of([params], torch.device("cpu"))
    return kernels.process_logits(d.logits[None], s.temperature, s.top_k, s.top_p, s.min_p)[0].exp()


def temperature_table(d: Distribution, params: SamplingParams) -> dict:
    """Before and after the settings, for the likeliest tokens."""
    before, after = d.logits.softmax(-1), processed(d, params)
    entropies = [torch.special.entr(p).sum().item() for p in (before, after)]
    kept = int((after > 0).sum())
    return {
        "columns": ["Before", "After"],
        "rows": [
            {"label": text, "values": [b, a]}
            for text, b, a in zip(d.texts[:SHOWN], before.tolist(), after.tolist(), strict=False)
        ],
        "note": f"Entropy {entropies[0]:.2f} nats before, {entropies[1]:.2f} after; {kept} of {len(d.texts)} stay. "
        f"Shown are the {len(d.texts)} likeliest, which have {d.covered:.2%} of the probability.",
    }


def count_draws(d: Distribution, params: SamplingParams, draws: int) -> Iterator[dict]:
    """Draws by every sampler from the same distribution; yields a table after each chunk. Raises `RequestError`."""
    if not 1 <= draws <= MOST_DRAWS:
        raise RequestError(f"Draws is {draws}; use a whole number from 1 to {MOST_DRAWS}.")
    if params.is_greedy:
        raise RequestError("At temperature 0 every draw is greedy; use a temperature above 0 to compare samplers.")
    expected, size = processed(d, params), len(d.texts)
    samplers = [Sampler.GREEDY, Sampler.MULTINOMIAL, Sampler.GUMBEL]
    counts = {sampler: torch.zeros(size, dtype=torch.int64) for sampler in samplers}
    done = 0
    while done < draws:
        count = min(CHUNK, draws - done)
        positions, logits = torch.arange(done, done + count), d.logits[None].expand(count, -1)
        for sampler in samplers:
            one = SamplingParams(**(vars(params) | {"sampler": sampler, "temperature": params.temperature}))
            row = Settings.of([one], torch.device("cpu"))
            settings = Settings(*(column.expand(count) for column in row))
            ids, _ = draw_rows(logits, settings, positions, NEEDS)
            counts[sampler] += torch.bincount(ids, minlength=size)
        done += count
        yield _counted(d, expected, counts, done, draws)


def _counted(d: Distribution, expected: torch.Tensor, counts: dict, done: int, draws: int) -> dict:
    shares = [expected, *(c.double() / done for c in counts.values())]
    notes = [f"{done:,} of {draws:,} draws by each."]
    for sampler in (Sampler.MULTINOMIAL, Sampler.GUMBEL):
        distance = (counts[sampler].double() / done - expected).abs().sum().item() / 2
        notes.append(
            f"{sampler.value.capitalize()}: total variation {distance:.4f}, {_chi_square(counts[sampler], expected)}."
        )
    return {
        "columns": ["Softmax", "Greedy", "Multinomial", "Gumbel-max"],
        "rows": [
            {"label": text, "values": [share[i].item() for share in shares]} for i, text in enumerate(d.texts[:SHOWN])
        ],
        "note": " ".join(notes),
        "done": done / draws,
    }


def _chi_square(counts: torch.Tensor, expected: torch.Tensor) -> str:
    """Pearson's test; cells of which fewer than 5 are due are joined, as its approximation asks."""
    total = int(counts.sum())
    due = expected * total
    wide = due >= 5
    seen, due = [torch.cat([t[wide], t[~wide].sum()[None]]).double() for t in (counts.double(), due)]
    seen, due = seen[due > 1e-9], due[due > 1e-9]
    if len(due) < 2:
        return "one token only: nothing to test"
    statistic = ((seen - due) ** 2 / due).sum()
    p = torch.special.gammaincc(torch.tensor((len(due) - 1) / 2, dtype=torch.float64), statistic / 2).item()
    return f"chi-square {statistic.item():.1f} on {len(due) - 1} degrees of freedom, p = {p:.3f}"


def draw_in_steps(d: Distribution, params: SamplingParams, position: int) -> dict:
    """Gumbel-max taken apart for the likeliest tokens: dividing probabilities by exponential noise and adding Gumbel
    noise to their logarithms choose the same."""
    after = processed(
        d, SamplingParams(**(vars(params) | {"sampler": "gumbel", "temperature": params.temperature or 1.0}))
    )
    p = after[:STEPPED] / after[:STEPPED].sum()
    seed = torch.tensor([max(params.seed, 0)])
    gumbel = kernels.gumbel_noise(seed, torch.tensor([position]), STEPPED)[0]
    exponential = (-gumbel).exp()
    ratio = p / exponential
    best = int(ratio.argmax())
    rows = zip(d.texts[:STEPPED], p.tolist(), exponential.tolist(), ratio.tolist(), gumbel.tolist(), strict=False)
    return {
        "position": position,
        "rows": [
            {
                "label": text,
                "p": share,
                "exponential": noise,
                "ratio": over,
                "score": math.log(share) + g if share > 0 else None,
                "chosen": i == best,
            }
            for i, (text, share, noise, over, g) in enumerate(rows)
        ],
    }
