"""The layout: prompt and output in the middle, settings beside them, the scales panel always in reach. Each tab has a
module of its own; here they are put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import gradio as gr

from playground import Playground, RequestError
from playground.engine.events import ModelInfo
from playground.engine.settings import FOLDED, SWITCHES
from playground.inspect.columns import MOST
from playground.inspect.columns import NAMES as COLUMN
from playground.shelf import Shelf
from playground.ui import components
from playground.ui.chat import ChatTab, chat_tab, connect_chat, linked_talk
from playground.ui.compare import CompareHandlers, compare_tab, connect_compare, filled, linked_columns
from playground.ui.components import Heatmap, Inspector, Masthead, TokenChips
from playground.ui.endpoints import add_endpoints
from playground.ui.generate import WRITING, GenerateHandlers, RunButtons, connect_generate, generate_tab
from playground.ui.handlers import STRIP, Handlers
from playground.ui.lab import LabTab, connect_lab, lab_tab, linked_draws
from playground.ui.session import Session, stop, told
from playground.ui.settings import NAMES, QUICK, Controls, linked, named_filters, settings_bar
from playground.ui.visitors import describe_once
from playground.ui.words import defaults_note, state_in_words

# In the head: of what gradio takes as `css` it loses media queries. Our views' rules stand below its class twice, so
# that they count for more than its own.
PAGE_CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
STYLE = f".gradio-container.gradio-container {{ {components.CSS} }}\n{PAGE_CSS}"
HEAD = f"<style>{STYLE}</style><script>{components.SHARED}</script>"
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # gradio's own are too pale to read
    body_text_color_subdued="*neutral_500",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
)
SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
OPEN_GENERATE = """
() => [...document.querySelectorAll("[role=tab]")].find((tab) => tab.textContent.trim() === "Generate").click()
"""
EXAMPLES = [
    "Once upon a time",
    "One day, a little girl named Lily found a",
    "The fox looked at the old clock and said,",
    "Tom and his grandmother went to the sea. There",
]
ABOUT_SCALES = """## FP8 scales
Every number is stored in 8 bits; a block of 128 shares one scale, which restores them. Bright: the block holds larger
numbers."""
STATE_SECONDS = 1.0  # between looks at what the engine is doing


class Panel(NamedTuple):
    """The scales: what to look at, the weight's picture, and the strip that a run keeps up to date."""

    layer: gr.Dropdown
    projection: gr.Dropdown
    weights: Heatmap
    strip: Heatmap

    @classmethod
    def build(cls, info: ModelInfo) -> Panel:
        gr.Markdown(ABOUT_SCALES, elem_id="about-scales")
        first = [info.projection] if info.projection else []
        with gr.Row(elem_id="which-scales"):
            layer = gr.Dropdown(layer_choices(info), value=0, label="Layer", elem_id="layer", min_width=90)
            projection = gr.Dropdown(
                first, value=first[0] if first else None, label="Projection", elem_id="projection", min_width=140
            )
        strip = Heatmap(Heatmap.empty(STRIP, "They appear here while the model writes."))
        strip.elem_id = "activation-scales"
        weights = Heatmap(Heatmap.empty("Weight scales", "They appear when the model is loaded."))
        weights.elem_id = "weight-scales"
        return cls(layer, projection, weights, strip)

    def connect(self, handlers: Handlers, session: gr.State) -> None:
        for event in (self.layer.input, self.projection.input):
            event(handlers.choose, [self.layer, self.projection, session], [*self[1:]], **QUICK)


class Head(NamedTuple):
    """The model and the engine: what they are, and what they are doing."""

    heading: Masthead
    state: gr.Markdown
    model: gr.Dropdown
    failure: gr.Textbox

    @classmethod
    def build(cls, shelf: Shelf, info: ModelInfo) -> Head:
        with gr.Row(elem_id="head"):
            heading = Masthead(Masthead.show(info), elem_id="title")
            with gr.Column(min_width=200, scale=0, visible=len(shelf.names) > 1):
                model = gr.Dropdown(
                    shelf.labels, value=shelf.name, label="Model", show_label=False, container=False, elem_id="model"
                )
                failure = gr.Textbox(visible=False, label="Not loaded", interactive=False, elem_id="failure")
        state = gr.Markdown(elem_id="engine-state", visible=False)
        return cls(heading, state, model, failure)


