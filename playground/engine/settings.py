"""What people may set about a draw: one table, which the page, links, receipts, columns, the chat, the lab, the API and
the command line read. A new setting is a field of `SamplingParams`, and what the sampler makes of it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from playground.checkpoint.config import MAX_TEMPERATURE, MIN_TEMPERATURE

MOST_BIASES = 300  # tokens
MAX_SEED = 2**53 - 1  # the largest integer that JSON and JavaScript carry exactly


class RequestError(ValueError):
    """A request that can't be run: one sentence that says what to do."""


class Sampler(StrEnum):
    GREEDY = "greedy"
    MULTINOMIAL = "multinomial"
    GUMBEL = "gumbel"


SAMPLER_NAMES = {Sampler.GREEDY: "Greedy", Sampler.MULTINOMIAL: "Multinomial", Sampler.GUMBEL: "Gumbel-max"}


@dataclass(frozen=True)
class Setting:
    """One setting: what is accepted, and how it is shown. `off`, if any, is the value that changes nothing; it is
    accepted even where it lies outside `low` to `high`. `shown` are a slider's ends and step; without, it is a box."""

    label: str
    kind: type  # str for a choice, float, or int
    advice: str  # what to use instead of a wrong value
    help: str  # for the command line
    low: float = 0
    high: float = 0
    off: float | str | None = None
    shown: tuple[float, float, float] | None = None
    info: str = ""  # beside the control
    choices: dict[str, str] = field(default_factory=dict)  # value -> what it is called
    filters: bool = False  # it removes tokens from the distribution; stands in the page's fold
    penalty: bool = False  # it changes logits before temperature does; stands in the page's fold, too
    needed: bool = False  # a receipt without it is damaged

    def check(self, value: Any) -> Any:
        """The value, as its kind. Raises `RequestError`."""
        if self.kind is str and not self.choices:
            return spelled_bias(value, self)
        if self.kind is str:
            if value not in list(self.choices):  # JSON may bring what can't be hashed
                raise RequestError(f"Unknown {self.label.lower()} {repr(value)[:80]}; {self.advice}.")
            return value
        kinds = (int,) if self.kind is int else (int, float)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not (value == self.off or self.low <= value <= self.high):  # false for NaN, too
            raise RequestError(f"{self.label} is {repr(value)[:80]}; {self.advice}.")
        return value

    def read(self, value: Any) -> Any:
        """As `check`, of what JSON, a link or a page's control brings: 5 may come as 5.0."""
        return whole_number(self.label, value) if self.kind is int else value

    def parse(self, text: str) -> Any:
        """Of text, as a link or a shell has it. Raises ValueError, or `RequestError`."""
        return self.check(text if self.kind is str else self.kind(text))


def spelled_bias(value: Any, setting: Setting) -> str:
    """A logit bias as `token:bias token:bias`, each token once. Raises `RequestError`."""
    try:
        if isinstance(value, dict):  # as OpenAI's API has it
            pairs = [(int(token), float(bias)) for token, bias in value.items()]
        else:
            parts = [part.split(":") for part in value.replace(",", " ").split()]
            pairs = [(int(token), float(bias)) for token, bias in parts]
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise RequestError(f"{setting.label} is {repr(value)[:80]}; {setting.advice}.") from None
    known = dict(pairs)
    fits = all(0 <= token < 1 << 31 and setting.low <= bias <= setting.high for token, bias in pairs)
    if not fits or len(known) < len(pairs) or len(known) > MOST_BIASES:
        raise RequestError(f"{setting.label} is {repr(value)[:80]}; {setting.advice}.")
    return " ".join(f"{token}:{bias:g}" for token, bias in known.items())


