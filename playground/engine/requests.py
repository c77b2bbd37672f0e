"""What goes into the engine: requests, plain data, checked here and in `settings.py` and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from playground.engine.settings import RequestError, SamplingParams

MAX_STOPS, MAX_STOP_LENGTH = 8, 200


@dataclass(frozen=True)
class Request:
    """One row to write. The scheduler checks lengths against its model's context (`check_lengths`)."""

    prompt: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    trace_scales: bool = False  # activation scales are recorded, for `Scales` and for those who watch
    inspect: bool = False  # events bring what was behind each draw
    keep: bool = False  # the cache of what was written stays, as long as there is room, for rows that branch off
    begun: int = 0  # so many of the prompt's last tokens are text that the new ones go on: see `TextStream`
    written: int = 0  # so many of the prompt's last tokens count as text, of which penalties speak
    watch: str = ""  # the projection whose activation scales come with each token; "": none

    def __post_init__(self):
        if isinstance(self.stop, str):  # as OpenAI's API takes it
            object.__setattr__(self, "stop", (self.stop,))
        if len(self.stop) > MAX_STOPS or not all(
            isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop
        ):
            raise RequestError(f"Use at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_LENGTH} characters each.")

    def check_lengths(self, context: int, vocab_size: int) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise RequestError(f"Max new tokens is {self.max_new_tokens!r}; use a whole number.")
        if not 1 <= self.max_new_tokens <= context:
            raise RequestError(
                f"Max new tokens is {self.max_new_tokens}; use a whole number from 1 to {context}, this model's "
                "context."
            )
        check_prompt(self.prompt, context, vocab_size)
        if wrong := [token for token in self.params.biases if token >= vocab_size]:
            raise RequestError(f"Logit bias names token {wrong[0]}; the vocabulary has {vocab_size}.")


def check_prompt(prompt: tuple[int, ...], context: int, vocab_size: int) -> None:
    """Raises `RequestError` for a prompt after which no token fits, or which holds what is no token."""
    if not prompt:
        raise RequestError("The prompt is empty; write a few words for the model to continue.")
    if len(prompt) >= context:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens and the context holds {context}; shorten the prompt so that "
            "at least one new token fits."
        )
    if not all(0 <= i < vocab_size for i in prompt):
        raise RequestError(f"A prompt token id is outside the vocabulary of {vocab_size}.")


@dataclass(frozen=True)
class Generate:
    """Rows that share a prompt: prefilled once, then forked. Each has an id of its own, given by the client. Where the
    cache of row `parent` still begins with the prompt, they branch off from there. Rows wait in fair turns by
    `visitor`."""

    rows: tuple[int, ...]
    requests: tuple[Request, ...]
    parent: int = -1
    visitor: str = ""
    form: str = ""  # of the weights, fp8 or bf16; "": as loaded


@dataclass(frozen=True)
class Watch:
    """From now on tokens of these rows bring the activation scales of another projection."""

    rows: tuple[int, ...]
    projection: str


@dataclass(frozen=True)
class Cancel:
    """Ends a request, whatever its kind, before the next step."""

    id: int


@dataclass(frozen=True)
class Logits:
    """What may follow a prompt: answered by the raw logits of the whole vocabulary, `[V]` float32."""

    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What settings make of a prompt's `logits [V]`: answered by probabilities `[V]` float64, 0 where a filter cut. A
    repetition penalty looks at the prompt."""

    logits: np.ndarray
    params: SamplingParams
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draws:
    """So many draws by every sampler from a prompt's `logits [V]`: answered, again and again, by `Counts` so far, of
    the tokens `shown` and of all others together."""

    logits: np.ndarray
    params: SamplingParams
    draws: int
    shown: tuple[int, ...]
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Noise:
    """The Gumbel noise of the tokens 0 to `count` at an address: answered by `[count]` float64."""

    seed: int
    position: int
    count: int


@dataclass(frozen=True)
class Score:
    """How likely a text is: answered by the raw log-probability of every token behind the first, float64."""

    ids: tuple[int, ...]
    form: str = ""


@dataclass(frozen=True)
class Curve:
    """Time per token as the text grows, with the cache and without: answered point by point, by `CurvePoint`."""

    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Weights:
    """A layer's quantised projections, and of one of them the tile scales: answered by `WeightScales`."""

    layer: int
    projection: str = ""  # "": the layer's first
    form: str = ""


@dataclass(frozen=True)
class Scales:
    """The activation scales of a projection for the token at `index` of what a row wrote, from what is kept of recent
    runs, or, given the token ids up to there (`ids`), by feeding them again: answered by `TokenScales`."""

    row: int
    index: int
    projection: str
    ids: tuple[int, ...] = ()
    form: str = ""


@dataclass(frozen=True)
class Load:
    """The current model's weights in another form as well: answered by `Progress`, then by `ModelInfo`."""

    form: str


@dataclass(frozen=True)
class Switch:
    """Another model of the list in place of the current one: answered by `Progress`, then by `ModelInfo`."""

    name: str


@dataclass(frozen=True)
class Check:
    """Whether kernels and engine compute what they should: answered by a sentence for each fault, none if all is
    right."""


@dataclass(frozen=True)
class Ask:
    """A request on its way: `id` of the client, for a `Generate` that of its first row; `model`: the `ModelInfo.key` of
    the model that is meant, "" for whichever is loaded."""

    id: int
    what: Generate | Job
    model: str = ""


@dataclass(frozen=True)
class Options:
    """What an engine is started with: models by folder or Hub id, none of them for the embedded one, of which
    `current` is loaded first; the rest as `playground.load` takes it. `serial` counts what was loaded before."""

    models: tuple[str, ...] = ()
    current: str = ""
    device: str = "auto"
    dtype: str = "auto"
    context: int | None = None
    cache_dtype: str = "plain"
    serial: int = 0


Job = Logits | Shape | Draws | Noise | Score | Curve | Weights | Scales | Load | Switch | Check
