"""The models of a host: which one is current, in which forms its weights are at hand, and how another takes its place.
Everything that takes long is a generator, cut into slices; one change at a time."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kernels
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.families import weight_count
from playground.checkpoint.hub import EMBEDDED, find, local_folder
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.engine import DeviceFault, Engine, in_a_sentence
from playground.engine.events import EngineState, ModelInfo, Progress
from playground.engine.jobs import projections
from playground.engine.loading import MAX_ROWS, Loading, check, choose_device
from playground.engine.requests import Options
from playground.engine.runner import is_fatal
from playground.engine.settings import suggested_by

if TYPE_CHECKING:
    from kernels.compiling import Compilers

FORMS = ("fp8", "bf16")


class Models:
    """`tell` hears every state; `release` ends what runs on the engines, before they go."""

    def __init__(
        self,
        options: Options,
        compilers: Compilers | None,
        tell: Callable[[EngineState], object],
        release: Callable[[], object],
    ):
        self.options, self.device, self.tell, self.release = options, choose_device(options.device), tell, release
        self.compilers = compilers if self.device.type == "cuda" else None
        self.engines: dict[str, Engine] = {}  # by the form of the weights
        self.info: ModelInfo | None = None
        self.folder: Path | None = None
        self.serial = options.serial
        self.changing = False  # another model or form is being loaded
        self.idle: Iterator[Any] | None = None  # work for when there is nothing else to do

    @property
    def names(self) -> tuple[str, ...]:
        return self.options.models or ("",)

    def start(self) -> Iterator[None]:
        """Loads the first model. Raises `CheckpointError`."""
        yield from self._opened(self.options.current or self.names[0])

    def second(self, form: str) -> Iterator[Progress | ModelInfo | None]:
        """The current model's weights in another form, beside those that are there. Raises `CheckpointError`."""
        return self._alone(self._second(form))

    def switch(self, name: str) -> Iterator[Progress | ModelInfo | None]:
        """Another model of the list: the old one is released first, so that both need not fit. What can be told without
        loading (another name, a damaged folder) is told before the old one is touched; after a failure the old one
        comes back. Raises `CheckpointError`."""
        return self._alone(self._switch(name))

    def use_idle_time(self) -> None:
        try:
            next(self.idle)
        except StopIteration:
            self.idle = None
        except Exception as error:  # what could not be prepared is made when it is needed, or fails then
            if is_fatal(error):
                raise
            self.idle = None
        if self.idle is None and self.compilers:
            self.compilers.close()

    def close(self) -> None:
        self.idle = None
        for engine in self.engines.values():
            engine.release()
        self.engines.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _alone(self, work: Iterator[Any]) -> Iterator[Any]:
        while self.changing:
            yield None
        self.changing = True
        try:
            yield from work
        finally:
            self.changing = False

    def _second(self, form: str) -> Iterator[Progress | ModelInfo | None]:
        if form not in FORMS:
            raise CheckpointError(f"Unknown dtype {form!r}; choose fp8 or bf16.")
        if form not in self.engines:
            cache = self.info.cache_form
            try:
                loading = Loading.of(self.folder, self.device, None, form, self.info.context, cache)
                yield from self._read(loading)
            except CheckpointError as error:
                raise CheckpointError(f"FP8 and BF16 weights can't be loaded side by side: {error}") from None
            yield from self._prepared(form)
        self.info = replace(self.info, forms=tuple(self.engines))
        self.tell(EngineState("ready", info=self.info))
        yield self.info

    def _switch(self, name: str) -> Iterator[Progress | ModelInfo | None]:
        if name not in self.names:
            raise CheckpointError(f"{name!r} is not one of the models of this page: {', '.join(self.names)}.")
        current = self.info.key.partition(":")[2]
        if name != current:
            yield from self._checked(name)
            self._let_go()
            try:
                yield from self._opened(name)
            except Exception as error:  # whatever stops a load, the old model must come back
                failure = str(error) or type(error).__name__
            else:
                failure = ""
            if failure:  # outside of `except`, whose traceback would hold on to what was half loaded
                self._let_go()
                yield from self._back(current)
                raise CheckpointError(f"{name} could not be loaded, {current} is back: {failure}")
        yield self.info

    def _checked(self, name: str) -> Iterator[None]:
        """Whether a model can be loaded, looked up on a thread of its own: it may have to be downloaded first."""
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(lambda: check(folder_of(name), self.options.dtype))
            while not looking.done():
                writing = any(engine.busy for engine in self.engines.values())
                wait([looking], 0 if writing else 0.01)
                yield None
            looking.result()

    def _back(self, name: str) -> Iterator[Progress | None]:
        """The model that was there before. Where not even that can be loaded, only a new start can help."""
        try:
            yield from self._opened(name)
        except Exception as error:
            raise DeviceFault(f"{name or 'the embedded model'} could not be loaded again: {error}") from error

    def _let_go(self) -> None:
        self.release()
        self.close()

    def _opened(self, name: str) -> Iterator[Progress | None]:
        """Makes a model the current one: tells what it is, then how much of it is there. Raises `CheckpointError`."""
        folder = folder_of(name)
        shown = name if name and local_folder(name) is None else folder.name
        loading = Loading.of(
            folder, self.device, None, self.options.dtype, self.options.context, self.options.cache_dtype
        )
        self.serial, self.folder = self.serial + 1, folder
        self.info = info_of(f"{self.serial}:{name}", shown, loading, folder)
        self.tell(EngineState("loading", info=self.info))
        yield None
        shown = 0.0
        for progress in self._read(loading):
            if progress.done == progress.total or time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                self.tell(EngineState("loading", progress.done, progress.total, info=self.info))
                yield progress
            else:
                yield None
        yield from self._prepared()
        self.tell(EngineState("ready", info=self.info))

    def _read(self, loading: Loading) -> Generator[Progress, None, None]:
        """Reads weights, and makes an engine of them."""
        try:
            model = yield from loading.read()
            tokenizer, room = Tokenizer(loading.checkpoint.folder, model.config.vocab_size), loading.room
            ends = dict.fromkeys(
                model.config.eos_token_ids + tokenizer.eos
            )  # some files name an end of turn only there
            model.config = replace(model.config, eos_token_ids=tuple(ends))
            form = "fp8" if model.config.quantization else "bf16"
            self.engines[form] = Engine(
                model, tokenizer, MAX_ROWS, room.cache_tokens, room.context, cache_dtype=room.cache_dtype
            )
        except torch.OutOfMemoryError as error:
            raise CheckpointError(f"It does not fit on the card after all: {error}; try a smaller --context.") from None

    def _prepared(self, form: str = "") -> Iterator[None]:
        """A card gets ready for the first run; what later ones need follows when there is nothing else to do."""
        if not (self.compilers and self.compilers.lines):
            return
        from playground.engine.prepare import prepare_first, prepare_later

        runner = self.engines[form or self.info.form].runner
        try:
            for told in prepare_first(runner, self.compilers):
                self.tell(EngineState("preparing", told.done, told.total, info=self.info))
                yield None
            self.idle = self.idle if form else prepare_later(runner, self.compilers)
        except Exception as error:  # then the first run makes what it needs
            if is_fatal(error):
                raise
            print(f"Kernels could not be prepared: {in_a_sentence(error)}", file=sys.stderr, flush=True)


