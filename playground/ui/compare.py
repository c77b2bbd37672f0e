"""The compare tab: one prompt, up to four settings, prefilled once and streaming together as rows of one batch. With
shared noise all columns meet the same luck, so that what differs between them is the setting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import gradio as gr

from playground import RequestError
from playground.engine.settings import FOLDED, SETTINGS, whole_number
from playground.inspect.columns import FORMS, MOST, NAMES, PLAIN, read_columns, titles
from playground.inspect.fork import Alignment
from playground.ui.components import Figures, ForkView, TextView
from playground.ui.controls import Radio
from playground.ui.generate import SAVE, WRITING, RunButtons
from playground.ui.handlers import Handlers
from playground.ui.painting import Pane
from playground.ui.session import Session, refuse_during_a_run, run_of, told
from playground.ui.settings import DECIDED, QUICK, Asked, LinkButton, control, link_to, own_settings, rest_with_greedy

PRESETS = {  # columns, and whether they share their noise
    "Three samplers": ([{"sampler": s} for s in ("greedy", "multinomial", "gumbel")], True),
    "Temperature ladder on one noise": ([{"temperature": t} for t in (0.3, 0.7, 1.0, 1.4)], True),
    "Filters on one noise": ([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}], True),
    "FP8 against BF16 weights": ([{"weights": "fp8"}, {"weights": "bf16"}], True),
    "Same setting, four seeds": ([{"seed": s} for s in (1, 2, 3, 4)], False),
}
WEIGHTS = [(name.capitalize() if form == "" else name, form) for form, name in FORMS.items()]
ABOUT_NOISE = (
    "Gumbel-max columns meet the same noise per token; a multinomial draw uses one uniform number, and can differ from "
    "them where probabilities are equal."
)
ABOUT_WEIGHTS = "BF16 quantises nothing; weights stored in FP8 are restored for it"
FIRST = next(iter(PRESETS))
ASIDE = (*FOLDED, "seed")


class Column(NamedTuple):
    block: gr.Column
    settings: list
    text: TextView


def aligned(found: Alignment) -> tuple[dict, list[dict], dict | None]:
    """What all share, once; each run's own tokens after that; and why they part."""
    runs, shared = found.runs, found.shared
    forked, named = found.fork is not None, [{"title": title} for title in titles(runs)]
    own = [TextView.show_piece(run, shared, None, prompt=False, fork=forked) for run in runs]
    if found.note and all(len(run.tokens) == shared for run in runs):  # shown in each, not as empty boxes
        own = [TextView.show(run, prompt=False) for run in runs]
    fork = {"note": found.note} if found.note else found.fork
    common = TextView.show_piece(runs[0], 0, shared, prompt=True, fork=False)
    return common | {"title": f"All {len(runs)} wrote"}, [o | n for o, n in zip(own, named, strict=True)], fork


def columns_of(values: Sequence) -> list[dict]:
    """The settings of all columns, from the values of their controls."""
    size = len(NAMES)
    return [dict(zip(NAMES, values[c * size : (c + 1) * size], strict=True)) for c in range(MOST)]


def linked_columns(query: dict[str, str]) -> tuple[list[dict], bool] | None:
    """The columns that an address carries, and whether they share their noise; None where it carries none, or wrong
    ones."""
    try:
        settings = json.loads(query["columns"])
        read_columns(settings, False)
    except (KeyError, ValueError, RecursionError):
        return None
    return [PLAIN | setting for setting in settings], query.get("shared_noise") == "true"


class CompareHandlers:
    def __init__(self, handlers: Handlers):
        self.handlers = handlers

    async def write(
        self, request, session: Session, prompt, settings: list[dict], shared_noise, max_new_tokens, past_end
    ) -> AsyncIterator[tuple[Alignment, list[Pane]]]:
        """All columns at every paint."""
        async with run_of(session):
            params, forms = read_columns(settings, bool(shared_noise))
            session.seed = params[0].seed
            asked = Asked(params[0], whole_number("Max new tokens", max_new_tokens), bool(past_end))
            runs = await self.handlers.begin(request, session, prompt, params, asked, forms, traced=False)
            session.columns, found = runs, Alignment(runs)
            async for panes in self.handlers.paint(session, runs, request):
                found.update()
                yield found, panes

    async def receipts(self, session: Session) -> str:
        """Of all columns, as one JSON list."""
        with told():
            await refuse_during_a_run(session)
            if not session.columns:
                raise RequestError("There is no comparison yet; press Run first.")
            return await asyncio.to_thread(self.handlers.book.receipt, self.handlers.playground, *session.columns)

    async def link(self, session: Session, prompt, max_new_tokens, past_end, count, shared_noise, *values) -> str:
        """The query of an address that writes the comparison that is shown again, or, before any, of the columns."""
        with told():
            settings = columns_of(values)[: whole_number("Columns", count)]
            runs = session.columns
            if runs:
                prompt, max_new_tokens, past_end = runs[0].prompt, runs[0].limit, runs[0].ignore_eos
                forms = [run.form if len({r.form for r in runs}) > 1 else "" for run in runs]
                settings = [own_settings(r.params) | {"weights": f} for r, f in zip(runs, forms, strict=True)]
            told_apart = [{n: v for n, v in setting.items() if v != PLAIN[n] or n == "seed"} for setting in settings]
            about = {"max_new_tokens": max_new_tokens, "past_end": bool(past_end), "shared_noise": bool(shared_noise)}
            return link_to("compare", prompt=prompt, **about, columns=json.dumps(told_apart, separators=(",", ":")))

    async def compare(
        self, request: gr.Request, session: Session, prompt, max_new_tokens, past_end, count, shared_noise, *values
    ) -> AsyncIterator[tuple]:
        """Yields the shared text, the fork, the figures, and the text of each column."""
        with told():
            count = whole_number("Columns", count)
            if not 2 <= count <= MOST:
                raise RequestError(f"Columns is {count}; use a number from 2 to {MOST}.")
            ready = {"", *self.handlers.playground.loaded_forms}
        settings = columns_of(values)
        asked = [setting["weights"] for setting in settings[:count]]
        if missing := [name for form, name in FORMS.items() if form in asked and form not in ready]:
            yield None, {"note": f"Loading the {missing[0]} weights; they stay at hand."}, *[None] * (1 + MOST)
        writing = self.write(request, session, prompt, settings[:count], shared_noise, max_new_tokens, past_end)
        async for found, panes in writing:
            common, own, fork = aligned(found)
            names = titles(found.runs)
            figures = [{"label": name, "stats": dict(pane.stats)} for name, pane in zip(names, panes, strict=True)]
            yield common, fork, figures, *own, *[None] * (MOST - count)


