"""`load(...)`: a model folder becomes a running playground that writes, compares and explains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import kernels
from playground.checkpoint.chat import ChatTemplate, Message
from playground.checkpoint.config import CheckpointError, ModelConfig, QuantizationConfig
from playground.checkpoint.families import parse_defaults
from playground.checkpoint.files import Checkpoint
from playground.checkpoint.hub import find, local_folder
from playground.checkpoint.memory import Plan, free_bytes, plan
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.client import Service, Stream
from playground.engine.engine import Engine
from playground.engine.requests import Request, RequestError, SamplingParams
from playground.inspect.receipt import fingerprint
from playground.model.loading import check_headers
from playground.model.transformer import Transformer

EMBEDDED = Path(__file__).parent / "assets" / "storyteller"
MAX_ROWS = kernels.INVARIANT_ROWS
Progress = Callable[[int, int], None]


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA card where there is one. Raises `CheckpointError` for cuda without a card."""
    if name not in ("auto", "cuda", "cpu"):
        raise CheckpointError(f"Unknown device {name!r}; choose auto, cuda or cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("No CUDA card can be used here; choose --device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_form(config: ModelConfig, form: str) -> ModelConfig:
    """The config with its projections in the form asked for: `auto` and `fp8` run FP8, quantising a plain checkpoint
    as it is loaded; `bf16` keeps projections plain, restoring an FP8 checkpoint."""
    if form not in ("auto", "fp8", "bf16"):
        raise CheckpointError(f"Unknown dtype {form!r}; choose auto, fp8 or bf16.")
    return replace(config, quantization=None if form == "bf16" else config.quantization or QuantizationConfig())


def choose_cache(form: str, dtype: torch.dtype) -> torch.dtype:
    """Of the KV cache of a model with this `dtype`: `plain` the same, `fp8` E4M3 with a scale for each vector."""
    if form not in ("plain", "fp8"):
        raise CheckpointError(f"Unknown cache dtype {form!r}; choose plain or fp8.")
    return torch.float8_e4m3fn if form == "fp8" else dtype


def plain_dtype(device: torch.device) -> torch.dtype:
    """Of everything that is not FP8: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(
    folder: Path | Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    form: str = "auto",
    context: int | None = None,
    cache_dtype: str = "plain",
    progress: Progress | None = None,
) -> tuple[Transformer, Plan]:
    """Reads a whole checkpoint, having made sure first that it is one and that it fits."""
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    dtype = dtype or plain_dtype(device)
    config = choose_form(checkpoint.config, form)
    model = Transformer(config)
    check_headers(model, checkpoint.headers)
    room = plan(model, device, dtype, MAX_ROWS, context, free_bytes(device), choose_cache(cache_dtype, dtype))
    model.config = replace(config, max_position_embeddings=room.context)
    return model.load(reported(checkpoint.tensors(device), checkpoint.bytes, progress), device, dtype), room


def reported(tensors: Iterator, total: int, progress: Progress | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes tensors on; tells `progress` how many bytes of `total` have come; a bar shows where it takes long."""
    done = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=1, leave=False) as bar:
        for name, tensor in tensors:
            yield name, tensor
            done += tensor.nbytes
            bar.update(tensor.nbytes)
            if progress:
                progress(done, total)