def whole_number(name: str, value: object) -> int:
    """JSON may bring 5 as 5.0. Raises `RequestError` for what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value != value // 1:
        raise RequestError(f"{name} is {repr(value)[:80]}; use a whole number.")
    return int(value)


def setting(default: Any, *args, **about) -> Any:
    return field(default=default, metadata={"setting": Setting(*args, **about)})


@dataclass(frozen=True)
class SamplingParams:
    """How a row draws. Raises `RequestError` for a value outside its range.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off; `seed` -1 draws one, which the
    row's statistics report, so that the text can be had again.
    """

    sampler: Sampler | str = setting(
        Sampler.GUMBEL,
        "Sampler",
        str,
        "choose greedy, multinomial or gumbel",
        "greedy, multinomial or gumbel (default)",
        info="How a token is drawn from the model's probabilities.",
        choices=SAMPLER_NAMES,
        needed=True,
    )
    temperature: float = setting(
        1.0,
        "Temperature",
        float,
        f"use 0 (greedy) or a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}",
        "0 is greedy; default: the checkpoint's own, else 0.8",
        low=MIN_TEMPERATURE,
        high=MAX_TEMPERATURE,
        off=0,
        shown=(0, 2, 0.05),
        info="0 is greedy",
        needed=True,
    )
    top_k: int = setting(
        0,
        "Top-k",
        int,
        "use a whole number, 0 to keep all tokens",
        "keep the k likeliest tokens; 0 keeps all (default)",
        high=1 << 24,
        off=0,
        shown=(0, 200, 1),
        info="0 keeps all",
        filters=True,
    )
    top_p: float = setting(
        1.0,
        "Top-p",
        float,
        "use a number above 0 and up to 1, which keeps all tokens",
        "keep the likeliest tokens up to this sum; default 1",
        low=1e-6,
        high=1,
        off=1,
        shown=(0.05, 1, 0.01),
        info="1 keeps all",
        filters=True,
    )
    min_p: float = setting(
        0.0,
        "Min-p",
        float,
        "use a number from 0, which keeps all tokens, to 1",
        "drop tokens under this share of the best; default 0",
        high=1,
        off=0,
        shown=(0, 0.5, 0.01),
        info="0 keeps all",
        filters=True,
    )
    repetition_penalty: float = setting(
        1.0,
        "Repetition penalty",
        float,
        "use a number from 0.1 to 10; 1 changes nothing",
        "divides logits of tokens in prompt and text, where they are positive, and multiplies others; default 1",
        low=0.1,
        high=10,
        off=1,
        shown=(1, 2, 0.01),
        info="1 is off; of prompt and text",
        penalty=True,
    )
    frequency_penalty: float = setting(
        0.0,
        "Frequency penalty",
        float,
        "use a number from -2 to 2",
        "lowers the logit of a token for each time that it was written; default 0",
        low=-2,
        high=2,
        off=0,
        shown=(-2, 2, 0.05),
        info="0 is off; each time",
        penalty=True,
    )
    presence_penalty: float = setting(
        0.0,
        "Presence penalty",
        float,
        "use a number from -2 to 2",
        "lowers the logit of a token that was written, once; default 0",
        low=-2,
        high=2,
        off=0,
        shown=(-2, 2, 0.05),
        info="0 is off; once",
        penalty=True,
    )
    logit_bias: str = setting(
        "",
        "Logit bias",
        str,
        f"write up to {MOST_BIASES} token ids with what is added to their logit, such as 13:-5 262:2.5, each from -100 "
        "to 100",
        "added to logits, by token id, such as '13:-5 262:2.5'; default none",
        low=-100,
        high=100,
        off="",
        info="token id:bias, such as 13:-5 262:2.5",
        penalty=True,
    )
    seed: int = setting(
        -1,
        "Seed",
        int,
        f"use a whole number from 0 to {MAX_SEED}, or -1 to draw one",
        "replays a text exactly; -1 (default) draws one",
        low=-1,
        high=MAX_SEED,
        info="-1 draws one; the footer shows it",
        needed=True,
    )

    def __post_init__(self):
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.check(getattr(self, name)))
        object.__setattr__(self, "sampler", Sampler(self.sampler))

    @property
    def is_greedy(self) -> bool:
        return self.sampler is Sampler.GREEDY or self.temperature == 0

    @property
    def is_filtered(self) -> bool:
        return any(getattr(self, name) != SETTINGS[name].off for name in FILTERS)

    @property
    def is_penalised(self) -> bool:
        """Whether logits are changed before anything else."""
        return any(getattr(self, name) != SETTINGS[name].off for name in PENALTIES)

    @property
    def biases(self) -> dict[int, float]:
        pairs = (part.split(":") for part in self.logit_bias.split())
        return {int(token): float(bias) for token, bias in pairs}

    def with_drawn_seed(self) -> SamplingParams:
        """These parameters with a real seed: short enough to be read out loud."""
        return self if self.seed >= 0 else replace(self, seed=secrets.randbelow(10**6))

    @classmethod
    def read(cls, values: dict[str, Any]) -> SamplingParams:
        """From values by name as JSON brings them; what is not named is as by default. Raises `RequestError`."""
        if unknown := set(values) - set(SETTINGS):
            raise RequestError(f"A setting has no {sorted(unknown)[0]!r}; it has {', '.join(SETTINGS)}.")
        return cls(**{name: SETTINGS[name].read(value) for name, value in values.items()})


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(SamplingParams)}
FILTERS = tuple(name for name, setting in SETTINGS.items() if setting.filters)
PENALTIES = tuple(name for name, setting in SETTINGS.items() if setting.penalty)
FOLDED = (*FILTERS, *PENALTIES)
_PLAIN = tuple(name for name in SETTINGS if name not in FOLDED and name != "seed")
SWITCHES = ("past_end", "parse_special", "skip_thinking")
"""Off by default: to write past the end, to read control tokens in a prompt, to answer in a chat without thinking."""
NAMES = (*_PLAIN, "max_new_tokens", "seed", *FOLDED, *SWITCHES)
"""Of the settings of a run, in the order in which the page's handlers get their values, and programs may give them."""


ORDER = (
    "In this order: repetition, frequency and presence penalty, logit bias; temperature; top-k, top-p, min-p; the draw."
)


def in_a_word(name: str, value: Any) -> str:
    """A setting and its value, as titles and notes have it."""
    return f"{SETTINGS[name].label} {value if isinstance(value, str) else format(value, 'g')}".lower()


SUGGESTED = {f.name: f.default for f in fields(SamplingParams)} | {"temperature": 0.8}
"""What pages and commands begin with where a checkpoint says nothing of its own."""


def in_order(**given: Any) -> list:
    """Values of `NAMES`, as a program sends them without names: by default every setting is off."""
    return [(SUGGESTED | dict.fromkeys(SWITCHES, False) | {"temperature": 1.0} | given)[name] for name in NAMES]


def suggested_by(generation: Any) -> tuple[dict[str, Any], bool]:
    """What a `generation_config.json` suggests, over what we do, and whether it suggests anything. A value that we
    would refuse is left out."""
    found = {}
    for name, setting in SETTINGS.items() if isinstance(generation, dict) else ():
        value = generation.get(name)
        if setting.kind is str or name == "seed" or type(value) not in (int, float):
            continue
        if setting.low <= value <= setting.high and (setting.kind is float or value == value // 1):
            found[name] = setting.kind(value)
    if isinstance(generation, dict) and (generation.get("do_sample") is False or generation.get("temperature") == 0):
        found["sampler"] = str(Sampler.GREEDY)
    return SUGGESTED | found, bool(found)
