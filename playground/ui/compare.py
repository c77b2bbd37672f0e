"""The compare tab: one prompt, up to four settings, prefilled once and streaming together as rows of one batch. With
shared noise all columns meet the same luck, so that what differs between them is the setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import gradio as gr

from playground import RequestError
from playground.engine.requests import whole_number
from playground.inspect.columns import FORMS, MOST, NAMES, PLAIN, read_columns
from playground.inspect.fork import Alignment
from playground.ui.components import ForkView, StatsBar, TextView
from playground.ui.controls import Number, Radio, Slider
from playground.ui.handlers import Handlers
from playground.ui.painting import Pane
from playground.ui.session import Session, refuse_during_a_run, run_of, told

SAMPLERS = [("Greedy", "greedy"), ("Multinomial", "multinomial"), ("Gumbel-max", "gumbel")]
PRESETS = {  # columns, and whether they share their noise
    "Three samplers": ([{"sampler": s} for s in ("greedy", "multinomial", "gumbel")], True),
    "Temperature ladder on one noise": ([{"temperature": t} for t in (0.3, 0.7, 1.0, 1.4)], True),
    "Filters on one noise": ([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}], True),
    "FP8 against BF16 weights": ([{"weights": "fp8"}, {"weights": "bf16"}], True),
    "Same setting, four seeds": ([{"seed": s} for s in (1, 2, 3, 4)], False),
}
WEIGHTS = [(name.capitalize() if form == "" else name, form) for form, name in FORMS.items()]
ABOUT_WEIGHTS = "BF16 quantises nothing; weights stored in FP8 are restored for it"
FIRST = next(iter(PRESETS))


class Column(NamedTuple):
    block: gr.Column
    settings: list
    text: TextView
    stats: StatsBar


def aligned(found: Alignment) -> tuple[dict, list[dict], dict | None]:
    """What all share, once; each run's own tokens after that; and why they part."""
    runs, shared = found.runs, found.shared
    own = [TextView.show_piece(run, shared, None, prompt=False, fork=found.fork is not None) for run in runs]
    same = found.fork is None and all(run.stats and len(run.tokens) == shared for run in runs)
    fork = {"note": f"All columns wrote the same {shared} tokens."} if same else found.fork
    return TextView.show_piece(runs[0], 0, shared, prompt=True, fork=False), own, fork


class CompareHandlers:
    def __init__(self, handlers: Handlers):
        self.handlers = handlers

    def write(self, prompt, settings: list[dict], shared_noise, max_new_tokens, past_end, session: Session) -> Iterator[
        tuple[Alignment, list[Pane]]
    ]:  # fmt: skip
        """All columns at every paint."""
        with run_of(session):
            params, forms = read_columns(settings, bool(shared_noise))
            session.seed = params[0].seed
            runs = self.handlers.begin(prompt, params, max_new_tokens, past_end, False, forms)
            session.columns, found = runs, Alignment(runs)
            for panes in self.handlers.paint(session, runs):
                found.update()
                yield found, panes

    def receipts(self, session: Session) -> str:
        """Of all columns, as one JSON list."""
        with told():
            refuse_during_a_run(session)
            if not session.columns:
                raise RequestError("There is no comparison yet; press Run first.")
            return self.handlers.book.receipt(self.handlers.playground, *session.columns)

    def compare(self, prompt, max_new_tokens, past_end, count, shared_noise, *rest) -> Iterator[tuple]:
        """Yields the shared text, the fork, and text and figures of each column."""
        *values, session = rest
        with told():
            count = whole_number("Columns", count)
            if not 2 <= count <= MOST:
                raise RequestError(f"Columns is {count}; use a number from 2 to {MOST}.")
        settings = [
            dict(zip(NAMES, values[c * len(NAMES) : (c + 1) * len(NAMES)], strict=True)) for c in range(MOST)
        ]  # fmt: skip
        with told():
            ready, asked = {"", *self.handlers.playground.loaded_forms}, [s["weights"] for s in settings[:count]]
        if missing := [name for form, name in FORMS.items() if form in asked and form not in ready]:
            yield None, {"note": f"Loading the {missing[0]} weights; they stay at hand."}, *[None] * (2 * MOST)
        for found, panes in self.write(prompt, settings[:count], shared_noise, max_new_tokens, past_end, session):
            common, own, fork = aligned(found)
            columns = [value for view, pane in zip(own, panes, strict=True) for value in (view, pane.stats)]
            yield common, fork, *columns, *[None] * (2 * (MOST - count))


