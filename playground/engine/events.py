"""What comes out of the engine: events, plain data. `text` is never half a character."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from playground.engine.insight import Insight


@dataclass(frozen=True)
class TokenEvent:
    """One drawn token. `text` is what became certain with it (possibly nothing yet, never half a character);
    `logprob` the natural logarithm of its raw probability (softmax at T=1)."""

    index: int
    id: int
    text: str
    logprob: float
    prefill_seconds: float | None = None  # with the first token
    insight: Insight | None = field(default=None, repr=False)  # what was behind the draw, where the request asked
    scales: np.ndarray | None = field(default=None, repr=False)  # [K/128] float32 of the projection that is watched


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


@dataclass(frozen=True)
class Failure:
    """The end of a request that could not be carried out. `kind`: "request", where another request would do,
    "checkpoint", where other files would, or "engine"."""

    message: str
    kind: str = "engine"


@dataclass(frozen=True)
class Waiting:
    """A row's place in line, 1 for the next."""

    position: int


@dataclass(frozen=True)
class Started:
    """A row's turn has come. `cached`: tokens of its prompt that were found in the cache; `branched`: it began on its
    parent's cache."""

    cached: int
    branched: bool


@dataclass(frozen=True)
class Done:
    """A job's last event: all of its answers have come."""


@dataclass(frozen=True)
class Progress:
    """Of work that takes long: `done` of `total`, in bytes while loading."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class ModelInfo:
    """What a page needs to know of the model that is loaded."""

    key: str  # of this loading of it: another one has another key
    name: str
    folder: str
    form: str  # of the weights: fp8 or bf16
    cache_form: str  # of the KV cache: plain or fp8
    context: int
    layers: int
    weights: int  # of all matrices, how many
    vocab_size: int
    cache_tokens: int  # that the cache holds for all rows
    max_rows: int  # that write at the same time; the others wait
    device: str  # cuda or cpu
    device_name: str
    torch: str  # its version
    path: str  # in words, what computes
    projection: str  # the first quantised one of the first layer; "" where there is none
    forms: tuple[str, ...]  # of the weights that are at hand
    defaults: dict[str, float | int | str] = field(default_factory=dict)  # settings to begin with
    suggested: bool = False  # by the checkpoint's own generation_config.json


@dataclass(frozen=True)
class EngineState:
    """What the engine is doing: "starting", "loading" (bytes), "preparing" (kernels), "ready", "ending" (`message` says
    why), "restarting" or "failed": for good."""

    phase: str
    done: int = 0
    total: int = 0
    message: str = ""
    info: ModelInfo | None = None  # from "loading" on: known before the weights are


@dataclass(frozen=True)
class Agreement:
    """How a sampler's draws of all tokens compare with their probabilities."""

    distance: float  # total variation, 0 to 1
    statistic: float  # chi-square
    freedom: int  # degrees of it; 0: one token only, nothing to test
    p: float


@dataclass(frozen=True)
class Counts:
    """How often each sampler (greedy, multinomial, gumbel) drew each of C tokens and, last, any other:
    `[samplers, C + 1]` int64."""

    counts: np.ndarray
    expected: np.ndarray  # [C + 1] float64: what the processed distribution says
    done: int
    total: int
    tests: tuple[Agreement, ...]  # of each sampler, over the whole vocabulary


@dataclass(frozen=True)
class CurvePoint:
    """Milliseconds per token behind `length` tokens."""

    length: int
    cached_ms: float
    uncached_ms: float


@dataclass(frozen=True)
class WeightScales:
    """The 128x128 tile scales of one projection, the shape `[N, K]` of its weight, and, where it was quantised as it
    was loaded, each tile's relative error: median and largest; `twice`, where its file had other blocks, whose numbers
    the error is against. `names` of the layer's projections; `grid` None where the layer has none. `unused`: scales
    for a cache or for activations in the model's files."""

    layer: int
    projection: str
    names: tuple[str, ...]
    grid: np.ndarray | None = None  # [tiles of N, tiles of K] float32
    shape: tuple[int, ...] = ()
    error: tuple[float, ...] | None = None
    twice: bool = False
    unused: int = 0


@dataclass(frozen=True)
class TokenScales:
    """One token's 1x128 activation scales; `values` None where no activation met the projection."""

    values: np.ndarray | None  # [K/128] float32
    recomputed: bool  # by feeding the text again: decode and prefill round apart


Event = TokenEvent | FinishEvent
"""What iterating over a stream of text yields."""
RowEvent = Event | Failure | Waiting | Started