class Arrivals:
    """What a page shows of the model when somebody opens it, or chooses another one."""

    def __init__(
        self, handlers: Handlers, head: Head, controls: Controls, panel: Panel, chat: ChatTab, lab: LabTab, prompt
    ):
        self.handlers = handlers
        self.parts = [prompt, *controls.inputs, controls.filters, controls.note, head.heading, head.model, head.failure]
        self.parts += [lab.count, chat.tab, chat.talk, chat.message, chat.system, panel.layer, *panel[1:]]
        self.built = setting_updates(handlers.playground, {})

    async def arrive(self, request: gr.Request, session: Session) -> AsyncIterator[list]:
        """The model that is loaded now, and the prompt and settings that the page's address carries. The panel follows
        when its weights are there. Settings that the page shows already are left alone: somebody may have changed them
        before this comes."""
        query = dict(request.query_params)
        given, wrong = linked(query)
        readers = {"columns": linked_columns, "turns": linked_talk, "draws": linked_draws}
        wrong += [name for name, read in readers.items() if name in query and read(query) is None]
        if wrong:
            gr.Warning(f"The link has values that can't be used, and they are left out: {', '.join(wrong)}.")
        yield self._described(session, given, known=self.built, query=query)
        layer = query.get("layer", "")
        yield await self._panel(session, int(layer[:4]) if layer.isdecimal() else 0, query.get("projection"))

    async def columns(self, request: gr.Request) -> list:
        """The columns that the page's address carries."""
        found = linked_columns(dict(request.query_params))
        return filled(*found) if found else [gr.skip()] * (2 + MOST * len(COLUMN))

    async def switch(self, name: str, session: Session, progress=gr.Progress()) -> AsyncIterator[list]:  # noqa: B008
        failure = await self.handlers.switch(name, progress)
        session.model = ""
        yield self._described(session, {}, failure)
        yield await self._panel(session)

    async def _panel(self, session: Session, layer: int = 0, projection: str | None = None) -> list:
        """The panel alone, once the weights are there."""
        shown = await self.handlers.choose(layer, projection, session)
        return [*[gr.skip()] * (len(self.parts) - len(shown)), *shown]

    def _described(
        self, session: Session, given: dict, failure: str = "", known: dict | None = None, query: dict | None = None
    ) -> list:
        """In the order of `parts`; the prompt stays unless one is given, and so do settings that are `known`."""
        with told():
            playground, name = self.handlers.playground, self.handlers.shelf.name
        self.handlers.know(session, playground)
        info = playground.info
        settings, known = setting_updates(playground, given), known or {}
        count, talk = linked_draws(query or {}), linked_talk(query or {})
        session.chat, *said = talk or ([], gr.skip(), gr.skip())
        same = all(settings[name] == known.get(name) for name in FOLDED)
        return [
            given.get("prompt", gr.skip()),
            *(gr.skip() if settings[name] == known.get(name) else settings[name] for name in NAMES),
            gr.skip() if same else named_filters(*(settings[name]["value"] for name in FOLDED)),
            defaults_note(info),
            Masthead.show(info),
            gr.update(value=name),
            gr.update(value=failure, visible=bool(failure)),
            gr.skip() if count is None else count,
            gr.update(visible=playground.template is not None),
            {"turns": session.chat},
            *said,
            gr.update(choices=layer_choices(info), value=0),
            *[gr.skip()] * 3,
        ]


def setting_updates(playground: Playground, given: dict) -> dict[str, dict]:
    """What makes each control show the model's own value, or the one given."""
    info = playground.info
    values = info.defaults | {"max_new_tokens": playground.default_tokens, **dict.fromkeys(SWITCHES, False)} | given
    values["sampler"] = str(values["sampler"])
    updates = {name: gr.update(value=values[name]) for name in NAMES}
    updates["max_new_tokens"]["maximum"] = info.context
    updates["skip_thinking"]["visible"] = playground.knows_thinking
    return updates


def layer_choices(info: ModelInfo) -> list[tuple[str, int]]:
    return [(f"Layer {i}", i) for i in range(info.layers)]