class Playground:
    """A loaded model and its engine. Close it, or use it as a context manager, to end the engine's thread."""

    def __init__(self, name: str, checkpoint: Checkpoint, model: Transformer, tokenizer: Tokenizer, room: Plan):
        self.name, self.folder, self.device = name, checkpoint.folder, model.device
        self.defaults = parse_defaults(checkpoint.generation)
        self.template = ChatTemplate.read(checkpoint.folder, tokenizer)
        self.model, self.tokenizer, self.config, self.context = model, tokenizer, model.config, room.context
        self.form = "fp8" if model.config.quantization else "bf16"
        self.cache_form = "plain" if room.cache_dtype == model.dtype else "fp8"
        engine = Engine(model, tokenizer, MAX_ROWS, room.cache_tokens, room.context, cache_dtype=room.cache_dtype)
        self.service = Service(engine)
        self._other: Playground | None = None
        self._loading = threading.Lock()

    @property
    def path(self) -> str:
        """In words, what computes: which depends on whether this device has FP8 units."""
        if self.device.type == "cpu":
            return "torch twins on the CPU"
        if kernels.has_fp8_units(self.device):
            return "Triton kernels on the GPU's FP8 units"
        return "Triton kernels that decode FP8 themselves, as this GPU has no FP8 units"

    @property
    def fingerprint(self) -> str:
        """What tells this checkpoint from others: see `inspect.receipt.fingerprint`."""
        return fingerprint(self.folder)

    def stream(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        **options,
    ) -> Stream:
        """Starts one row and returns its stream of `TokenEvent`s, ended by a `FinishEvent`.

        `options` are those of `Request`: `stop`, `ignore_eos`, `trace_scales`. Raises `RequestError`.
        """
        return self.compare(prompt, [params or self.params()], max_new_tokens, **options)[0]

    def compare(
        self,
        prompt: str,
        params: Sequence[SamplingParams],
        max_new_tokens: int | None = None,
        forms: Sequence[str] | None = None,
        **options,
    ) -> list[Stream]:
        """Starts one row per setting: the prompt is prefilled once, the rows stream together as one batch. `forms` name
        the weights that each runs on (see `in_form`; "": those that are loaded): one batch and one prefill for each."""
        ids, forms = self.encode(prompt), [form or self.form for form in forms or [""] * len(params)]
        writers = {form: self.in_form(form) for form in dict.fromkeys(forms)}
        streams: dict[int, Stream] = {}
        try:
            for form, writer in writers.items():
                places = [place for place, one in enumerate(forms) if one == form]
                started = writer._start(ids, [params[place] for place in places], max_new_tokens, options)
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
        **options,
    ) -> Stream:
        """Starts the assistant's next turn. `messages`: `{"role": "system" | "user" | "assistant", "content": text}`
        in order. Raises `RequestError`, also where the checkpoint has no chat template."""
        if self.template is None:
            raise RequestError(f"{self.name} is a base model without a chat template; give it a text to continue.")
        self._check_size(sum(len(m["content"]) for m in messages if isinstance(m.get("content"), str)))
        try:
            ids = self.template.encode(messages)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(f"A message is not valid text: {error}; remove it and send again.") from None
        return self._start(ids, [params or self.params()], max_new_tokens, options)[0]

    def resume(
        self,
        ids: Sequence[int],
        params: Sequence[SamplingParams],
        max_new_tokens: int | None = None,
        parent: Stream | None = None,
        **options,
    ) -> list[Stream]:
        """Starts one row per setting on token ids. Where the cache of `parent`, which was asked to `keep` it, still
        holds all but the last of them, the rows go on from there with the parent's own bits."""
        return self._start(tuple(ids), params, max_new_tokens, options, parent)

    def in_form(self, form: str) -> Playground:
        """The same checkpoint with its projections `fp8` or `bf16`: this playground, or a second one, loaded when it is
        first asked for and closed with this one. Raises `CheckpointError` where both do not fit."""
        if form == self.form:
            return self
        with self._loading:
            if self.model is None:
                raise RequestError("This model is no longer loaded; run again.")
            if self._other is None:
                try:
                    self._other = load(self.folder, self.device.type, form, self.context, self.cache_form)
                except CheckpointError as error:
                    raise CheckpointError(f"FP8 and BF16 weights can't be loaded side by side: {error}") from None
                self._other.name = self.name
            return self._other

    @property
    def loaded_forms(self) -> set[str]:
        """Forms of the weights that `in_form` has at hand."""
        return {one.form for one in (self, self._other) if one}

    def writer_of(self, stream: Stream) -> Playground:
        """The one of the checkpoint's forms that wrote a stream. Raises `RequestError` where another model did."""
        for one in (self, self._other):
            if one and one.service is stream.service:
                return one
        raise RequestError("This run was written by a model that is no longer loaded; run again.")

    def params(self, **settings) -> SamplingParams:
        """Sampling parameters with this checkpoint's own defaults for what is not set."""
        defaults = {k: v for k, v in asdict(self.defaults).items() if k != "source"}
        return SamplingParams(**(defaults | {k: v for k, v in settings.items() if v is not None}))

    def _start(self, ids: tuple[int, ...], params, max_new_tokens, options: dict, parent=None) -> list[Stream]:
        max_new_tokens = self.default_tokens if max_new_tokens is None else max_new_tokens
        requests = [Request(ids, p.with_drawn_seed(), max_new_tokens, **options) for p in params]
        return self.service.submit(requests, parent)

    @property
    def default_tokens(self) -> int:
        return min(256, self.context)

    def encode(self, prompt: str) -> tuple[int, ...]:
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError("The prompt is empty; write a few words for the model to continue.")
        self._check_size(len(prompt))
        try:
            return tuple(self.tokenizer.encode(prompt))
        except ValueError as error:
            raise RequestError(f"The prompt is not valid text: {error}; remove it and run again.") from None

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises `RequestError` for a prompt after which no token fits."""
        Request(tuple(ids), SamplingParams(), 1).check_lengths(self.context, self.config.vocab_size)

    def _check_size(self, characters: int) -> None:
        if characters > 64 * self.context:  # no token is that long: don't even tokenise it
            raise RequestError(
                f"The prompt has {characters} characters and the context holds {self.context} tokens; shorten it."
            )

    def close(self) -> None:
        """Ends the engine's thread and lets go of model and cache, whoever still holds a stream."""
        self.service.close()
        self.service.engine.release()
        with self._loading:
            self.model = None
            if self._other:
                self._other.close()

    def __enter__(self) -> Playground:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check(model: str, dtype: str = "auto") -> None:
    """Whether a folder or Hub id (downloaded if need be) holds a checkpoint that we run, without loading a weight.
    Raises `CheckpointError`."""
    checkpoint = Checkpoint(find(model))
    ChatTemplate.read(checkpoint.folder, Tokenizer(checkpoint.folder, checkpoint.config.vocab_size))
    check_headers(Transformer(choose_form(checkpoint.config, dtype)), checkpoint.headers)


def load(
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    cache_dtype: str = "plain",
    progress: Progress | None = None,
) -> Playground:
    """Loads a model onto `auto`, `cuda` or `cpu`: a folder or a Hub id `owner/name[@revision]`; default: the embedded.

    `dtype` is `auto` (FP8; a plain checkpoint is quantised), `fp8` or `bf16` (projections unquantised); `context`
    limits the tokens of a row, and so the KV cache; `cache_dtype` `fp8` keeps that in E4M3, in about half of the room
    (a quarter on a CPU), `plain` unquantised. `progress(done, total)` is told the bytes that have been loaded.
    Raises `CheckpointError`, whose message says what is wrong and what would do.
    """
    chosen = choose_device(device)
    folder = find(str(model)) if model else EMBEDDED
    name = str(model) if model and local_folder(str(model)) is None else folder.name
    checkpoint = Checkpoint(folder)
    tokenizer = Tokenizer(folder, checkpoint.config.vocab_size)
    try:
        transformer, room = load_model(checkpoint, chosen, None, dtype, context, cache_dtype, progress)
        return Playground(name, checkpoint, transformer, tokenizer, room)
    except torch.OutOfMemoryError as error:
        raise CheckpointError(f"{name} does not fit on the card after all: {error}; try a smaller --context.") from None
