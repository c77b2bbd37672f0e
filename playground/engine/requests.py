"""What comes in (requests, validated here and nowhere else) and what goes out (events, statistics)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from playground.checkpoint.config import MAX_TEMPERATURE, MIN_TEMPERATURE
from playground.engine.insight import Insight

MAX_SEED = 2**53 - 1  # the largest integer that JSON and JavaScript carry exactly
MAX_STOPS, MAX_STOP_LENGTH = 8, 200


class RequestError(ValueError):
    """A request that can't be run: one sentence that says what to do."""


class Sampler(StrEnum):
    GREEDY = "greedy"
    MULTINOMIAL = "multinomial"
    GUMBEL = "gumbel"


def _check_number(name: str, value: object, low: float, high: float, advice: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # false for NaN and infinities, too
        raise RequestError(f"{name} is {repr(value)[:80]}; {advice}.")


def _check_integer(name: str, value: object, low: int, high: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; {advice}.")


def whole_number(name: str, value: object) -> int:
    """JSON may bring 5 as 5.0. Raises `RequestError` for what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value != value // 1:
        raise RequestError(f"{name} is {repr(value)[:80]}; use a whole number.")
    return int(value)


@dataclass(frozen=True)
class SamplingParams:
    """How a row draws. Raises `RequestError` for a value outside its range.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off; `seed` -1 draws one, which the
    row's statistics report, so that the text can be had again.
    """

    sampler: Sampler | str = Sampler.GUMBEL
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = -1

    def __post_init__(self):
        names = [s.value for s in Sampler]
        if self.sampler not in names:
            raise RequestError(f"Unknown sampler {self.sampler!r}; choose {', '.join(names[:-1])} or {names[-1]}.")
        object.__setattr__(self, "sampler", Sampler(self.sampler))
        advice = f"use 0 (greedy) or a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}"
        _check_number("Temperature", self.temperature, 0, MAX_TEMPERATURE, advice)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise RequestError(f"Temperature is {self.temperature!r}; {advice}.")
        _check_integer("Top-k", self.top_k, 0, 1 << 24, "use a whole number, 0 to keep all tokens")
        _check_number("Top-p", self.top_p, 1e-6, 1, "use a number above 0 and up to 1, which keeps all tokens")
        _check_number("Min-p", self.min_p, 0, 1, "use a number from 0, which keeps all tokens, to 1")
        _check_integer("Seed", self.seed, -1, MAX_SEED, f"use a whole number from 0 to {MAX_SEED}, or -1 to draw one")

    @property
    def is_greedy(self) -> bool:
        return self.sampler is Sampler.GREEDY or self.temperature == 0

    def with_drawn_seed(self) -> SamplingParams:
        """These parameters with a real seed: short enough to be read out loud."""
        return self if self.seed >= 0 else replace(self, seed=secrets.randbelow(10**6))


@dataclass(frozen=True)
class Request:
    """One row to run. The engine checks lengths against its model's context (`check_lengths`)."""

    prompt: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    trace_scales: bool = False  # events bring activation scales
    inspect: bool = False  # events bring what was behind each draw
    keep: bool = False  # the cache of what was written stays, as long as there is room, for rows that branch off
    begun: int = 0  # so many of the prompt's last tokens are text under way: the new ones may end a character of theirs

    def __post_init__(self):
        if len(self.stop) > MAX_STOPS or not all(
            isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop
        ):
            raise RequestError(f"Use at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_LENGTH} characters each.")

    def check_lengths(self, context: int, vocab_size: int) -> None:
        advice = f"use a whole number from 1 to {context}, this model's context"
        _check_integer("Max new tokens", self.max_new_tokens, 1, context, advice)
        if not self.prompt:
            raise RequestError("The prompt is empty; write a few words for the model to continue.")
        if len(self.prompt) >= context:
            raise RequestError(
                f"The prompt has {len(self.prompt)} tokens and the context holds {context}; shorten the prompt so that "
                "at least one new token fits."
            )
        if not all(0 <= i < vocab_size for i in self.prompt):
            raise RequestError(f"A prompt token id is outside the vocabulary of {vocab_size}.")


@dataclass(frozen=True)
class TokenEvent:
    """One drawn token. `text` is what became certain with it (possibly nothing yet, never half a character);
    `logprob` the natural logarithm of its raw probability (softmax at T=1); `prefill_seconds` comes with the first
    token; `scales`, where the request asked for them, are the token's 1x128 activation scales per projection."""

    index: int
    id: int
    text: str
    logprob: float
    prefill_seconds: float | None = None
    scales: Mapping[str, list[float]] | None = field(default=None, repr=False)
    insight: Insight | None = field(default=None, repr=False)  # what was behind the draw, where the request asked


@dataclass(frozen=True)
class Stats:
    """A row's figures; rates in tokens per second, times in seconds since the request was submitted."""

    finish_reason: str  # "eos", "stop", "length" or "cancelled"
    prompt_tokens: int
    cached_tokens: int  # of the prompt, those that were found in the cache
    new_tokens: int
    seed: int
    ttft: float
    prefill_rate: float
    decode_rate: float
    cache_used: int  # tokens of this row in the KV cache
    cache_total: int  # tokens that the cache holds for all rows


@dataclass(frozen=True)
class FinishEvent:
    """A row's last event: text that was held back until now, and the figures."""

    text: str
    stats: Stats


Event = TokenEvent | FinishEvent