def build_page(shelf: Shelf) -> gr.Blocks:
    handlers, playground = Handlers(shelf), shelf.current
    with gr.Blocks(title="FP8 Playground") as page:
        handlers.page = page
        add_endpoints(handlers)  # first: names are given in order, and the page's own events don't need one
        session = gr.State(Session())
        head = Head.build(shelf, playground.info)
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="main", min_width=300):
                prompt, chips, opened = prompt_part()
                with gr.Row(elem_id="settings"):
                    controls = settings_bar(playground, last_seed, session)
                    buttons, comparing = RunButtons.build(), RunButtons.build("-compare")
                generate, compare, lab = generate_tab(handlers), compare_tab(handlers), lab_tab()
                chat = chat_tab(playground, handlers.book.explain)
            with gr.Column(elem_id="aside", min_width=300):
                Inspector(elem_id="inspector")
                with gr.Column(elem_id="panel"):
                    panel = Panel.build(playground.info)
        panel.connect(handlers, session)
        parsed = controls.by_name["parse_special"]
        opened.expand(handlers.prompt_tokens, [prompt, parsed], [chips], **QUICK)
        writer, limits = GenerateHandlers(handlers), [controls.by_name[n] for n in ("max_new_tokens", "past_end")]
        shown = connect_generate(generate, buttons, writer, prompt, controls, panel.strip, session)
        for column in compare.columns:  # their branches grow in the other tab
            column.text.select(None, js=OPEN_GENERATE)
            column.text.select(writer.branch_column, [session, *limits], shown, api_visibility="private", **WRITING)
        connect_lab(lab, handlers, prompt, controls, session)
        connect_compare(compare, comparing, CompareHandlers(handlers), prompt, *limits, generate.paper, session)
        connect_chat(chat, handlers, controls, panel.strip, session)
        for button in (buttons.stop, comparing.stop, chat.stop, lab.stop, lab.stop_measuring):
            button.click(stop, [session], None, api_visibility="private", show_progress="hidden", queue=False)
        for tab in (generate.tab, compare.tab, lab.tab, chat.tab):  # page.css hides what a tab has no use for
            tab.select(None, js=f"() => window.showTab('{tab.id}')")
        for tab in (generate.tab, compare.tab, chat.tab):
            tab.select(leave_lab, [session], None, **QUICK)
        page.load(None, js=SCRIPT)
        arrivals = Arrivals(handlers, head, controls, panel, chat, lab, prompt)
        _connect_model(handlers, head, arrivals, session)
        columns = [control for column in compare.columns for control in column.settings]
        page.load(arrivals.columns, None, [compare.count, compare.shared, *columns], **QUICK)
    describe_once(page)
    return page


def prompt_part() -> tuple[gr.Textbox, TokenChips, gr.Accordion]:
    with gr.Column(elem_id="prompt-part"):
        prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=1, max_lines=6, elem_id="prompt")
        with gr.Row(elem_id="under-prompt"):
            gr.Examples([[e] for e in EXAMPLES], inputs=[prompt], label="Examples", api_visibility="private")
            with gr.Accordion("Tokens", open=False, elem_id="prompt-tokens", elem_classes="badge") as opened:
                chips = TokenChips(elem_id="chips")
    return prompt, chips, opened


def last_seed(session: Session) -> int:
    with told():
        if session.seed is None:
            raise RequestError("No run has drawn a seed yet; press Run first.")
    return session.seed


def leave_lab(session: Session) -> None:
    """To another tab, where an experiment under way would stand in the way of a run."""
    session.lab_asked = None
    if session.experimenting:
        stop(session)


def _connect_model(handlers: Handlers, head: Head, arrivals: Arrivals, session: gr.State) -> None:
    page_events = {"api_visibility": "private", "concurrency_limit": None}
    arrivals.handlers.page.load(arrivals.arrive, [session], arrivals.parts, show_progress="hidden", **page_events)
    head.model.select(
        arrivals.switch, [head.model, session], arrivals.parts, show_progress_on=[head.heading], **page_events
    )

    async def look(shown: str):
        text = state_in_words(handlers.shelf.client.state)
        return gr.skip() if text == shown else gr.update(value=text, visible=bool(text))

    gr.Timer(STATE_SECONDS).tick(look, [head.state], [head.state], **QUICK)
    handlers.page.load(look, [head.state], [head.state], **QUICK)
