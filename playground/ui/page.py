"""The layout: prompt and output in the middle, settings beside them, the scales panel always in reach."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from playground import Playground
from playground.shelf import Shelf
from playground.ui import components
from playground.ui.chat import chat_tab, connect_chat
from playground.ui.compare import compare_tab, connect_compare
from playground.ui.components import BranchTree, Heatmap, StatsBar, TextView
from playground.ui.controls import Number, Radio, Slider
from playground.ui.endpoints import add_endpoints
from playground.ui.handlers import LINKED, Handlers
from playground.ui.lab import connect_lab, lab_tab
from playground.ui.session import Session, stop
from playground.ui.words import defaults_note, title

CSS = components.CSS + (Path(__file__).parent / "page.css").read_text()
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(body_text_color_subdued="*neutral_500")  # gradio's own is too pale to read on white
SUBMIT_KEY = """
() => document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#prompt")) {
    const visible = (id) => { const b = document.getElementById(id); return b && b.offsetParent ? b : null; };
    (visible("run") || visible("run-compare"))?.click();
  }
})
"""
SAVE = """
(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "receipt.json";
  link.click();
  URL.revokeObjectURL(link.href);
}
"""
COPY_LINK = """
(...values) => {
  const names = NAMES;
  const url = new URL(location.pathname, location.origin);
  names.forEach((name, index) => url.searchParams.set(name, values[index]));
  navigator.clipboard?.writeText(url.href);
  document.getElementById("link").textContent = "Link copied";
  setTimeout(() => { document.getElementById("link").textContent = "Copy link"; }, 1500);
}
""".replace("NAMES", json.dumps(list(LINKED)))
OPEN_GENERATE = """
() => [...document.querySelectorAll("[role=tab]")].find((tab) => tab.textContent.trim() === "Generate").click()
"""
EXAMPLES = [
    "Once upon a time",
    "One day, a little girl named Lily found a",
    "The fox looked at the old clock and said,",
    "Tom and his grandmother went to the sea. There",
]
OWN = "single"  # settings that the columns of a comparison have of their own
GREEDY_INFO = "Greedy takes the likeliest token: temperature, filters and seed have nothing to decide."
SAMPLER_INFO = "How a token is drawn from the model's probabilities."


def build_page(shelf: Shelf) -> gr.Blocks:
    handlers = Handlers(shelf)
    with gr.Blocks(title="FP8 Playground") as page:
        add_endpoints(handlers)  # first: names are given in order, and the page's own events don't need one
        session = gr.State(Session())
        with gr.Row():
            with gr.Column(scale=5, min_width=330):
                heading = gr.Markdown(title(shelf.current), elem_id="title")
            with gr.Column(scale=2, min_width=240, visible=len(shelf.names) > 1):
                model = gr.Dropdown(shelf.labels, value=shelf.name, label="Model", elem_id="model")
                failure = gr.Textbox(visible=False, label="Not loaded", interactive=False, elem_id="failure")
        with gr.Row():
            with gr.Column(scale=6, min_width=330):
                with gr.Column(elem_id="prompt-part"):
                    prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=2, max_lines=8, elem_id="prompt")
                    gr.Examples([[e] for e in EXAMPLES], inputs=[prompt], label="Examples", api_visibility="private")
                with gr.Tab("Generate", id="generate") as generate_tab:
                    run, stop_generate = _run_row("")
                    output = TextView("Output", handlers.book.explain, branches=True, elem_id="output")
                    stats = StatsBar(elem_id="stats")
                    tree = BranchTree(elem_id="tree")
                    with gr.Row(elem_classes="run-row"):
                        more = gr.Button("Continue", size="sm", elem_id="continue")
                        link = gr.Button("Copy link", size="sm", elem_id="link")
                        receipt = gr.Button("Save receipt", size="sm", elem_id="receipt")
                        replay = gr.UploadButton(
                            "Replay a receipt", size="sm", type="binary", file_types=[".json"], elem_id="replay"
                        )
                    paper = gr.Textbox(visible="hidden", elem_id="receipt-text")
                    verdict = gr.Textbox(
                        label="Replay", lines=1, max_lines=4, interactive=False, visible=False, elem_id="verdict"
                    )
                compare = compare_tab(handlers)
                lab = lab_tab()
                chat = chat_tab(shelf.current, handlers.book.explain)
            with gr.Column(scale=3, min_width=260, elem_id="settings"):
                settings, note = _settings(shelf.current, session)
            with gr.Column(scale=4, min_width=300, elem_id="panel"):
                layer, projection, weights, strip = _panel(handlers, session)
        writing = {"show_progress": "hidden", "concurrency_limit": 8, "trigger_mode": "multiple"}
        writing["api_visibility"] = "private"
        shown = [output, stats, strip, tree]
        run.click(handlers.generate, [prompt, *settings, session], shown, **writing)
        output.select(handlers.branch, [*settings, session], shown, **writing)
        more.click(handlers.go_on, [*settings, session], shown, **writing)
        quick = {"api_visibility": "private", "show_progress": "hidden"}
        tree.select(handlers.show, [session], [output, stats, tree], **quick)
        receipt.click(handlers.receipt, [session], [paper], **quick).success(None, [paper], None, js=SAVE)
        replay.upload(lambda: gr.update(value="Running it again…", visible=True), None, [verdict], **quick).then(
            handlers.replay, [replay, session], [verdict], **quick
        )
        for column in compare.columns:  # their branches grow in the other tab
            column.text.select(None, js=OPEN_GENERATE)
            column.text.select(handlers.branch_column, [settings[2], settings[-1], session], shown, **writing)
        connect_lab(lab, handlers, prompt, settings, session)
        columns = connect_compare(compare, handlers, prompt, settings[2], settings[-1], session)
        compare.save.click(columns.receipts, [session], [paper], **quick).success(None, [paper], None, js=SAVE)
        connect_chat(chat, handlers, settings, strip, session)
        for button in (stop_generate, compare.stop, chat.stop):
            button.click(stop, [session], None, api_visibility="private", show_progress="hidden", queue=False)
        for tab in (generate_tab, compare.tab, lab.tab, chat.tab):  # page.css hides what a tab has no use for
            tab.select(None, js=f"() => {{ document.body.dataset.tab = '{tab.id}'; }}")
        page.load(None, js=SUBMIT_KEY)
        link.click(None, [prompt, *settings], None, js=COPY_LINK)
        page.load(handlers.follow_link, None, [prompt, *settings], **quick)
        if len(shelf.names) > 1:
            _, temperature, tokens, _, top_k, top_p, min_p, _ = settings
            parts = [
                model,
                failure,
                heading,
                tokens,
                temperature,
                top_k,
                top_p,
                min_p,
                note,
            ]  # in the order of `describe`
            parts += [layer, projection, weights, strip, chat.tab, chat.talk]
            model.select(handlers.switch, [model, session], parts, api_visibility="private", show_progress_on=[heading])
            # whoever opens the page later finds the model that is loaded then
            page.load(handlers.describe, [session], parts, api_visibility="private", show_progress="hidden")
    return page


def _run_row(suffix: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row(elem_classes="run-row"):
        return (
            gr.Button("Run", variant="primary", elem_id=f"run{suffix}"),
            gr.Button("Stop", variant="secondary", elem_id=f"stop{suffix}"),
        )


def _settings(playground: Playground, session: gr.State) -> tuple[list, gr.Markdown]:
    """Sampler first, then the rest in the order of the `/generate` API; and where their defaults come from."""
    defaults = playground.defaults
    samplers = [("Greedy", "greedy"), ("Multinomial", "multinomial"), ("Gumbel-max", "gumbel")]
    sampler = Radio(samplers, value="gumbel", label="Sampler", info=SAMPLER_INFO, elem_id="sampler", elem_classes=OWN)
    temperature = Slider(
        0,
        2,
        value=defaults.temperature,
        step=0.05,
        label="Temperature",
        info="0 is greedy",
        elem_id="temperature",
        elem_classes=OWN,
    )
    tokens = Slider(
        1, playground.context, value=playground.default_tokens, step=1, label="Max new tokens", elem_id="max-new-tokens"
    )
    seed = Number(
        -1, label="Seed", precision=0, info="-1 draws one; the footer shows it", elem_id="seed", elem_classes=OWN
    )
    reuse = gr.Button("Reuse the last seed", size="sm", elem_id="reuse", elem_classes=OWN)
    reuse.click(
        lambda session: gr.skip() if session.seed is None else session.seed,
        [session],
        [seed],
        api_visibility="private",
        show_progress="hidden",
    )
    with gr.Accordion("Filters", open=False, elem_classes=OWN):
        top_k = Slider(0, 200, value=defaults.top_k, step=1, label="Top-k", info="0 keeps all")
        top_p = Slider(0.05, 1, value=defaults.top_p, step=0.01, label="Top-p", info="1 keeps all")
        min_p = Slider(0, 0.5, value=defaults.min_p, step=0.01, label="Min-p", info="0 keeps all")
    note = gr.Markdown(defaults_note(playground), elem_id="defaults")
    past_end = gr.Checkbox(False, label="Write past the end", elem_id="past-end")

    def explain(chosen: str) -> list:
        greedy = chosen == "greedy"
        changed = gr.update(interactive=not greedy)
        return [gr.update(info=GREEDY_INFO if greedy else SAMPLER_INFO)] + [changed] * 5

    sampler.change(
        explain,
        [sampler],
        [sampler, temperature, seed, top_k, top_p, min_p],
        api_visibility="private",
        show_progress="hidden",
    )
    return [sampler, temperature, tokens, seed, top_k, top_p, min_p, past_end], note


def _panel(handlers: Handlers, session: gr.State) -> tuple[gr.Dropdown, gr.Dropdown, Heatmap, Heatmap]:
    """The scales: what to look at, the weight's picture, and the strip that a run keeps up to date."""
    gr.Markdown("### Scales")
    layers = [(f"Layer {i}", i) for i in range(handlers.playground.config.num_hidden_layers)]
    names = handlers.layer_names(0)
    first = names[0] if names else None
    layer = gr.Dropdown(layers, value=0, label="Layer", elem_id="layer")
    projection = gr.Dropdown(names, value=first, label="Projection", elem_id="projection")
    weights = Heatmap(handlers.weight_view(0, first), elem_id="weight-scales")
    strip = Heatmap(Heatmap.empty("Activation scales of the newest token", "They appear here while the model writes."))
    strip.elem_id = "activation-scales"
    for event in (layer.input, projection.input):
        event(
            handlers.choose,
            [layer, projection, session],
            [projection, weights, strip],
            api_visibility="private",
            show_progress="hidden",
        )
    return layer, projection, weights, strip
