"""`load(...)`: a model folder becomes a running playground that writes, compares and explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from playground.checkpoint.chat import ChatTemplate, Message
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.bar import Bar
from playground.engine.client import Answers, Client, Stream, ThreadClient
from playground.engine.events import EngineState, ModelInfo, TokenEvent
from playground.engine.requests import Job, Load, Options, Request, check_prompt
from playground.engine.settings import RequestError, SamplingParams

FORMS = ("fp8", "bf16")


class Playground:
    """A model, and the client that speaks to its engine. Close it, or use it as a context manager, to end the engine.

    Plain data and text live here; weights, cache and rows live where the engine does, which may be another process.
    """

    def __init__(self, client: Client, info: ModelInfo, form: str = ""):
        self.client, self.info, self.form = client, info, form or info.form
        self.tokenizer = Tokenizer(Path(info.folder), info.vocab_size)
        self.template = ChatTemplate.read(Path(info.folder), self.tokenizer)

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def folder(self) -> Path:
        return Path(self.info.folder)

    @property
    def context(self) -> int:
        """Tokens of a row at most, its prompt included."""
        return self.info.context

    @property
    def default_tokens(self) -> int:
        return min(256, self.context)

    @property
    def loaded_forms(self) -> tuple[str, ...]:
        """Forms of the weights that `in_form` has at hand."""
        current = self.client.info
        return current.forms if current and current.key == self.info.key else self.info.forms

    def stream(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        **options,
    ) -> Stream:
        """Starts one row and returns its stream of `TokenEvent`s, ended by a `FinishEvent`.

        `options` are `parse_special` (see `encode`) and those of `Request`: `stop`, `ignore_eos`, `trace_scales`.
        Raises `RequestError`.
        """
        return self.compare(prompt, [params or self.params()], max_new_tokens, **options)[0]

    def compare(
        self,
        prompt: str,
        params: Sequence[SamplingParams],
        max_new_tokens: int | None = None,
        forms: Sequence[str] | None = None,
        parse_special: bool = False,
        **options,
    ) -> list[Stream]:
        """Starts one row per setting: the prompt is prefilled once, the rows stream together as one batch. `forms` name
        the weights that each runs on (see `in_form`; "": those that are loaded): one batch and one prefill for each."""
        return self.fork(self.encode(prompt, parse_special), params, max_new_tokens, forms, **options)

    def fork(
        self,
        ids: Sequence[int],
        params: Sequence[SamplingParams],
        max_new_tokens: int | None = None,
        forms: Sequence[str] | None = None,
        **options,
    ) -> list[Stream]:
        """As `compare`, of a prompt's token ids."""
        forms = [form or self.form for form in forms or [""] * len(params)]
        if len(forms) != len(params):
            raise RequestError(
                f"There are {len(params)} settings and {len(forms)} forms of weights; name one for each."
            )
        writers = {form: self.in_form(form) for form in dict.fromkeys(forms)}
        streams: dict[int, Stream] = {}
        try:
            for form, writer in writers.items():
                places = [place for place, one in enumerate(forms) if one == form]
                started = writer.resume(ids, [params[place] for place in places], max_new_tokens, **options)
                streams.update(zip(places, started, strict=True))
        except RequestError:  # all of them, or none
            for stream in streams.values():
                stream.close()
            raise
        return [streams[place] for place in range(len(forms))]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        thinking: bool = True,
        **options,
    ) -> Stream:
        """Starts the assistant's next turn. `messages`: `{"role": "system" | "user" | "assistant", "content": text}`
        in order; `thinking` only matters where `knows_thinking`. Raises `RequestError`, also where the checkpoint has
        no chat template."""
        ids = self.encode_chat(messages, thinking)
        return self.resume(ids, [params or self.params()], max_new_tokens, begun=0, **options)[0]

    def resume(
        self,
        ids: Sequence[int],
        params: Sequence[SamplingParams],
        max_new_tokens: int | None = None,
        parent: Stream | None = None,
        visitor: str = "",
        begun: int | None = None,
        **options,
    ) -> list[Stream]:
        """Starts one row per setting on token ids, whose text goes on that of the last `begun` of them, by default of
        all. Where the cache of `parent`, which was asked to `keep` it, still holds all but the last of them, the rows
        go on from there with the parent's own bits."""
        limit = self.default_tokens if max_new_tokens is None else max_new_tokens
        options["begun"] = len(ids) if begun is None else begun
        requests = [Request(tuple(map(int, ids)), p.with_drawn_seed(), limit, **options) for p in params]
        for request in requests:
            request.check_lengths(self.context, self.info.vocab_size)
        return self.client.generate(requests, self.info.key, self.form, parent, visitor)

    def ask(self, job: Job) -> Answers:
        """What else the engine can be asked: see `engine/requests.py`. Raises `EngineError`."""
        return self.client.ask(job, self.info.key)

    def in_form(self, form: str) -> Playground:
        """The same checkpoint with its projections `fp8` or `bf16`: this playground, or one beside it, whose
        weights are loaded when it is first asked for. Raises `CheckpointError` where both do not fit."""
        if form == self.form:
            return self
        if form not in FORMS:
            raise CheckpointError(f"Unknown dtype {form!r}; choose fp8 or bf16.")
        if form not in self.loaded_forms:
            self.ask(Load(form)).last()
        return self._beside(form)

    def _beside(self, form: str) -> Playground:
        other = object.__new__(Playground)  # the tokenizer is the same
        other.__dict__ |= self.__dict__ | {"form": form}
        return other

    def writer_of(self, stream: Stream) -> Playground:
        """The one of the checkpoint's forms that wrote a stream. Raises `RequestError` where another model did."""
        if stream.model != self.info.key:
            raise RequestError("This run was written by a model that is no longer loaded; run again.")
        return self if stream.form == self.form else self._beside(stream.form)

    def params(self, **settings) -> SamplingParams:
        """Sampling parameters with this checkpoint's own defaults for what is not set."""
        return SamplingParams(**(self.info.defaults | {k: v for k, v in settings.items() if v is not None}))

    def encode(self, prompt: str, parse_special: bool = False) -> tuple[int, ...]:
        """Ids of a prompt. With `parse_special`, control tokens in it, such as `<|im_start|>`, are what they say;
        without, they are text. Raises `RequestError`."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError("The prompt is empty; write a few words for the model to continue.")
        self._check_size(len(prompt))
        try:
            return tuple(self.tokenizer.encode(prompt, parse_special))
        except ValueError as error:
            raise RequestError(f"The prompt is not valid text: {error}; remove it and run again.") from None

    @property
    def knows_thinking(self) -> bool:
        """Whether the chat template can ask for an answer without thinking."""
        return self.template is not None and self.template.knows_thinking

    def encode_chat(self, messages: Sequence[Message], thinking: bool = True) -> tuple[int, ...]:
        """A conversation in the checkpoint's own template, up to where the assistant speaks next."""
        if self.template is None:
            raise RequestError(f"{self.name} is a base model without a chat template; give it a text to continue.")
        texts = [m.get("content") for m in messages if isinstance(m, dict)]
        self._check_size(sum(len(text) for text in texts if isinstance(text, str)))
        try:
            return self.template.encode(messages, thinking)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(f"A message is not valid text: {error}; remove it and send again.") from None

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises `RequestError` for a prompt after which no token fits."""
        check_prompt(tuple(ids), self.context, self.info.vocab_size)

    def _check_size(self, characters: int) -> None:
        if characters > 64 * self.context:  # no token is that long: don't even tokenise it
            raise RequestError(
                f"The prompt has {characters} characters and the context holds {self.context} tokens; shorten it."
            )

    def close(self) -> None:
        """Ends the engine: model and cache are let go of, whoever still holds a stream."""
        self.client.close()

    def __enter__(self) -> Playground:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load(
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    cache_dtype: str = "plain",
    progress: Callable[[int, int], None] | None = None,
) -> Playground:
    """Loads a model onto `auto`, `cuda` or `cpu`: a folder or a Hub id `owner/name[@revision]`; default: the embedded.

    `dtype` is `auto` (FP8; a plain checkpoint is quantised), `fp8` or `bf16` (projections unquantised); `context`
    limits the tokens of a row, and so the KV cache; `cache_dtype` `fp8` keeps that in E4M3, in about half of the room
    (a quarter on a CPU), `plain` unquantised. `progress(done, total)` is told the bytes that have been loaded.
    Raises `CheckpointError`, whose message says what is wrong and what would do.
    """
    from playground.engine.host import Host  # torch, which the page's process does without

    names = (str(model),) if model else ()

    shown = progress or Bar()

    def tell(state: EngineState) -> None:
        if state.total:
            shown(state.done, state.total)

    client = ThreadClient(Host(Options(names, "", device, dtype, context, cache_dtype)), tell)
    return Playground(client, client.until_ready())


def generate(
    playground: Playground,
    prompt_tokens: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """The batch form: continues every prompt and returns the new ids of each, without the EOS that ended it.

    Gumbel-max sampling at `temperature` (0: greedy); row i draws with `seed + i`. Each row stops at `eos_id` (None:
    never), at `max_new_tokens`, or where the batch's table ends, `min(context, max_new_tokens + longest prompt)`
    tokens: what does not fit is cut, and 0 gives nothing. Raises `RequestError` for an empty prompt or one over the
    context, with both numbers.
    """
    longest, context = max(map(len, prompt_tokens), default=0), playground.context
    if longest > context:
        raise RequestError(f"A prompt has {longest} tokens and the context holds {context}; shorten it.")
    if not all(map(len, prompt_tokens)):
        raise RequestError("A prompt is empty; give every row a token to continue.")
    table = min(context, longest + max(max_new_tokens, 0))
    streams: list[Stream | None] = []
    for number, prompt in enumerate(prompt_tokens):
        params, room = SamplingParams("gumbel", temperature, seed=seed + number), table - len(prompt)
        limit = min(max_new_tokens, room)
        streams.append(playground.resume(prompt, [params], limit, ignore_eos=True)[0] if limit > 0 else None)
    return [[] if stream is None else _ids_before(stream, eos_id) for stream in streams]


def _ids_before(stream: Stream, eos_id: int | None) -> list[int]:
    ids: list[int] = []
    with stream:
        for event in stream:
            if isinstance(event, TokenEvent):
                if event.id == eos_id:
                    break
                ids.append(event.id)
    return ids
