"""Tables of experiments with one next-token distribution: do the samplers agree, what settings do to it, a draw step by
step. The engine computes, here are the words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from playground.engine.events import Counts
from playground.engine.settings import SAMPLER_NAMES

SHOWN = 12
STEPPED = 6


@dataclass(frozen=True)
class Distribution:
    """What may follow a prompt: the likeliest tokens, and what share of the probability they have together."""

    texts: tuple[str, ...]
    logprobs: np.ndarray  # [C] float64, best first, raw
    covered: float


def temperature_table(d: Distribution, after: np.ndarray) -> dict:
    """Before and after the settings, for the likeliest tokens."""
    before = np.exp(d.logprobs) / np.exp(d.logprobs).sum()
    entropies = [-math.fsum(p * math.log(p) for p in shares.tolist() if p > 0) for shares in (before, after)]
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


def counted(d: Distribution, found: Counts) -> dict:
    """Shares of what each sampler drew beside the softmax, and whether they agree."""
    shares = found.counts / found.done
    notes = [f"{found.done:,} of {found.total:,} draws by each."]
    names = list(SAMPLER_NAMES.values())
    for name, share, (statistic, freedom, p) in zip(names[1:], shares[1:], found.tests[1:], strict=True):
        distance = float(np.abs(share - found.expected).sum()) / 2
        test = f"chi-square {statistic:.1f} on {freedom} degrees of freedom, p = {p:.3f}"
        notes.append(
            f"{name}: total variation {distance:.4f}, {test if freedom else 'one token only: nothing to test'}."
        )
    columns = [found.expected, *shares]
    return {
        "columns": ["Softmax", *names],
        "rows": [
            {"label": text, "values": [float(share[i]) for share in columns]} for i, text in enumerate(d.texts[:SHOWN])
        ],
        "note": " ".join(notes),
        "done": found.done / found.total,
    }


def draw_in_steps(d: Distribution, after: np.ndarray, gumbel: np.ndarray, seed: int, position: int) -> dict:
    """Gumbel-max taken apart for the likeliest tokens: dividing probabilities by exponential noise and adding Gumbel
    noise to their logarithms choose the same."""
    p = after[:STEPPED] / after[:STEPPED].sum()
    exponential = np.exp(-gumbel[: len(p)])
    ratio = p / exponential
    best = int(ratio.argmax())
    rows = zip(d.texts, p.tolist(), exponential.tolist(), ratio.tolist(), gumbel.tolist(), strict=False)
    return {
        "columns": ["p", "E ~ Exp(1)", "p / E", "log p + noise"],
        "rows": [
            {
                "label": text,
                "values": [share, noise, over, math.log(share) + g if share > 0 else None],
                "chosen": i == best,
            }
            for i, (text, share, noise, over, g) in enumerate(rows)
        ],
        "note": f"Noise of seed {seed}, position {position}. The largest ratio has the largest score.",
        "figures": True,
    }