def folder_of(name: str) -> Path:
    """Of a folder's own name or a Hub id, downloaded if need be; "": the embedded model. Raises `CheckpointError`."""
    return find(name) if name else EMBEDDED


def info_of(key: str, name: str, loading: Loading, folder: Path) -> ModelInfo:
    config, room, device = loading.model.config, loading.room, loading.device
    form = "fp8" if config.quantization else "bf16"
    defaults, suggested = suggested_by(loading.checkpoint.generation)
    return ModelInfo(
        key=key,
        name=name,
        folder=str(folder),
        form=form,
        cache_form="plain" if room.cache_dtype == loading.dtype else "fp8",
        context=room.context,
        layers=config.num_hidden_layers,
        weights=weight_count(config),
        vocab_size=config.vocab_size,
        cache_tokens=room.cache_tokens,
        max_rows=MAX_ROWS,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        path=path_in_words(device),
        projection=next(iter(projections(loading.model, 0)), ""),
        forms=(form,),
        defaults=defaults,
        suggested=suggested,
    )


def path_in_words(device: torch.device) -> str:
    """What computes, which depends on whether the device has FP8 units."""
    if device.type == "cpu":
        return "torch twins on the CPU"
    if kernels.has_fp8_units(device):
        return "Triton kernels on the GPU's FP8 units"
    return "Triton kernels that decode FP8 themselves, as this GPU has no FP8 units"
