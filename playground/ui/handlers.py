"""What all tabs have in common: runs are begun, painted and stopped, the panel is kept up to date, a model is chosen.
Coroutines on the event loop: whoever waits holds no thread, so that as many can wait as come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from playground import CheckpointError, EngineError, Playground, RequestError
from playground.engine.client import Answers
from playground.engine.events import Progress, TokenScales, WeightScales
from playground.engine.requests import Load, Scales, Weights
from playground.engine.settings import SamplingParams, whole_number
from playground.inspect.book import RunBook
from playground.inspect.example import RUN, example_token
from playground.inspect.run import Run
from playground.inspect.scales import ScaleGrid
from playground.inspect.tokens import chips
from playground.shelf import Shelf
from playground.ui.components import Heatmap
from playground.ui.painting import Listener, Pace, Pane, answer_of, answers_of, paints
from playground.ui.session import Session, as_error, check_going, stop, told
from playground.ui.settings import Asked

ABSORBED = "Absorbed at decode: this projection is folded into the query and the output, no activation meets it."
PLAIN = "This model is not quantised: its activations have no scales."
STRIP = "Activation scales of the newest token"


class Handlers:
    """`page` is known once it has been built."""

    def __init__(self, shelf: Shelf):
        self.shelf, self.book, self.pace = shelf, RunBook(), Pace()
        self.page: gr.Blocks | None = None

    @property
    def playground(self) -> Playground:
        return self.shelf.current

    def explain(self, asked: dict) -> dict:
        """For a view's script: a token of a run, or of the recorded example, or an `error`."""
        if isinstance(asked, dict) and asked.get("run") == RUN:
            try:
                return example_token(asked.get("index"))
            except RequestError as error:
                return {"error": str(error)}
        return self.book.explain(asked)

    # --- runs

    async def begin(
        self,
        request: gr.Request | None,
        session: Session,
        prompt,
        params: Sequence[SamplingParams],
        asked: Asked,
        forms: Sequence[str] | None = None,
        traced: bool = True,
    ) -> list[Run]:
        """Starts one row per setting. Loads another form of the weights first where one is asked for."""
        playground = self.playground
        for form in dict.fromkeys(form for form in forms or () if form and form not in playground.loaded_forms):
            await self.wait_for(session, playground.ask(Load(form)))
        ids = await asyncio.to_thread(playground.encode, prompt, asked.parse_special)  # a long one takes a second
        check_going(session)
        options = self.options(request, session, playground, traced) | {"ignore_eos": asked.past_end}
        return self.book.begin(playground, prompt, params, asked.limit, forms, ids, **options)

    async def wait_for(self, session: Session, asked: Answers) -> Any:
        """The last answer of a job on which a run waits: to stop the run stops the job."""
        session.streams = [asked]
        try:
            return await answer_of(asked)
        finally:
            session.streams = []

    def options(self, request: gr.Request | None, session: Session, playground: Playground, traced: bool) -> dict:
        """Of a `Request` that a page makes: who it is that waits, and what the panel shows."""
        self.know(session, playground)
        visitor = getattr(request, "session_hash", None) or ""
        return {"trace_scales": traced, "watch": session.watched if traced else "", "visitor": visitor}

    def know(self, session: Session, playground: Playground) -> None:
        """The page of this session shows this model."""
        if session.model != playground.info.key:
            session.forget_model()
            session.model, session.projection = playground.info.key, playground.info.projection

    async def paint(
        self, session: Session, runs: Sequence[Run], request: gr.Request | None
    ) -> AsyncIterator[list[Pane]]:
        """Yields the panes at every paint; a closed generator cancels the rows. Ends with the sentence of whichever
        run failed."""
        session.streams = [run.stream for run in runs]
        try:
            panes = [Pane(run, self.playground.info) for run in runs]
            async for _ in paints(panes, self.pace, Listener(self.page, request)):
                session.scales, session.recomputed = panes[0].scales, False
                yield panes
            for pane in panes:
                if pane.failure:
                    raise as_error(pane.failure)
        finally:
            stop(session)

    # --- the panel

    async def choose(self, layer: int, projection: str | None, session: Session) -> tuple:
        """A choice in the panel: the dropdown of the layer's projections, and both pictures. Another page may have
        switched to a model with fewer layers since this one's list was made."""
        with told():
            playground = self.playground
            self.know(session, playground)
            found: WeightScales = await answer_of(playground.ask(Weights(int(layer), projection or "")))
            session.layer, session.projection, session.names = found.layer, found.projection, found.names
            for stream in session.streams:
                stream.watch(session.watched)
            if session.newest and session.newest.tokens and not session.running:
                newest = await self.scales_of(session, session.newest, len(session.newest.tokens) - 1)
                session.scales, session.recomputed = newest.values, newest.recomputed
            if session.looked:
                session.looked_scales = await self.scales_of(session, *session.looked)
        return (
            gr.update(choices=list(found.names), value=found.projection or None),
            weight_view(found),
            self.activation_view(session),
        )

    async def look_at(self, event: gr.EventData, session: Session) -> dict:
        """The panel's strip, of the token of a run that somebody chose, until they leave it."""
        asked = asked_for(event)
        with told():
            run, index = self.book.get(asked.get("run")), whole_number("Index", asked.get("index"))
            if not 0 <= index < len(run.tokens):
                raise RequestError(f"The run has {len(run.tokens)} tokens, and no token {index}.")
            scales = await self.scales_of(session, run, index)  # a paint may come meanwhile
            session.looked, session.looked_scales = (run, index), scales
        return self.activation_view(session)

    def look_away(self, session: Session) -> dict:
        session.looked = None
        return self.activation_view(session)

    async def scales_of(self, session: Session, run: Run, index: int) -> TokenScales:
        """Those of the step that drew a token of a run (of a token that was chosen by hand: of the step that drew there
        before), for the projection that is shown now."""
        if not session.projection:
            return TokenScales(None, recomputed=False)
        drew = run
        while drew.parent and index < drew.taken:
            drew = drew.parent
        ids = (*run.prompt_ids, *run.ids[:index])
        asked = Scales(drew.stream.id, index - drew.taken, session.watched, ids, run.form)
        return await answer_of(self.playground.writer_of(drew.stream).ask(asked))

    def activation_view(self, session: Session) -> dict:
        values, recomputed, title, which = session.scales, session.recomputed, STRIP, "newest"
        if session.looked:
            values, recomputed, which = session.looked_scales.values, session.looked_scales.recomputed, "chosen"
            title = f"Activation scales of token {session.looked[1] + 1}"
        if values is not None:
            blocks = len(values)
            note = f"{128 * blocks} values enter, one scale per 1x128 block: {blocks}"
            if recomputed:
                note += ". Recomputed by feeding the text again: the run's own are no longer kept"
            return Heatmap.show(ScaleGrid.of(values), title, note, "row", "block")
        if not (session.newest and session.newest.tokens):
            return Heatmap.empty(title, "They appear here while the model writes.")
        if not session.projection:
            return Heatmap.empty(title, PLAIN)
        if session.projection.endswith("kv_b_proj"):
            return Heatmap.empty(title, ABSORBED)
        return Heatmap.empty(title, f"The gate did not send the {which} token to this expert.")

    # --- the prompt

    async def prompt_tokens(self, prompt, parse_special) -> dict:
        """The prompt as the tokens that a run would begin with."""
        with told():
            playground = self.playground
            ids = await asyncio.to_thread(playground.encode, prompt, bool(parse_special))
            return chips(ids, playground.tokenizer)

    # --- models

    async def switch(self, name: str, progress=gr.Progress()) -> str:  # noqa: B008  gradio's convention
        """Another model of the shelf; what went wrong, in words, or "". Then everything stays as it was."""
        try:
            async for told_ in answers_of(self.shelf.switch(name), 0.1):
                if isinstance(told_, Progress):
                    progress((told_.done >> 20, told_.total >> 20), desc=f"Loading {name}", unit="MB")
            await asyncio.to_thread(lambda: self.shelf.current)  # its tokenizer is read now
        except (CheckpointError, EngineError, RequestError) as error:
            return str(error)
        return ""


def weight_view(found: WeightScales) -> dict:
    if found.grid is None:
        return Heatmap.empty("Weight scales", "This layer is not quantised: it has none.")
    (rows, columns), grid = found.shape, ScaleGrid.of(found.grid)
    note = f"{rows} x {columns} weight, one scale per 128x128 tile: {grid.rows} x {grid.columns}"
    if found.error:
        how = "Its file has other blocks than these: restored and rounded a second time" if found.twice else ""
        note += f". {how or 'Quantised at load'}: a tile's relative error is {found.error[0]:.2%}, "
        note += f"at most {found.error[1]:.2%}"
    if found.unused:
        note += f". The files' {found.unused} scales for a cache or for activations go unused: both are measured here"
    return Heatmap.show(grid, "Weight scales", note, "row", "column")


def asked_for(event: gr.EventData) -> dict:
    """What a view's script sent along; a hostile one may send anything."""
    return event._data if isinstance(event._data, dict) else {}
