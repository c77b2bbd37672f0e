"""The lab tab: experiments with the next-token distribution of the prompt, and with the cache."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
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
from playground.ui.settings import QUICK, Controls, LinkButton, link_to, own_settings

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
            session.seed, session.experiment = params.seed, "draws"
            d = await self.distribution(prompt, session)
            asked, table = self.handlers.playground.ask(Draws(d.logits, params, count, d.shown, d.prompt)), None
            async for found in self._stoppable(session, asked):
                table = counted(d, found)
                yield table
            if table:
                session.tables["drawn"] = (prompt, *values), table | {"done": None}
                yield self.kept(session, "drawn")

    async def _stoppable(self, session: Session, asked: Answers) -> AsyncIterator:
        """What a job brings; Stop ends it, and what has come stays."""
        session.streams, session.experimenting = [asked], True
        try:
            async for found in answers_of(asked, 0.05):
                yield found
        except RequestError:
            if not session.stopping:
                raise
        finally:
            session.streams, session.experimenting = [], False

    async def table(self, session: Session, prompt, *values) -> dict:
        """Before and after the settings."""
        with told():
            params, d = self.params(values), await self.distribution(prompt, session)
            return temperature_table(d, await self.shaped(d, params))

    async def enter(self, session: Session, prompt, *values) -> tuple:
        """Somebody opens the lab."""
        session.lab_asked = (prompt, *values)
        return await self.live(session, prompt, *values)

    async def live(self, session: Session, prompt, *values) -> tuple:
        """The table for the prompt and settings as they are now, and the other experiments, marked where they are of
        others; nothing while the lab is closed. What is wrong with a prompt or setting is told in the table's place."""
        if session.lab_asked is None:
            return gr.skip(), gr.skip(), gr.skip()
        session.lab_asked = (prompt, *values)
        try:
            table = await self.table(session, prompt, *values)
        except gr.Error as error:
            table = {"empty": error.message}
        return table, self.kept(session, "drawn"), self.kept(session, "steps")

    def kept(self, session: Session, name: str):
        """What an experiment brought last; marked as stale where prompt or settings have changed since."""
        if name not in session.tables:
            return gr.skip()
        of, table = session.tables[name]
        return table | {"stale": STALE if session.lab_asked not in (None, of) else ""}

    async def step(self, session: Session, prompt, *values) -> dict:
        """One draw taken apart: at first the one that a run would make, then those of the positions behind it."""
        with told():
            params = self.params(values)
            if params.is_greedy:
                raise RequestError(GREEDY)
            d = await self.distribution(prompt, session)
            position = len(d.prompt) + session.drawn
            session.drawn, session.seed, session.experiment = session.drawn + 1, params.seed, "step"
            after = await self.shaped(d, params)
            noise = await answer_of(self.handlers.playground.ask(Noise(params.seed, position, len(d.logits))))
            session.tables["steps"] = (prompt, *values), draw_in_steps(d, after, noise, params.seed, position)
            return self.kept(session, "steps")

    async def link(self, session: Session, prompt, count, *values) -> str:
        """The query of an address that opens the lab as it is, at the experiment that was made last."""
        with told():
            own = own_settings(SamplingParams.read(dict(zip(NAMES, values, strict=True))))
        if session.experiment and session.seed is not None:
            own["seed"] = session.seed
        more = {"experiment": session.experiment} if session.experiment else {}
        return link_to("lab", prompt=prompt, **own, draws=count, **more)

    async def curve(self, session: Session, prompt) -> AsyncIterator[pandas.DataFrame]:
        """Points of the curve as they are measured."""
        async with run_of(session):
            playground, session.experiment = self.handlers.playground, "curve"
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
    stop_measuring: gr.Button
    plot: gr.LinePlot
    link: LinkButton


@contextmanager
def card(name: str, title: str, about: str) -> Iterator[None]:
    """The place of one experiment, which a link can lead to."""
    with gr.Column(elem_classes="card", elem_id=f"experiment-{name}"):
        gr.Markdown(f"## {title}\n{about}")
        yield


def lab_tab() -> LabTab:
    with gr.Tab("Lab", id="lab") as tab, gr.Column(elem_id="lab-cards"):
        with card("settings", "What settings do", "What may follow the prompt, before and after the settings above."):
            table = BarTable("What settings do", "Computing the first distribution…", elem_id="lab-table")
        with card(
            "draws", "Do the samplers agree?", "Multinomial and Gumbel-max draw from the same distribution: count it."
        ):
            with gr.Row(elem_classes="lab-row"):
                count = Number(20000, label="Draws by each", precision=0, elem_id="lab-count", min_width=120)
                draw = gr.Button("Draw", variant="primary", elem_id="lab-draw", min_width=80, scale=0)
                stop = gr.Button("Stop", variant="stop", elem_id="lab-stop", min_width=80, scale=0)
            drawn = BarTable("Draws", "Press Draw to count.", elem_id="lab-draws")
        with card(
            "step",
            "One draw, taken apart",
            "Divide each probability by exponential noise: the largest ratio wins. The first draw is the one that Run "
            "makes with the same seed.",
        ):
            again = gr.Button("Draw once", size="sm", elem_id="lab-step")
            steps = BarTable("The draw", "Press Draw once.", elem_id="lab-steps")
        with card(
            "curve",
            "What the cache buys",
            "Time per token as the text grows: with the KV cache it stays flat, without it every token pays for all "
            "before it. Each point is a median of several measurements.",
        ):
            with gr.Row(elem_classes="lab-row"):
                measure = gr.Button("Measure", size="sm", elem_id="lab-measure")
                stop_measuring = gr.Button("Stop", size="sm", elem_id="lab-stop-measuring")
            x, y, colour = CURVE_COLUMNS.values()
            plot = gr.LinePlot(x=x, y=y, color=colour, height=260, elem_id="lab-curve", y_lim=[0, None])
        with gr.Row(elem_classes="actions"):
            link = LinkButton.build("link-lab")
    return LabTab(tab, table, count, draw, stop, drawn, again, steps, measure, stop_measuring, plot, link)


def linked_draws(query: dict[str, str]) -> int | None:
    """How many draws an address asks for; None where it names no number, or a wrong one."""
    text = query.get("draws", "")
    return int(text) if text.isdecimal() and 1 <= len(text) <= 7 else None


def connect_lab(lab: LabTab, handlers: Handlers, prompt, controls: Controls, session: gr.State) -> None:
    experiments = LabHandlers(handlers)
    shaping = [controls.by_name[name] for name in NAMES]
    inputs = [session, prompt, *shaping]
    shown = [lab.table, lab.drawn, lab.steps]
    lab.tab.select(experiments.enter, inputs, shown, **QUICK)
    for control in (prompt, *shaping):
        control.change(experiments.live, inputs, shown, trigger_mode="always_last", **QUICK)
    lab.draw.click(
        experiments.draws, [session, prompt, lab.count, *shaping], [lab.drawn], trigger_mode="multiple", **QUICK
    )
    lab.again.click(experiments.step, inputs, [lab.steps], **QUICK)
    lab.link.connect(experiments.link, [session, prompt, lab.count, *shaping])
    # Measure turns into Stop: see page.css
    begun = lab.measure.click(None, js="() => { document.body.dataset.measuring = ''; }")
    measured = begun.then(
        experiments.curve, [session, prompt], [lab.plot], api_visibility="private", concurrency_limit=None
    )
    measured.then(None, js="() => { delete document.body.dataset.measuring; }")
