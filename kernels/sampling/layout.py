"""What a survey tells, number by number. No torch here: whoever shows a draw reads it from bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PROMPTED = 1 << 24  # added to how often a token was written, where it stands in the prompt: see `penalise`
SHOWN, SCORED = 10, 6  # of a survey: likeliest tokens, and best candidates of a Gumbel-max draw
SINGLE = 8  # numbers of a survey that stand alone, in front of those lists
SURVEYED = SINGLE + 2 * SHOWN + 3 * SCORED  # numbers of a survey


class Survey(NamedTuple):
    """What stood behind one row's draw: numbers, or tensors of them, as `survey` leaves them side by side, ids too.
    Where the vocabulary is smaller than what is shown, ids are 0 and their values -inf."""

    temperature: float  # by which heated logits were divided: 1 for a greedy row
    count: float  # of logits above -inf
    logsumexp: float  # of the logits
    entropy: float  # nats, at T=1
    heated_logsumexp: float
    heated_entropy: float
    rank: float  # how many logits are larger than that of the token drawn
    logit: float  # of the token drawn
    top: Sequence[float]  # SHOWN ids of the largest logits, best first
    top_logits: Sequence[float]
    scored: Sequence[float]  # SCORED ids of the largest logit / temperature + noise, best first
    heated: Sequence[float]  # their logit / temperature
    noise: Sequence[float]  # their Gumbel noise

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Survey:
        """Takes `SURVEYED` numbers apart."""
        fields, at = list(numbers[:SINGLE]), SINGLE
        for size in (SHOWN, SHOWN, SCORED, SCORED, SCORED):
            fields.append(numbers[at : at + size])
            at += size
        return cls(*fields)
