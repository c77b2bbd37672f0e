"""Tables of experiments with one next-token distribution: what settings do to it, do the samplers agree, a draw step by
step. The engine computes, here are the words. Every number is of the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from playground.engine.events import Counts
from playground.engine.settings import SAMPLER_NAMES

SHOWN = 12
STEPPED = 8
ABOUT_P = "p: how often chance alone would differ as much; only a small one, under 0.01, speaks against a sampler."


@dataclass(frozen=True)
class Distribution:
    """What may follow a prompt."""

    prompt: tuple[int, ...]
    logits: np.ndarray  # [V] float32, raw
    spelled: Callable[[int], str]

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Raw, `[V]` float64."""
        logits = self.logits.astype(np.float64)
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()

    @cached_property
    def shown(self) -> tuple[int, ...]:
        """The likeliest tokens, best first."""
        return tuple(np.argsort(-self.logits, kind="stable")[:SHOWN].tolist())

    @cached_property
    def texts(self) -> list[str]:
        """Of the tokens that are shown."""
        return [self.spelled(token) for token in self.shown]


def entropy(probabilities: np.ndarray) -> float:
    """In nats."""
    present = probabilities[probabilities > 0]
    return float(-(present * np.log(present)).sum())


def with_others(d: Distribution, *distributions: np.ndarray) -> list[dict]:
    """A row for each token that is shown, and one for all others together."""
    shown = list(d.shown)
    columns = [(each[shown].tolist(), max(1.0 - float(each[shown].sum()), 0.0)) for each in distributions]
    rows = [{"label": text, "values": [each[i] for each, _ in columns]} for i, text in enumerate(d.texts)]
    return [*rows, {"label": "others", "values": [rest for _, rest in columns], "aside": True}]


def temperature_table(d: Distribution, after: np.ndarray) -> dict:
    """Before and after the settings, for the likeliest tokens and all others together."""
    kept = int((after > 0).sum())
    return {
        "columns": ["Raw", "After settings"],
        "rows": with_others(d, d.probabilities, after),
        "note": f"Entropy {entropy(d.probabilities):.2f} nats raw, {entropy(after):.2f} after; {kept:,} of "
        f"{len(after):,} tokens stay.",
    }


def counted(d: Distribution, found: Counts) -> dict:
    """Shares of what each sampler drew beside the probabilities, and whether they agree."""
    notes = [f"{found.done:,} of {found.total:,} draws by each."]
    names = list(SAMPLER_NAMES.values())
    for name, test in list(zip(names, found.tests, strict=True))[1:]:
        tested = f"chi-square {test.statistic:.1f} on {test.freedom} degrees of freedom, p = {test.p:.3f}"
        notes.append(
            f"{name}: total variation {test.distance:.4f}, {tested if test.freedom else 'one token: nothing to test'}."
        )
    shares = [found.expected, *(found.counts / found.done)]
    labels = [*({"label": text} for text in d.texts), {"label": "others", "aside": True}]
    return {
        "columns": ["Probability", *names],
        "rows": [row | {"values": [float(share[i]) for share in shares]} for i, row in enumerate(labels)],
        "note": " ".join([*notes, ABOUT_P]),
        "done": found.done / found.total,
    }


def draw_in_steps(d: Distribution, after: np.ndarray, gumbel: np.ndarray, seed: int, position: int) -> dict:
    """Gumbel-max taken apart: dividing probabilities by exponential noise and adding Gumbel noise to their logarithms
    choose the same token of all."""
    with np.errstate(divide="ignore"):
        scores = np.log(after) + gumbel
    best = np.argsort(-scores, kind="stable")[:STEPPED].tolist()
    noise = np.exp(-gumbel)
    return {
        "columns": ["p", "E ~ Exp(1)", "p / E", "log p + noise"],
        "rows": [
            {
                "label": d.spelled(token),
                "values": [float(n) for n in (after[token], noise[token], after[token] / noise[token], scores[token])],
                "chosen": token == best[0],
            }
            for token in best
            if math.isfinite(scores[token])
        ],
        "note": f"Noise of seed {seed}, position {position}. Of all {len(after):,} tokens these have the largest "
        "ratios; the largest has the largest score as well, and is drawn.",
        "figures": True,
    }
