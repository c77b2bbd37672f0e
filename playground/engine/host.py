"""The engine as pages and programs see it: requests in, events out, plain data both ways. It holds the models and their
forms, runs steps and slices of jobs in turn, and keeps a fault where it belongs.

Passive, like the engine: `receive` takes a message, `step` does a little of everything that is due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from playground.checkpoint.config import CheckpointError
from playground.engine.engine import DeviceFault, Engine, in_a_sentence
from playground.engine.events import Done, EngineState, Failure, FinishEvent, Stats
from playground.engine.jobs import slices
from playground.engine.models import Models
from playground.engine.requests import Ask, Cancel, Generate, Job, Load, Options, Request, Switch, Watch
from playground.engine.row import Row
from playground.engine.runner import is_fatal
from playground.engine.settings import RequestError

if TYPE_CHECKING:
    from kernels.compiling import Compilers

GONE = "This run was written by a model that is no longer loaded; run again."
STATE = -1  # the id under which the engine tells of itself
Told = list[tuple[int, Any]]


class Running(NamedTuple):
    """A job under way."""

    id: int
    work: Iterator[Any]
    of_models: bool = False  # it changes them; all others read them


class Host:
    def __init__(self, options: Options, compilers: Compilers | None = None):
        """`compilers`: kernels are compiled and steps recorded before the engine says that it is ready."""
        self.models = Models(options, compilers, self._tell_state, self._end_rows)
        self.rows: dict[int, tuple[Engine, Row]] = {}  # that have not ended
        self.jobs: deque[Running] = deque()
        self.early: list[Ask] = []  # what came before the model was there
        self.out: Told = []
        self.loading: Iterator[Any] | None = self.models.start()

    @property
    def engines(self) -> dict[str, Engine]:
        return self.models.engines

    @property
    def busy(self) -> bool:
        return bool(self.loading or self.models.idle or self._due)

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
                self.early = [watching(ask, message) for ask in self.early]
            case Ask() if not self._there:
                self.early.append(message)
            case Ask():
                self._begin(message)

    def step(self) -> Told:
        """A little of everything that is due. Raises `DeviceFault`, and whatever stops the first model from loading."""
        with torch.inference_mode():
            if self.loading and next(self.loading, self) is self:
                self.loading = None
            if self.early and self._there:
                self._begin_early()
            for engine in list(self.engines.values()):
                if engine.busy:
                    self._step(engine)
            if self.jobs:
                self._slice(self.jobs.popleft())
            if self.models.idle and not self.loading and not self._due:
                self.models.use_idle_time()
        told, self.out = self.out, []
        return told

    @property
    def _there(self) -> bool:
        """Whether there is a model. Requests wait for one that is being loaded, but not for a second form of it."""
        return self.loading is None and bool(self.engines)

    def _begin_early(self) -> None:
        """What came while no model was there."""
        early, self.early = self.early, []
        for ask in early:
            self._begin(ask)

    def close(self) -> None:
        """Lets go of models and caches."""
        self.loading = None
        self.rows.clear()
        self.jobs.clear()
        self.models.close()

    def _tell_state(self, state: EngineState) -> None:
        self.out.append((STATE, state))

    # --- rows

    def _begin(self, ask: Ask) -> None:
        try:
            if ask.model and ask.model != self.models.info.key:
                raise RequestError(GONE)
            if isinstance(ask.what, Generate):
                self._add(ask.what)
            else:
                self.jobs.append(Running(ask.id, self._work(ask.what), isinstance(ask.what, Load | Switch)))
        except BaseException as error:  # of its tokenizer, too
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
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
        form = form or self.models.info.form
        if form not in self.engines:
            raise RequestError(f"The {form} weights are not loaded.")
        return self.engines[form]

    def _cancel(self, number: int) -> None:
        self._cancel_early(number)
        if number in self.rows:
            engine, row = self.rows[number]
            self._tell(engine.cancel(row))
        for job in [job for job in self.jobs if job.id == number and not job.of_models]:
            self._end_job(job, "This was stopped.")

    def _end_job(self, job: Running, why: str) -> None:
        self.jobs.remove(job)
        job.work.close()
        self.out.append((job.id, Failure(why, "request")))

    def _cancel_early(self, number: int) -> None:
        """A request that still waits for the model, or one row of it."""
        for place, ask in enumerate(self.early):
            if not isinstance(ask.what, Generate):
                if ask.id == number:
                    self.out.append((number, Failure("This was stopped.", "request")))
                    del self.early[place]
                    return
            elif number in ask.what.rows:
                rows = dict(zip(ask.what.rows, ask.what.requests, strict=True))
                self.out.append((number, never_began(rows.pop(number))))
                left = replace(ask.what, rows=tuple(rows), requests=tuple(rows.values()))
                self.early[place : place + 1] = [replace(ask, what=left)] if rows else []
                return

    def _step(self, engine: Engine) -> None:
        try:
            self._tell(engine.step())
        except DeviceFault:
            raise
        except Exception as error:  # a fault of ours: nobody knows whose row is to blame, so all of them are told
            if is_fatal(error):
                raise
            for _, row in [pair for pair in self.rows.values() if pair[0] is engine]:
                self._tell(engine.fail(row, error))

    def _tell(self, told: list[tuple[Row, Any]]) -> None:
        ours = [one for one in told if self.rows.get(one[0].id, (None, None))[1] is one[0]]  # not a job's own
        for row, event in ours:
            if row.finished:
                self.rows.pop(row.id, None)
            self.out.append((row.id, event))

    def _end_rows(self) -> None:
        """Of the models that go: what they write, and what is asked about them."""
        for job in [job for job in self.jobs if not job.of_models]:
            self._end_job(job, GONE)
        for engine, row in list(self.rows.values()):
            self._tell(engine.cancel(row, keep=False))

    # --- jobs

    def _work(self, job: Job) -> Iterator[Any]:
        match job:
            case Load():
                return self.models.second(job.form)
            case Switch():
                return self.models.switch(job.name)
            case _:
                return slices(self._engine(getattr(job, "form", "")), job)

    def _slice(self, job: Running) -> None:
        try:
            answer = next(job.work)
        except StopIteration:
            self.out.append((job.id, Done()))
            return
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit, DeviceFault)) or is_fatal(error):
                raise
            self.out.append((job.id, failure_of(error)))
            return
        if answer is not None:
            self.out.append((job.id, answer))
        self.jobs.append(job)


def watching(ask: Ask, watch: Watch) -> Ask:
    """A request that waits for the model, with those of its rows that are to be watched."""
    if not (isinstance(ask.what, Generate) and set(ask.what.rows) & set(watch.rows)):
        return ask
    rows = zip(ask.what.rows, ask.what.requests, strict=True)
    seen = tuple(replace(r, watch=watch.projection) if n in watch.rows else r for n, r in rows)
    return replace(ask, what=replace(ask.what, requests=seen))


def never_began(request: Request) -> FinishEvent:
    """The end of a row that was cancelled before its engine was there."""
    return FinishEvent(
        "",
        Stats(
            finish_reason="cancelled",
            prompt_tokens=len(request.prompt),
            cached_tokens=0,
            new_tokens=0,
            seed=request.params.seed,
            ttft=0.0,
            prefill_rate=0.0,
            decode_rate=0.0,
            cache_used=0,
            cache_total=0,
        ),
    )


def failure_of(error: BaseException) -> Failure:
    if isinstance(error, RequestError):
        return Failure(str(error), "request")
    if isinstance(error, CheckpointError):
        return Failure(str(error), "checkpoint")
    return Failure(in_a_sentence(error))
