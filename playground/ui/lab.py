"""The lab tab: experiments with the next-token distribution of the prompt, and with the cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import gradio as gr
import pandas

from playground import RequestError, SamplingParams
from playground.engine.client import Answers
from playground.engine.requests import Curve, Draws, Logits, Noise, Shape
from playground.engine.settings import NAMES as CONTROLS
from playground.engine.settings import SETTINGS, whole_number
from playground.inspect.lab import Distribution, counted, draw_in_steps, temperature_table
from playground.ui.components import BarTable
from playground.ui.controls import Number
from playground.ui.handlers import Handlers
from playground.ui.painting import answer_of, answers_of
from playground.ui.session import Session, run_of, told
from playground.ui.settings import QUICK, Controls

NAMES = (*(name for name in CONTROLS if name in SETTINGS and name != "sampler"), "sampler")
CURVE_TOKENS, FEWEST = 400, 36  # written for the curve; fewer than this are not worth a picture
LONGEST = 2048  # without a cache all of a text is fed at once, again and again
CURVE_COLUMNS = {"length": "Tokens", "ms": "Milliseconds per token", "form": "KV cache"}
STALE = "This is of the prompt and settings before; draw again."
GREEDY = "Greedy takes the likeliest token and draws nothing: choose another sampler, and a temperature above 0."


class LabHandlers:
    """The distribution of a prompt is computed once, and kept in the page's session until the prompt changes."""

    def __init__(self, handlers: Handlers):
        self.handlers = handlers

    async def distribution(self, prompt: str, session: Session) -> Distribution:
        playground = self.handlers.playground
        key = (playground.info.key, prompt)
        if session.lab is None or session.lab[0] != key:
            ids = playground.encode(prompt)
            logits = await answer_of(playground.ask(Logits(ids)))
            session.lab, session.drawn = (key, Distribution(ids, logits, playground.tokenizer.spelled)), 0
        return session.lab[1]

    def params(self, values) -> SamplingParams:
        """Of the values of `NAMES`, with the seed drawn where none is asked for."""
        return SamplingParams.read(dict(zip(NAMES, values, strict=True))).with_drawn_seed()

    async def shaped(self, d: Distribution, params: SamplingParams):
        return await answer_of(self.handlers.playground.ask(Shape(d.logits, params, d.prompt)))

    async def draws(self, session: Session, prompt, count, *values) -> AsyncIterator[dict]:
        """Draws by every sampler; yields the table as it fills."""
        async with run_of(session):
            count, params = whole_number("Draws", count), self.params(values)
            session.seed = params.seed
            d = await self.distribution(prompt, session)
            asked = self.handlers.playground.ask(Draws(d.logits, params, count, d.shown, d.prompt))
            async for found in self._stoppable(session, asked):
                session.tables["drawn"] = counted(d, found)
                yield session.tables["drawn"]
            if session.stopping and "drawn" in session.tables:
                yield session.tables["drawn"] | {"done": None}

    async def _stoppable(self, session: Session, asked: Answers) -> AsyncIterator:
        """What a job brings; Stop ends it, and what has come stays."""
        session.streams = [asked]
        try:
            async for found in answers_of(asked, 0.05):
                yield found
        except RequestError:
            if not session.stopping:
                raise
        finally:
            session.streams = []

    async def table(self, session: Session, prompt, *values) -> dict:
        """Before and after the settings."""
        with told():
            params, d = self.params(values), await self.distribution(prompt, session)
            return temperature_table(d, await self.shaped(d, params))

    async def live(self, session: Session, prompt, *values) -> tuple:
        """The table for a prompt or setting that changes, and that the other experiments are stale: nothing before the
        lab was opened. A prompt or setting that is wrong on the way is told in the table's place."""
        if session.lab is None:
            return gr.skip(), gr.skip(), gr.skip()
        shown = [session.tables.get(name) for name in ("drawn", "steps")]
        stale = [table | {"stale": STALE} if table else gr.skip() for table in shown]
        try:
            return await self.table(session, prompt, *values), *stale
        except gr.Error as error:
            return {"empty": error.message}, *stale

    async def step(self, session: Session, prompt, *values) -> dict:
        """One draw taken apart: at first the one that a run would make, then those of the positions behind it."""
        with told():
            params = self.params(values)
            if params.is_greedy:
                raise RequestError(GREEDY)
            d = await self.distribution(prompt, session)
            position = len(d.prompt) + session.drawn
            session.drawn, session.seed = session.drawn + 1, params.seed
            after = await self.shaped(d, params)
            noise = await answer_of(self.handlers.playground.ask(Noise(params.seed, position, len(d.logits))))
            session.tables["steps"] = draw_in_steps(d, after, noise, params.seed, position)
            return session.tables["steps"]

    async def curve(self, session: Session, prompt) -> AsyncIterator[pandas.DataFrame]:
        """Points of the curve as they are measured."""
        async with run_of(session):
            playground = self.handlers.playground
            ids = playground.encode(prompt)
            playground.check_prompt(ids)
            found, room = [], playground.context - len(ids)
            if room < FEWEST:
                raise RequestError("The prompt leaves too little of the context to measure in; shorten it.")
            if len(ids) + CURVE_TOKENS > LONGEST:
                raise RequestError(f"Use a prompt of at most {LONGEST - CURVE_TOKENS} tokens to measure this.")
            async for point in self._stoppable(session, playground.ask(Curve(ids, min(CURVE_TOKENS, room)))):
                found += [(point.length, point.cached_ms, "with"), (point.length, point.uncached_ms, "without")]
                yield pandas.DataFrame(found, columns=list(CURVE_COLUMNS.values()))


