"""What one open page remembers, and how its runs are kept apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import gradio as gr
import numpy as np

from playground import CheckpointError, EngineError, RequestError
from playground.checkpoint.chat import Message
from playground.engine.client import Answers
from playground.engine.events import TokenScales
from playground.inspect.lab import Distribution
from playground.inspect.run import Run

SECOND_RUN = "This page is already writing; press Stop first, or wait for the end."


class Session:
    """What one open page remembers between events. Handlers of the page share the object, so that a choice in the
    panel takes effect in a run that is under way. They all run on one thread, the event loop's."""

    def __init__(self):
        self.running = False
        self.stopping = False  # the run under way was told to stop
        self.streams: list[Answers] = []  # of the run under way
        self.model = ""  # key of the model that the page shows
        self.layer, self.projection = 0, ""  # of the panel; "": the layer's first
        self.names: tuple[str, ...] = ()  # the layer's projections
        self.seed: int | None = None  # of the last run that drew with one
        self.tree: list[Run] = []  # the last run, and what branched off from it
        self.current: Run | None = None  # the one of them that is shown
        self.newest: Run | None = None  # of Generate and Chat: the panel speaks of it
        self.columns: list[Run] = []  # of the last comparison
        self.lab: tuple[tuple[str, str], Distribution] | None = None  # what the lab drew from last, and its key
        self.lab_asked: tuple | None = None  # while somebody looks at it: the prompt and settings there
        self.tables: dict[str, tuple] = {}  # of the lab's experiments: what they are of, what is shown
        self.drawn = 0  # single draws in the lab: each takes the next position's noise
        self.scales: np.ndarray | None = None  # of the newest token, of the projection that the panel shows
        self.recomputed = False  # they were, for want of the run's own
        self.looked: tuple[Run, int] | None = None  # the token that somebody chose: the panel stays with it
        self.looked_scales: TokenScales | None = None
        self.chat: list[Message] = []
        self.said: dict[str, str] = {}  # for a link: all that the last answer followed from
        self.experimenting = False  # the run under way is one of the lab's
        self.experiment = ""  # of the lab, the last one

    @property
    def watched(self) -> str:
        """The projection whose scales the panel shows, by its full name."""
        return f"layers.{self.layer}.{self.projection}" if self.projection else ""

    def forget_model(self) -> None:
        """What belonged to a model that is no longer the one loaded."""
        self.layer, self.projection, self.names, self.scales, self.chat = 0, "", (), None, []
        self.tree, self.columns, self.tables = [], [], {}
        self.current = self.newest = self.lab = self.looked = None
        self.said = {}


def as_error(sentence: str) -> gr.Error:
    """For the page, as text: gradio shows an error as HTML, and its words may be a visitor's or a checkpoint's own."""
    return gr.Error(sentence.replace("<", "\u2039"), print_exception=False)


@contextmanager
def told() -> Iterator[None]:
    """Whatever goes wrong inside becomes a sentence for the page and the API."""
    try:
        yield
    except (RequestError, CheckpointError, EngineError) as error:
        raise as_error(str(error)) from None


@asynccontextmanager
async def run_of(session: Session) -> AsyncIterator[None]:
    """One run per page at a time; whatever goes wrong inside is told."""
    await refuse_during_a_run(session, claim=True)
    session.stopping = False
    try:
        with told():
            yield
    finally:
        session.running = False


async def refuse_during_a_run(session: Session, claim: bool = False) -> None:
    """One run per page; who may `claim` it is the one that runs. A run that has ended, and whose last words are still
    being painted, gets a moment to leave."""
    patience = time.monotonic() + 1.0
    while session.running:
        if not all(stream.ended for stream in session.streams) or time.monotonic() > patience:
            raise as_error(SECOND_RUN)
        await asyncio.sleep(0.02)
    session.running = claim


def check_going(session: Session) -> None:
    """Behind whatever a run had to wait for. Raises `RequestError` where somebody pressed Stop meanwhile."""
    if session.stopping:
        raise RequestError("Stopped before the first word.")


def stop(session: Session) -> None:
    """Cancels the rows of the run under way. Its generator then ends by itself, with the engine's own last figures;
    to cancel the generator instead would leave the footer to whichever message comes last."""
    session.stopping = True
    for stream in session.streams:
        stream.close()
    session.streams = []
