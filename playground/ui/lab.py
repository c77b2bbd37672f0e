"""The lab tab: experiments with the next-token distribution of the prompt, and with the cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import gradio as gr
import pandas

from playground import RequestError, SamplingParams
from playground.engine.events import Likeliest
from playground.engine.requests import Curve, Draws, Logits, Noise, Shape
from playground.engine.settings import whole_number
from playground.inspect.lab import STEPPED, Distribution, counted, draw_in_steps, temperature_table
from playground.ui.components import BarTable
from playground.ui.controls import Number
from playground.ui.handlers import Handlers
from playground.ui.painting import answer_of, answers_of
from playground.ui.session import Session, run_of, told
from playground.ui.settings import QUICK, SHAPING, Controls

CURVE_TOKENS, FEWEST = 400, 36  # written for the curve; fewer than this are not worth a picture
LONGEST = 2048  # without a cache all of a text is fed at once, again and again
CURVE_COLUMNS = {"length": "Tokens", "ms": "Milliseconds per token", "form": "KV cache"}


class LabHandlers:
    """The distribution of a prompt is computed once, and kept in the page's session until the prompt changes."""

    def __init__(self, handlers: Handlers):
        self.handlers = handlers

    async def distribution(self, prompt: str, session: Session) -> Distribution:
        playground = self.handlers.playground
        key = (playground.info.key, prompt)
        if session.lab is None or session.lab[0] != key:
            ids = playground.encode(prompt)
            found: Likeliest = await answer_of(playground.ask(Logits(ids)))
            texts = tuple(playground.tokenizer.spelled(token) for token in found.ids.tolist())
            session.lab = key, Distribution(texts, found.logprobs, found.covered)
        return session.lab[1]

    def params(self, values) -> SamplingParams:
        """Of the values of `SHAPING`, with the seed drawn where none is asked for."""
        return SamplingParams.read(dict(zip(SHAPING, values, strict=True))).with_drawn_seed()

    async def shaped(self, d: Distribution, params: SamplingParams):
        return await answer_of(self.handlers.playground.ask(Shape(d.logprobs, params)))

    async def draws(self, session: Session, prompt, count, *values) -> AsyncIterator[dict]:
        """Draws by every sampler; yields the table as it fills."""
        async with run_of(session):
            count, params = whole_number("Draws", count), self.params(values)
            session.seed = params.seed
            d = await self.distribution(prompt, session)
            async for found in answers_of(self.handlers.playground.ask(Draws(d.logprobs, params, count)), 0.05):
                yield counted(d, found)

    async def table(self, session: Session, prompt, *values) -> dict:
        """Before and after the settings."""
        with told():
            params, d = self.params(values), await self.distribution(prompt, session)
            return temperature_table(d, await self.shaped(d, params))

    async def live(self, session: Session, prompt, *values):
        """As `table`, for a slider that moves: nothing before the lab was opened, and no complaint about the prompt."""
        return gr.skip() if session.lab is None else await self.table(session, prompt, *values)

    async def step(self, session: Session, prompt, *values) -> dict:
        """One draw taken apart; the next click takes the next position's noise."""
        with told():
            given = dict(zip(SHAPING, values, strict=True))
            given["seed"] = max(whole_number("Seed", given["seed"]), 0)
            params = SamplingParams.read(given | {"temperature": given["temperature"] or 1.0})
            session.drawn += 1
            d = await self.distribution(prompt, session)
            after = await self.shaped(d, params)
            noise = await answer_of(self.handlers.playground.ask(Noise(params.seed, session.drawn, STEPPED)))
            return draw_in_steps(d, after, noise, params.seed, session.drawn)

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
            async for point in answers_of(playground.ask(Curve(ids, min(CURVE_TOKENS, room))), 0.05):
                found += [(point.length, point.cached_ms, "with"), (point.length, point.uncached_ms, "without")]
                yield pandas.DataFrame(found, columns=list(CURVE_COLUMNS.values()))


class LabTab(NamedTuple):
    tab: gr.Tab
    show: gr.Button
    table: BarTable
    count: Number
    draw: gr.Button
    drawn: BarTable
    again: gr.Button
    steps: BarTable
    measure: gr.Button
    plot: gr.LinePlot


def lab_tab() -> LabTab:
    with gr.Tab("Lab", id="lab") as tab:
        gr.Markdown("What may follow the prompt, under the settings beside this.")
        gr.Markdown("### Temperature by eye")
        table = BarTable("Temperature by eye", "Move a slider, or press Show.", elem_id="lab-table")
        show = gr.Button("Show", size="sm", elem_id="lab-show")
        gr.Markdown("### Do they agree?")
        with gr.Row():
            count = Number(20000, label="Draws by each sampler", precision=0, elem_id="lab-count", min_width=140)
            draw = gr.Button("Draw", variant="primary", elem_id="lab-draw", min_width=100)
        drawn = BarTable(
            "Draws", "Multinomial and Gumbel-max draw from the same distribution: count it.", elem_id="lab-draws"
        )
        gr.Markdown("### The draw, step by step")
        again = gr.Button("Draw once", size="sm", elem_id="lab-step")
        steps = BarTable(
            "The draw", "Divide each probability by exponential noise; the largest ratio wins.", elem_id="lab-steps"
        )
        gr.Markdown("### What the cache buys")
        measure = gr.Button("Measure", size="sm", elem_id="lab-measure")
        x, y, colour = CURVE_COLUMNS.values()
        plot = gr.LinePlot(x=x, y=y, color=colour, height=260, elem_id="lab-curve", y_lim=[0, None])
    return LabTab(tab, show, table, count, draw, drawn, again, steps, measure, plot)


def connect_lab(lab: LabTab, handlers: Handlers, prompt, controls: Controls, session: gr.State) -> None:
    experiments = LabHandlers(handlers)
    shaping = [controls.by_name[name] for name in SHAPING]
    inputs = [session, prompt, *shaping]
    for event in (lab.show.click, lab.tab.select):
        event(experiments.table, inputs, [lab.table], **QUICK)
    # sliders speak in every tab: only while the lab is open is there anything to show
    for slider in shaping:
        slider.change(experiments.live, inputs, [lab.table], trigger_mode="always_last", **QUICK)
    lab.draw.click(experiments.draws, [session, prompt, lab.count, *shaping], [lab.drawn], **QUICK)
    lab.again.click(experiments.step, inputs, [lab.steps], **QUICK)
    lab.measure.click(
        experiments.curve, [session, prompt], [lab.plot], api_visibility="private", concurrency_limit=None
    )