class LabTab(NamedTuple):
    tab: gr.Tab
    table: BarTable
    count: Number
    draw: gr.Button
    stop: gr.Button
    drawn: BarTable
    again: gr.Button
    steps: BarTable
    measure: gr.Button
    plot: gr.LinePlot


def lab_tab() -> LabTab:
    with gr.Tab("Lab", id="lab") as tab, gr.Column(elem_id="lab-cards"):
        with gr.Column(elem_classes="card"):
            gr.Markdown("### What settings do\nWhat may follow the prompt, before and after the settings above.")
            table = BarTable("What settings do", "Computing the first distribution…", elem_id="lab-table")
        with gr.Column(elem_classes="card"):
            gr.Markdown(
                "### Do the samplers agree?\nMultinomial and Gumbel-max draw from the same distribution: count it."
            )
            with gr.Row(elem_classes="lab-row"):
                count = Number(20000, label="Draws by each", precision=0, elem_id="lab-count", min_width=120)
                draw = gr.Button("Draw", variant="primary", elem_id="lab-draw", min_width=80, scale=0)
                stop = gr.Button("Stop", variant="stop", elem_id="lab-stop", min_width=80, scale=0)
            drawn = BarTable("Draws", "Press Draw to count.", elem_id="lab-draws")
        with gr.Column(elem_classes="card"):
            gr.Markdown(
                "### One draw, taken apart\nDivide each probability by exponential noise: the largest ratio wins. The "
                "first draw is the one that Run makes with the same seed."
            )
            again = gr.Button("Draw once", size="sm", elem_id="lab-step")
            steps = BarTable("The draw", "Press Draw once.", elem_id="lab-steps")
        with gr.Column(elem_classes="card"):
            gr.Markdown(
                "### What the cache buys\nTime per token as the text grows: with the KV cache it stays flat, without "
                "it every token pays for all before it. Each point is a median of several measurements."
            )
            measure = gr.Button("Measure", size="sm", elem_id="lab-measure")
            x, y, colour = CURVE_COLUMNS.values()
            plot = gr.LinePlot(x=x, y=y, color=colour, height=260, elem_id="lab-curve", y_lim=[0, None])
    return LabTab(tab, table, count, draw, stop, drawn, again, steps, measure, plot)


def connect_lab(lab: LabTab, handlers: Handlers, prompt, controls: Controls, session: gr.State) -> None:
    experiments = LabHandlers(handlers)
    shaping = [controls.by_name[name] for name in NAMES]
    inputs = [session, prompt, *shaping]
    lab.tab.select(experiments.table, inputs, [lab.table], **QUICK)
    # controls speak in every tab: only while the lab is open is there anything to show
    for control in (prompt, *shaping):
        control.change(experiments.live, inputs, [lab.table, lab.drawn, lab.steps], trigger_mode="always_last", **QUICK)
    lab.draw.click(experiments.draws, [session, prompt, lab.count, *shaping], [lab.drawn], **QUICK)
    lab.again.click(experiments.step, inputs, [lab.steps], **QUICK)
    lab.measure.click(
        experiments.curve, [session, prompt], [lab.plot], api_visibility="private", concurrency_limit=None
    )
