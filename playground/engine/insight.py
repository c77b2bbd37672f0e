"""What was behind a draw, as `sampler.explain_rows` leaves it."""

from __future__ import annotations

from collections.abc import Sequence

from kernels import SCORED, SHOWN

_SINGLE = 10  # numbers that stand alone at the beginning


class Insight:
    """One token's draw. Log-probabilities are natural; *raw* is softmax of the logits at T=1, *processed* what the row
    drew from, after temperature and filters (greedy: the raw one)."""

    __slots__ = ("numbers",)

    def __init__(self, numbers: Sequence[float]):
        self.numbers = numbers

    logprob = property(lambda self: self.numbers[0], doc="Raw, of the token drawn.")
    entropy = property(lambda self: self.numbers[1], doc="Of the raw distribution, in nats.")
    rank = property(lambda self: int(self.numbers[2]), doc="How many tokens are likelier than the one drawn.")
    processed_logprob = property(lambda self: self.numbers[3], doc="Of the token drawn.")
    processed_entropy = property(lambda self: self.numbers[4], doc="In nats.")
    kept = property(lambda self: int(self.numbers[5]), doc="How many tokens the filters left.")
    cut = property(
        lambda self: self.numbers[6], doc="Probability, at the row's temperature, that the filters took away."
    )
    uniform = property(lambda self: self.numbers[7], doc="The one random number of a multinomial draw, in (0, 1).")

    @property
    def interval(self) -> tuple[float, float]:
        """Where the drawn token lies in the cumulative processed distribution, by id."""
        return self.numbers[8], self.numbers[9]

    def _block(self, start: int, count: int) -> Sequence[float]:
        return self.numbers[_SINGLE + start : _SINGLE + start + count]

    @property
    def raw(self) -> list[tuple[int, float]]:
        """The likeliest tokens, best first: ids and log-probabilities."""
        return _pairs(self._block(0, SHOWN), self._block(SHOWN, SHOWN))

    @property
    def processed(self) -> list[tuple[int, float]]:
        """As `raw`, of the processed distribution; tokens that a filter cut are absent."""
        return _pairs(self._block(2 * SHOWN, SHOWN), self._block(3 * SHOWN, SHOWN))

    @property
    def scores(self) -> list[tuple[int, float, float]]:
        """The best candidates of a Gumbel-max draw, best first: ids, processed log-probabilities, and their noise."""
        ids, logprobs, noise = (self._block(4 * SHOWN + part * SCORED, SCORED) for part in range(3))
        return [(i, p, n) for (i, p), n in zip(_pairs(ids, logprobs), noise, strict=False)]


def _pairs(ids: Sequence[float], logprobs: Sequence[float]) -> list[tuple[int, float]]:
    return [(int(i), p) for i, p in zip(ids, logprobs, strict=True) if p > float("-inf")]