class CompareTab(NamedTuple):
    tab: gr.Tab
    run: gr.Button
    stop: gr.Button
    save: gr.Button
    count: Radio
    shared: gr.Checkbox
    common: TextView
    fork: ForkView
    columns: list[Column]


def compare_tab(handlers: Handlers) -> CompareTab:
    with gr.Tab("Compare", id="compare") as tab:
        with gr.Row():
            preset = gr.Dropdown(list(PRESETS), value=FIRST, label="Preset", elem_id="preset", min_width=200)
            count = Radio([2, 3, 4], value=3, label="Columns", elem_id="columns", min_width=120)
            shared = gr.Checkbox(
                True, label="Shared noise", info="All columns meet the same luck", elem_id="shared-noise"
            )
        with gr.Row(elem_classes="run-row"):
            run = gr.Button("Run", variant="primary", elem_id="run-compare")
            stop = gr.Button("Stop", variant="secondary", elem_id="stop-compare")
            save = gr.Button("Save receipts", elem_id="save-compare")
        common = TextView("What all columns share", handlers.book.explain, elem_id="output-common")
        fork = ForkView(elem_id="fork")
        with gr.Row(elem_id="compare-columns"):
            columns = [_column(number, handlers) for number in range(MOST)]
    everything = [control for column in columns for control in column.settings]
    quick = {"api_visibility": "private", "show_progress": "hidden"}
    blocks = [column.block for column in columns]
    count.change(lambda n: [gr.update(visible=i < int(n)) for i in range(MOST)], [count], blocks, **quick)

    def choose(name: str) -> list:
        settings, shares = PRESETS[name]
        rows = [PLAIN | (settings[i] if i < len(settings) else {}) for i in range(MOST)]
        return [len(settings), shares, *(row[n] for row in rows for n in NAMES)]

    preset.input(choose, [preset], [count, shared, *everything], **quick)
    return CompareTab(tab, run, stop, save, count, shared, common, fork, columns)


def _column(number: int, handlers: Handlers) -> Column:
    first = PRESETS[FIRST][0]
    given = PLAIN | (first[number] if number < len(first) else {})
    with gr.Column(min_width=190, visible=number < len(first)) as block:
        with gr.Accordion(f"Column {number + 1}", open=True):
            settings = [
                gr.Dropdown(SAMPLERS, value=given["sampler"], label="Sampler", elem_id=f"sampler-{number}"),
                Slider(
                    0, 2, value=given["temperature"], step=0.05, label="Temperature", elem_id=f"temperature-{number}"
                ),
            ]
            with gr.Accordion("Filters, seed and weights", open=False):
                settings += [
                    Slider(0, 200, value=given["top_k"], step=1, label="Top-k"),
                    Slider(0.05, 1, value=given["top_p"], step=0.01, label="Top-p"),
                    Slider(0, 0.5, value=given["min_p"], step=0.01, label="Min-p"),
                    Number(given["seed"], label="Seed", precision=0, elem_id=f"seed-{number}"),
                    gr.Dropdown(WEIGHTS, value="", label="Weights", info=ABOUT_WEIGHTS, elem_id=f"weights-{number}"),
                ]
        text = TextView(f"Column {number + 1}", handlers.book.explain, branches=True, elem_id=f"output-{number}")
        stats = StatsBar(elem_id=f"stats-{number}")
    return Column(block, settings, text, stats)


def connect_compare(
    compare: CompareTab, handlers: Handlers, prompt, tokens, past_end, session: gr.State
) -> CompareHandlers:
    settings = [control for column in compare.columns for control in column.settings]
    views = [view for column in compare.columns for view in (column.text, column.stats)]
    writer = CompareHandlers(handlers)
    compare.run.click(
        writer.compare,
        [prompt, tokens, past_end, compare.count, compare.shared, *settings, session],
        [compare.common, compare.fork, *views],
        api_visibility="private",
        show_progress="hidden",
        concurrency_limit=4,
        trigger_mode="multiple",
    )
    return writer
