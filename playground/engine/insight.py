"""What was behind a draw, as `sampler.explain_rows` leaves it: surveys as the device made them. What they say is
reckoned here, when somebody looks: on a card each small operation costs every step as much as a small kernel."""

from __future__ import annotations

from collections.abc import Sequence

from kernels.sampling.layout import SURVEYED, Survey

_ENTROPY, _RANK = Survey._fields.index("entropy"), Survey._fields.index("rank")  # every token shown asks for these


class Insight:
    """One token's draw. Log-probabilities are natural; *raw* is softmax of the logits at T=1, *processed* what the row
    drew from, after temperature and filters (greedy: the raw one)."""

    __slots__ = ("numbers",)

    def __init__(self, numbers: memoryview | Sequence[float]):
        """The survey of the logits; then, where rows of the step had penalties, that of what these left; then, where
        some had filters, the probability that they cut and the survey of what they left; then, where some drew
        multinomially, the uniform number and the interval."""
        self.numbers = numbers

    @property
    def _parts(self) -> tuple[bool, bool]:
        """Whether penalties and filters have a survey of their own. A multinomial draw has 3 numbers, a cut 1."""
        surveys, rest = divmod(len(self.numbers), SURVEYED)
        filtered = rest in (1, 4)
        return surveys - filtered > 1, filtered

    @property
    def _raw(self) -> Survey:
        return Survey.of(self.numbers)

    @property
    def _penalised(self) -> Survey:
        """As the raw one where there were no penalties."""
        return Survey.of(self.numbers[SURVEYED:]) if self._parts[0] else self._raw

    def _processed(self) -> tuple[Survey, float, float]:
        """The survey of what the row drew from, and what its values are divided by and lowered by."""
        penalised, filtered = self._parts
        if filtered:
            return Survey.of(self.numbers[(1 + penalised) * SURVEYED + 1 :]), 1.0, 0.0
        survey = self._penalised
        return survey, survey.temperature, survey.heated_logsumexp

    @property
    def logprob(self) -> float:
        """Raw, of the token drawn."""
        raw = self._raw
        return raw.logit - raw.logsumexp

    @property
    def entropy(self) -> float:
        """Of the raw distribution, in nats."""
        return self.numbers[_ENTROPY]

    @property
    def rank(self) -> int:
        """How many tokens are likelier than the one drawn."""
        return int(self.numbers[_RANK])

    @property
    def penalised_logprob(self) -> float:
        """Of the token drawn, after penalties, at T=1."""
        survey = self._penalised
        return survey.logit - survey.logsumexp

    @property
    def processed_logprob(self) -> float:
        """Of the token drawn."""
        survey, by, less = self._processed()
        return survey.logit / by - less

    @property
    def processed_entropy(self) -> float:
        """In nats."""
        survey, _, _ = self._processed()
        return survey.entropy if self._parts[1] else survey.heated_entropy

    @property
    def kept(self) -> int:
        """How many tokens the filters left."""
        return int(self._processed()[0].count)

    @property
    def cut(self) -> float:
        """Probability, at the row's temperature, that the filters took away."""
        penalised, filtered = self._parts
        return self.numbers[(1 + penalised) * SURVEYED] if filtered else 0.0

    @property
    def uniform(self) -> float:
        """The one random number of a multinomial draw, in (0, 1); of other draws nothing."""
        return self.numbers[-3]

    @property
    def interval(self) -> tuple[float, float]:
        """Where a multinomial draw's token lies in the cumulative processed distribution, by id."""
        return self.numbers[-2], self.numbers[-1]

    @property
    def raw(self) -> list[tuple[int, float]]:
        """The likeliest tokens, best first: ids and log-probabilities."""
        raw = self._raw
        return _pairs(raw.top, [x - raw.logsumexp for x in raw.top_logits])

    @property
    def processed(self) -> list[tuple[int, float]]:
        """As `raw`, of the processed distribution; tokens that a filter cut are absent."""
        survey, by, less = self._processed()
        return _pairs(survey.top, [x / by - less for x in survey.top_logits])

    @property
    def scores(self) -> list[tuple[int, float, float]]:
        """The best candidates of a Gumbel-max draw, best first: ids, processed log-probabilities, and their noise."""
        survey, _, less = self._processed()
        found = zip(survey.scored, survey.heated, survey.noise, strict=True)
        return [(int(i), x - less, noise) for i, x, noise in found if x > float("-inf")]


def _pairs(ids: Sequence[float], logprobs: Sequence[float]) -> list[tuple[int, float]]:
    return [(int(i), p) for i, p in zip(ids, logprobs, strict=True) if p > float("-inf")]