class CompareTab(NamedTuple):
    tab: gr.Tab
    link: LinkButton
    save: gr.Button
    count: Radio
    shared: gr.Checkbox
    common: TextView
    fork: ForkView
    figures: Figures
    columns: list[Column]


def filled(settings: list[dict], shares: bool) -> list:
    """Values of the controls: how many columns, whether they share noise, and each one's settings."""
    rows = [PLAIN | (settings[i] if i < len(settings) else {}) for i in range(MOST)]
    return [len(settings), shares, *(row[n] for row in rows for n in NAMES)]


def compare_tab(handlers: Handlers) -> CompareTab:
    with gr.Tab("Compare", id="compare") as tab:
        with gr.Row(elem_id="compare-bar"):
            preset = gr.Dropdown(list(PRESETS), value=FIRST, label="Preset", elem_id="preset", min_width=220)
            count = Radio([2, 3, 4], value=3, label="Columns", elem_id="columns-count", min_width=120)
            shared = gr.Checkbox(True, label="Shared noise", info=ABOUT_NOISE, elem_id="shared-noise", min_width=280)
        common = TextView("What all columns share", handlers.explain, elem_id="output-common")
        with gr.Row(elem_id="compare-columns"):
            columns = [_column(number, handlers) for number in range(MOST)]
        fork = ForkView(elem_id="fork")
        figures = Figures(elem_id="figures")
        with gr.Row(elem_classes="actions"):
            link = LinkButton.build("link-compare")
            save = gr.Button("Save receipts", size="sm", elem_id="save-compare")
    everything = [control for column in columns for control in column.settings]
    blocks = [column.block for column in columns]
    count.change(lambda n: [gr.update(visible=i < int(n)) for i in range(MOST)], [count], blocks, **QUICK)

    def choose(name: str) -> list:
        settings, shares = PRESETS[name]
        return filled(settings, shares)

    preset.input(choose, [preset], [count, shared, *everything], **QUICK)
    return CompareTab(tab, link, save, count, shared, common, fork, figures, columns)


def _column(number: int, handlers: Handlers) -> Column:
    first = PRESETS[FIRST][0]
    given = PLAIN | (first[number] if number < len(first) else {})
    with gr.Column(min_width=190, visible=number < len(first)) as block:
        made = {}
        with gr.Row(elem_classes="column-settings"):
            for name in SETTINGS:
                if name not in ASIDE:
                    made[name] = _control(number, name, given)
            with gr.Accordion("More", open=False, elem_classes="badge"):
                for name in ASIDE:
                    made[name] = _control(number, name, given)
                made["weights"] = gr.Dropdown(
                    WEIGHTS, value="", label="Weights", info=ABOUT_WEIGHTS, elem_id=f"weights-{number}"
                )
        rest_with_greedy(made)
        settings = [made[name] for name in NAMES]
        text = TextView(f"Column {number + 1}", handlers.explain, branches=True, elem_id=f"output-{number}")
    return Column(block, settings, text)


def _control(number: int, name: str, given: dict):
    place = {"elem_id": f"{name.replace('_', '-')}-{number}"}
    if name in DECIDED and given["sampler"] == "greedy":
        place["interactive"] = False
    return control(SETTINGS[name], str(given[name]) if SETTINGS[name].choices else given[name], False, **place)


def connect_compare(
    compare: CompareTab, buttons: RunButtons, writer: CompareHandlers, prompt, tokens, past_end, paper, session
) -> None:
    settings = [control for column in compare.columns for control in column.settings]
    texts = [column.text for column in compare.columns]
    given = [session, prompt, tokens, past_end, compare.count, compare.shared, *settings]
    buttons.run.click(
        writer.compare,
        given,
        [compare.common, compare.fork, compare.figures, *texts],
        api_visibility="private",
        **WRITING,
    )
    compare.link.connect(writer.link, given)
    compare.save.click(writer.receipts, [session], [paper], **QUICK).success(None, [paper], None, js=SAVE)
