"""The lab tab: experiments with the next-token distribution of the prompt, and with the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import gradio as gr
import pandas

from playground import RequestError, SamplingParams
from playground.engine.curve import PROBES, cache_curve
from playground.engine.engine import PREFILL_CHUNK
from playground.engine.experiments import Distribution, count_draws, draw_in_steps, next_distribution, temperature_table
from playground.engine.requests import whole_number
from playground.ui.components import BarTable
from playground.ui.controls import Number
from playground.ui.handlers import Handlers
from playground.ui.session import Session, run_of, told

CURVE_TOKENS = 400
CURVE_COLUMNS = {"length": "Tokens", "ms": "Milliseconds per token", "form": "KV cache"}


class LabHandlers:
    """The distribution of a prompt is computed once, and kept in the page's session until the prompt changes."""

    def __init__(self, handlers: Handlers):
        self.handlers = handlers

    def distribution(self, prompt: str, session: Session) -> Distribution:
        playground = self.handlers.playground
        key = (playground.service, prompt)
        if session.lab is None or session.lab[0] != key:
            ids = playground.encode(prompt)
            playground.check_prompt(ids)
            session.lab = (
                key,
                next_distribution(playground.service, ids, playground.tokenizer.spelled),
            )
        return session.lab[1]

    def params(self, temperature, top_k, top_p, min_p, seed=-1, sampler="gumbel") -> SamplingParams:
        return self.handlers.params(sampler, temperature, seed, top_k, top_p, min_p)

    def draws(self, prompt, count, temperature, seed, top_k, top_p, min_p, session: Session) -> Iterator[dict]:
        """Draws by every sampler; yields the table as it fills."""
        with run_of(session):
            count = whole_number("Draws", count)
            params = self.params(temperature, top_k, top_p, min_p, seed)
            session.seed = params.seed
            yield from count_draws(self.distribution(prompt, session), params, count)

    def table(self, prompt, temperature, top_k, top_p, min_p, session: Session) -> dict:
        """Before and after the settings."""
        with told():
            params = self.params(temperature, top_k, top_p, min_p)
            return temperature_table(self.distribution(prompt, session), params)

    def live(self, prompt, temperature, top_k, top_p, min_p, session: Session):
        """As `table`, for a slider that moves: nothing before the lab was opened, and no complaint about the prompt."""
        if session.lab is None:
            return gr.skip()
        return self.table(prompt, temperature, top_k, top_p, min_p, session)

    def step(self, prompt, temperature, seed, top_k, top_p, min_p, session: Session) -> dict:
        """One draw taken apart; the next click takes the next position's noise."""
        with told():
            params = self.params(temperature, top_k, top_p, min_p, max(whole_number("Seed", seed), 0))
            session.drawn += 1
            found = draw_in_steps(self.distribution(prompt, session), params, session.drawn)
        rows = [
            {"label": r["label"], "values": [r["p"], r["exponential"], r["ratio"], r["score"]], "chosen": r["chosen"]}
            for r in found["rows"]
        ]
        note = f"Noise of seed {params.seed}, position {found['position']}. The largest ratio has the largest score."
        return {"columns": ["p", "E ~ Exp(1)", "p / E", "log p + noise"], "rows": rows, "note": note, "figures": True}

    def curve(self, prompt, session: Session) -> Iterator[dict]:
        """Points of the curve as they are measured."""
        with run_of(session):
            playground = self.handlers.playground
            ids = list(playground.encode(prompt))
            playground.check_prompt(ids)
            found, room = [], playground.context - len(ids)
            if room < 4 * PROBES:
                raise RequestError("The prompt leaves too little of the context to measure in; shorten it.")
            if len(ids) + CURVE_TOKENS > PREFILL_CHUNK:  # without a cache all of it is fed at once, again and again
                raise RequestError(f"Use a prompt of at most {PREFILL_CHUNK - CURVE_TOKENS} tokens to measure this.")
            for row in cache_curve(playground.service, ids, min(CURVE_TOKENS, room)):
                found += [(row["length"], row["cached_ms"], "with"), (row["length"], row["uncached_ms"], "without")]
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


def connect_lab(lab: LabTab, handlers: Handlers, prompt, settings: list, session: gr.State) -> None:
    experiments, quick = LabHandlers(handlers), {"api_visibility": "private", "show_progress": "hidden"}
    _, temperature, _, seed, top_k, top_p, min_p, _ = settings
    shaping = [temperature, top_k, top_p, min_p]
    seeded = [temperature, seed, top_k, top_p, min_p, session]
    inputs = [prompt, *shaping, session]
    for event in (lab.show.click, lab.tab.select):
        event(experiments.table, inputs, [lab.table], **quick)
    # sliders speak in every tab: only while the lab is open is there anything to show
    for slider in shaping:
        slider.change(experiments.live, inputs, [lab.table], trigger_mode="always_last", **quick)
    lab.draw.click(experiments.draws, [prompt, lab.count, *seeded], [lab.drawn], **quick)
    lab.again.click(experiments.step, [prompt, *seeded], [lab.steps], **quick)
    lab.measure.click(experiments.curve, [prompt, session], [lab.plot], api_visibility="private")
