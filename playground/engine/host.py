"""The engine as pages and programs see it: requests in, events out, plain data both ways. It holds the models and their
forms, runs steps and slices of jobs in turn, and keeps a fault where it belongs.

Passive, like the engine: `receive` takes a message, `step` does a little of everything that is due.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import kernels
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.hub import EMBEDDED, find, local_folder
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.engine import DeviceFault, Engine, in_a_sentence
from playground.engine.events import Done, EngineState, Failure, ModelInfo, Progress
from playground.engine.jobs import projections, slices
from playground.engine.loading import MAX_ROWS, Loading, check, choose_device
from playground.engine.requests import Ask, Cancel, Generate, Job, Load, Options, Switch, Watch
from playground.engine.row import Row
from playground.engine.runner import is_fatal
from playground.engine.settings import RequestError, suggested_by

if TYPE_CHECKING:
    from kernels.compiling import Compilers

GONE = "This run was written by a model that is no longer loaded; run again."
STATE = -1  # the id under which the engine tells of itself
Told = list[tuple[int, Any]]


class Running(NamedTuple):
    """A job under way."""

    id: int
    work: Iterator[Any]
    stoppable: bool = True  # not where others would be left without a model


class Host:
    def __init__(self, options: Options, compilers: Compilers | None = None):
        """`compilers`: kernels are compiled and steps recorded before the engine says that it is ready."""
        self.options, self.device = options, choose_device(options.device)
        self.compilers = compilers if self.device.type == "cuda" else None
        self.engines: dict[str, Engine] = {}  # by the form of the weights
        self.rows: dict[int, tuple[Engine, Row]] = {}  # that have not ended
        self.jobs: deque[Running] = deque()
        self.changing = False  # another model or form is being loaded
        self.early: list[Ask] = []  # what came before the model was there
        self.info: ModelInfo | None = None
        self.serial = options.serial
        self.folder: Path | None = None
        self.state = EngineState("loading")
        self.out: Told = []
        self.idle: Iterator[Any] | None = None  # work for when there is nothing else to do
        self.loading: Iterator[Any] | None = self._start(options.current or (options.models or ("",))[0])

    @property
    def busy(self) -> bool:
        return bool(self.loading or self.idle or self._due)

    @property
    def _due(self) -> bool:
        """Whether somebody waits."""
        return bool(self.jobs or self.out or any(engine.busy for engine in self.engines.values()))

    def receive(self, message: Ask | Cancel | Watch) -> None:
        match message:
            case Cancel():
                self._cancel(message.id)
            case Watch():
                for number in message.rows:
                    if number in self.rows:
                        self.rows[number][1].watch = message.projection
            case Ask() if self.loading or not self.engines:
                self.early.append(message)
            case Ask():
                self._begin(message)

    def step(self) -> Told:
        """A little of everything that is due. Raises `DeviceFault`, and whatever stops the first model from loading."""
        with torch.inference_mode():
            if self.loading:
                self._load()
            for engine in list(self.engines.values()):
                if engine.busy:
                    self._step(engine)
            if self.jobs:
                self._slice(self.jobs.popleft())
            if self.idle and not self.loading and not self._due:
                self._use_idle_time()
        told, self.out = self.out, []
        return told

    def _use_idle_time(self) -> None:
        try:
            next(self.idle)
        except StopIteration:
            self.idle = None
        except Exception as error:  # what could not be prepared is made when it is needed, or fails then
            if is_fatal(error):
                raise
            self.idle = None

    def close(self) -> None:
        """Lets go of models and caches."""
        for engine in self.engines.values():
            engine.release()
        self.engines.clear()
        self.rows.clear()
        self.jobs.clear()
        self.loading = None
        _collect()

    # --- rows

    def _begin(self, ask: Ask) -> None:
        try:
            if ask.model and ask.model != self.info.key:
                raise RequestError(GONE)
            if isinstance(ask.what, Generate):
                self._add(ask.what)
            else:
                self.jobs.append(Running(ask.id, self._work(ask.what), not isinstance(ask.what, Switch)))
        except (RequestError, CheckpointError) as error:
            ids = ask.what.rows if isinstance(ask.what, Generate) else (ask.id,)
            self.out += [(number, failure_of(error)) for number in ids]

    def _add(self, asked: Generate) -> None:
        engine = self._engine(asked.form)
        requests, parent = list(asked.requests), self._row(engine, asked.parent)
        for row in engine.add(requests, parent, asked.visitor, asked.rows):
            self.rows[row.id] = engine, row

    def _row(self, engine: Engine, number: int) -> Row | None:
        """A row that runs, or whose cache is kept."""
        if number in self.rows and self.rows[number][0] is engine:
            return self.rows[number][1]
        return next((one for one in engine.scheduler.kept.held if getattr(one, "id", None) == number), None)

    def _engine(self, form: str) -> Engine:
        if (form or self.info.form) not in self.engines:
            raise RequestError(f"The {form} weights are not loaded.")
        return self.engines[form or self.info.form]

    def _cancel(self, number: int) -> None:
        self.early = [ask for ask in self.early if ask.id != number]
        if number in self.rows:
            engine, row = self.rows[number]
            self._tell(engine.cancel(row))
        for job in [job for job in self.jobs if job.id == number and job.stoppable]:
            self.jobs.remove(job)
            job.work.close()
            self.out.append((number, Failure("This was stopped.", "request")))

    def _step(self, engine: Engine) -> None:
        try:
            self._tell(engine.step())
        except DeviceFault:
            raise
        except Exception as error:  # a fault of ours: nobody knows whose row is to blame, so all of them are told
            for _, row in [pair for pair in self.rows.values() if pair[0] is engine]:
                self._tell(engine.fail(row, error))

    def _tell(self, told: list[tuple[Row, Any]]) -> None:
        for row, event in told:
            if row.finished:
                self.rows.pop(row.id, None)
            self.out.append((row.id, event))

    # --- jobs

    def _work(self, job: Job) -> Iterator[Any]:
        match job:
            case Load():
                return self._alone(self._second(job.form))
            case Switch():
                return self._alone(self._switch(job.name))
            case _:
                return slices(self._engine(getattr(job, "form", "")), job)

    def _alone(self, work: Iterator[Any]) -> Iterator[Any]:
        """Work on the models themselves, one after another."""
        while self.changing:
            yield None
        self.changing = True
        try:
            yield from work
        finally:
            self.changing = False

    def _slice(self, job: Running) -> None:
        try:
            answer = next(job.work)
        except StopIteration:
            self.out.append((job.id, Done()))
            return
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self.out.append((job.id, failure_of(error)))
            return
        if answer is not None:
            self.out.append((job.id, answer))
        self.jobs.append(job)

    # --- models

    def _tell_state(self, state: EngineState) -> None:
        self.state = state
        self.out.append((STATE, state))

    def _load(self) -> None:
        for told in self.loading:
            self._tell_state(told)
            return
        self.loading = None
        self._begin_early()

    def _begin_early(self) -> None:
        """What came while no model was there."""
        early, self.early = self.early, []
        for ask in early:
            self._begin(ask)

    def _start(self, name: str) -> Iterator[EngineState]:
        """Loads the first model."""
        for told in self._open(name, self.options.dtype):
            if isinstance(told, ModelInfo):
                yield EngineState("loading", info=told)
            else:
                yield EngineState("loading", told.done, told.total, info=self.info)
        yield from self._prepared()

    def _prepared(self, form: str = "") -> Iterator[EngineState]:
        """A card gets ready for the first run; what later ones need follows when there is nothing else to do."""
        if self.compilers:
            from playground.engine.prepare import prepare_first, prepare_later

            runner = self.engines[form or self.info.form].runner
            try:
                for told in prepare_first(runner, self.compilers):
                    yield EngineState("preparing", told.done, told.total, info=self.info)
                self.idle = prepare_later(runner, self.compilers) if not form else self.idle
            except Exception as error:  # then the first run makes what it needs
                if is_fatal(error):
                    raise
                print(f"Kernels could not be prepared: {in_a_sentence(error)}", file=sys.stderr, flush=True)
        yield EngineState("ready", info=self.info)

    def _open(self, name: str, dtype: str) -> Iterator[ModelInfo | Progress]:
        """Makes a model the current one: tells what it is, then how much of it is there. Raises `CheckpointError`."""
        folder = find(name) if name else EMBEDDED
        shown = name if name and local_folder(name) is None else folder.name
        loading = Loading.of(folder, self.device, None, dtype, self.options.context, self.options.cache_dtype)
        self.serial += 1
        self.folder = folder
        self.info = info_of(f"{self.serial}:{name}", shown, loading, folder)
        yield self.info
        yield from self._read(loading)

    def _read(self, loading: Loading) -> Generator[Progress, None, None]:
        """Reads weights, and makes an engine of them."""
        try:
            model = yield from loading.read()
            tokenizer, room = Tokenizer(loading.checkpoint.folder, model.config.vocab_size), loading.room
            form = "fp8" if model.config.quantization else "bf16"
            self.engines[form] = Engine(
                model, tokenizer, MAX_ROWS, room.cache_tokens, room.context, cache_dtype=room.cache_dtype
            )
        except torch.OutOfMemoryError as error:
            raise CheckpointError(f"It does not fit on the card after all: {error}; try a smaller --context.") from None

    def _second(self, form: str) -> Iterator[Progress | ModelInfo | None]:
        """The current model's weights in another form, beside those that are there."""
        if form not in self.engines:
            cache = self.info.cache_form
            try:
                loading = Loading.of(self.folder, self.device, None, form, self.info.context, cache)
                yield from self._read(loading)
            except CheckpointError as error:
                raise CheckpointError(f"FP8 and BF16 weights can't be loaded side by side: {error}") from None
            for _ in self._prepared(form):
                yield None
        self.info = replace(self.info, forms=tuple(self.engines))
        self._tell_state(EngineState("ready", info=self.info))
        yield self.info

    def _switch(self, name: str) -> Iterator[Progress | ModelInfo | None]:
        """Another model of the list: the old one is released first, so that both need not fit. What can be told without
        loading (another name, a damaged folder) is told before the old one is touched; after a failure the old one
        comes back. Raises `CheckpointError`."""
        names = self.options.models or ("",)
        if name not in names:
            raise CheckpointError(f"{name!r} is not one of the models of this page: {', '.join(names)}.")
        current = self.info.key.partition(":")[2]
        if name != current:
            yield from self._checked(name)
            self._release()
            try:
                yield from self._opened(name)
            except Exception as error:  # whatever stops a load, the old model must come back
                failure = str(error) or type(error).__name__
            else:
                failure = ""
            if failure:  # outside of `except`, whose traceback would hold on to what was half loaded
                self._release()
                yield from self._opened(current)
                raise CheckpointError(f"{name} could not be loaded, {current} is back: {failure}")
        yield self.info

    def _checked(self, name: str) -> Iterator[None]:
        """Whether a model can be loaded, looked up on a thread of its own: it may have to be downloaded first."""
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(lambda: check(find(name) if name else EMBEDDED, self.options.dtype))
            while not looking.done():
                yield None
            looking.result()

    def _opened(self, name: str) -> Iterator[Progress | None]:
        for told in self._open(name, self.options.dtype):
            if isinstance(told, Progress):
                self._tell_state(EngineState("loading", told.done, told.total, info=self.info))
                yield told
        for state in self._prepared():
            self._tell_state(state)
            yield None
        self._begin_early()

    def _release(self) -> None:
        """Ends what runs on the current model, and lets go of it."""
        self.idle = None
        for engine, row in list(self.rows.values()):
            self._tell(engine.cancel(row, keep=False))
        for engine in self.engines.values():
            engine.release()
        self.engines.clear()
        _collect()


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


def failure_of(error: BaseException) -> Failure:
    if isinstance(error, RequestError):
        return Failure(str(error), "request")
    if isinstance(error, CheckpointError):
        return Failure(str(error), "checkpoint")
    return Failure(in_a_sentence(error))


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
