"""The generate tab: a text and its figures, the branches that grow out of it, links and receipts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import gradio as gr

from playground import RequestError
from playground.engine.requests import Load
from playground.engine.settings import whole_number
from playground.inspect.example import example_view
from playground.inspect.receipt import Receipt, fingerprint, read_receipts
from playground.inspect.replay import STOPPED
from playground.inspect.retold import Retold
from playground.inspect.run import Run
from playground.ui.components import BranchTree, StatsBar, TextView
from playground.ui.handlers import Handlers, asked_for
from playground.ui.painting import next_of
from playground.ui.session import Session, refuse_during_a_run, run_of, stop, told
from playground.ui.settings import NAMES, QUICK, Asked, Controls, LinkButton, link_to, own_settings
from playground.ui.words import in_words

SAVE = """
(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "receipt.json";
  link.click();
  URL.revokeObjectURL(link.href);
}
"""
WRITING = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "multiple"}
"""Of events that write for as long as the model does."""


class GenerateHandlers:
    """Writers yield the text so far, the figures, the panel's strip, and the tree of branches."""

    def __init__(self, handlers: Handlers):
        self.handlers, self.book = handlers, handlers.book

    async def generate(self, request: gr.Request, session: Session, prompt, *values) -> AsyncIterator[tuple]:
        async with run_of(session):
            asked = Asked.read(values)
            session.seed = asked.params.seed
            (run,) = await self.handlers.begin(request, session, prompt, [asked.params], asked)
            session.tree = []
            async for shown in self.write(session, run, request):
                yield shown

    async def branch(self, event: gr.EventData, request: gr.Request, session: Session, *values) -> AsyncIterator[tuple]:
        """Goes on from a token of the text with another one in its place, or draws again from there."""
        async with run_of(session):
            run = self._branch(request, session, *self._chosen(event), Asked.read(values), values)
            async for shown in self.write(session, run, request):
                yield shown

    async def branch_column(
        self, event: gr.EventData, request: gr.Request, session: Session, limit, past_end
    ) -> AsyncIterator[tuple]:
        """Goes on from a token of a compared column, under the column's own settings: a tree of its own."""
        async with run_of(session):
            source, at, token = self._chosen(event)
            asked = Asked(source.params, whole_number("Max new tokens", limit), bool(past_end))
            run = self._branch(request, session, source, at, token, asked)
            session.tree = [source]
            async for shown in self.write(session, run, request):
                yield shown

    async def go_on(self, request: gr.Request, session: Session, *values) -> AsyncIterator[tuple]:
        """More of the text that is shown."""
        async with run_of(session):
            source, asked = session.current, Asked.read(values)
            if source is None or not source.tokens:
                raise RequestError("There is no text to continue yet; press Run first.")
            if source.stats and source.stats["finish_reason"] == "eos" and not asked.past_end:
                raise RequestError("The text has come to its end; tick “Write past the end” to continue it.")
            run = self._branch(request, session, source, len(source.tokens), None, asked, values)
            async for shown in self.write(session, run, request):
                yield shown

    def _chosen(self, event: gr.EventData) -> tuple[Run, int, int | None]:
        """The run, the place in it and the token there, None to draw again, that a view's script names."""
        asked = asked_for(event)
        run, token = self.book.get(asked.get("run")), asked.get("token")
        return run, whole_number("Index", asked.get("index")), None if token is None else whole_number("Token", token)

    def _branch(self, request, session: Session, source: Run, at: int, token: int | None, asked: Asked, values=()):
        """`values`: the settings that the page shows; without, those of the source."""
        given = dict(zip(NAMES, values, strict=False)).get("seed", -1)
        goes_on = token is not None or at == len(source.tokens)
        if goes_on and whole_number("Seed", given) < 0:  # the same luck, unless a seed is asked for
            asked = asked.with_seed(source.params.seed)
        elif not values:  # drawn again under the source's settings: with luck of its own
            asked = asked.with_new_seed()
        session.seed = asked.params.seed
        playground = self.handlers.playground
        options = self.handlers.options(request, session, playground, traced=True)
        return self.book.branch(playground, source, at, token, asked.params, asked.limit, asked.past_end, **options)

    async def write(self, session: Session, run: Run, request: gr.Request | None) -> AsyncIterator[tuple]:
        """Shows a run of the page's tree while it writes."""
        session.tree, session.scales, session.looked = [*session.tree, run], None, None
        session.current = session.newest = run
        tree = BranchTree.show(session.tree, run)
        async for (pane,) in self.handlers.paint(session, [run], request):
            yield TextView.show(run), dict(pane.stats), self.handlers.activation_view(session), tree

    async def show(self, event: gr.EventData, session: Session) -> tuple:
        """Another run of the tree."""
        with told():
            await refuse_during_a_run(session)
            run = session.current = session.newest = self.book.get(asked_for(event).get("run"))
        return TextView.show(run), run.stats, BranchTree.show(session.tree, run)

    async def link(self, session: Session, prompt, *values) -> str:
        """The query of an address that writes the text that is shown again, its seed included: of the tree's first
        run, from which branches grew by hand. Before any run: of the settings as they are."""
        run, given = session.current, dict(zip(NAMES, values, strict=True))
        given |= {"prompt": prompt}
        if run is not None:
            run = run.root
            given |= own_settings(run.params) | {"max_new_tokens": run.limit, "past_end": run.ignore_eos}
            given |= {"prompt": run.prompt, "parse_special": run.parse_special}
        return link_to("generate", **given, **panel_of(session))

    async def receipt(self, session: Session) -> str:
        """Of the run that is shown."""
        with told():
            await refuse_during_a_run(session)
            if session.current is None:
                raise RequestError("There is no run yet; press Run first.")
            return await asyncio.to_thread(self.book.receipt, self.handlers.playground, session.current)

    async def replay(self, file: bytes | None, session: Session) -> tuple:
        """Runs an uploaded receipt, or those of a comparison, again; says in words how it went, and shows what one
        wrote as a run of its own, to look into and to branch from."""
        try:
            async with run_of(session):
                receipts = read_receipts((file or b"").decode(errors="replace"))
                told_ = [Retold(one, self.handlers.playground.tokenizer) for one in receipts]
                try:
                    found = [await self.replayed(o, session, t.take) for o, t in zip(receipts, told_, strict=True)]
                finally:
                    stop(session)
        except gr.Error as error:
            return error.message, *[gr.skip()] * 3
        if len(found) > 1:
            lines = [f"Column {n}: {in_words(one)}" for n, one in enumerate(found, 1)]
            return "\n".join(lines), *[gr.skip()] * 3
        session.tree, playground = [self.book.keep(run) for run in told_[0].runs], self.handlers.playground
        run = session.current = session.newest = session.tree[-1]
        stats = run.stats and run.stats | {"run": run.id, "seed": run.params.seed, "context": playground.context}
        view = TextView.show(run) | {"title": "Replayed from a receipt."}
        return in_words(found[0]), view, stats, BranchTree.show(session.tree, run)

    async def replayed(self, receipt: Receipt, session: Session, take: Callable = lambda stream, event: None) -> dict:
        """One receipt, segment by segment; a stop in between counts as well. `take` gets what it writes."""
        playground = self.handlers.playground
        if receipt.weights not in playground.loaded_forms:
            await self.handlers.wait_for(session, playground.ask(Load(receipt.weights)))
        await asyncio.to_thread(fingerprint, playground.folder)  # which the end of a replay asks for
        replay = self.book.replay(playground, receipt, session.streams.append)
        event = None
        while True:
            try:
                stream = replay.send(event)
            except StopIteration as end:
                return end.value
            event = await next_of(stream)
            if event is not None:
                take(stream, event)
            if session.stopping:
                replay.close()
                raise RequestError(STOPPED)


def panel_of(session: Session) -> dict:
    """What the panel shows, for a link."""
    return {"layer": session.layer, "projection": session.projection} if session.projection else {}


class RunButtons(NamedTuple):
    """One place: Run, and while the model writes, Stop (see page.css)."""

    run: gr.Button
    stop: gr.Button

    @classmethod
    def build(cls, suffix: str = "") -> RunButtons:
        run = gr.Button("Run", variant="primary", elem_id=f"run{suffix}", min_width=90, scale=0)
        return cls(run, gr.Button("Stop", variant="stop", elem_id=f"stop{suffix}", min_width=90, scale=0))


class GenerateTab(NamedTuple):
    tab: gr.Tab
    output: TextView
    stats: StatsBar
    tree: BranchTree
    more: gr.Button
    link: LinkButton
    receipt: gr.Button
    replay: gr.UploadButton
    paper: gr.Textbox
    verdict: gr.Textbox


def generate_tab(handlers: Handlers) -> GenerateTab:
    with gr.Tab("Generate", id="generate") as tab:
        output = TextView("Output", handlers.explain, example_view(), branches=True, elem_id="output")
        with gr.Row(elem_id="foot"):
            stats = StatsBar(elem_id="stats")
            with gr.Row(elem_classes="actions"):
                more = gr.Button("Continue", size="sm", elem_id="continue")
                link = LinkButton.build("link")
                receipt = gr.Button("Save receipt", size="sm", elem_id="receipt")
                replay = gr.UploadButton(
                    "Replay a receipt", size="sm", type="binary", file_types=[".json"], elem_id="replay"
                )
        tree = BranchTree(elem_id="tree")
        paper = gr.Textbox(visible="hidden", elem_id="receipt-text")
        verdict = gr.Textbox(label="Replay", lines=1, max_lines=4, interactive=False, visible=False, elem_id="verdict")
    return GenerateTab(tab, output, stats, tree, more, link, receipt, replay, paper, verdict)


def connect_generate(
    tab: GenerateTab,
    buttons: RunButtons,
    writer: GenerateHandlers,
    prompt: gr.Textbox,
    controls: Controls,
    strip,
    session: gr.State,
) -> list:
    """Returns what every writer of this tab shows."""
    shown, writing = [tab.output, tab.stats, strip, tab.tree], WRITING | {"api_visibility": "private"}
    buttons.run.click(writer.generate, [session, prompt, *controls.inputs], shown, **writing)
    tab.output.select(writer.branch, [session, *controls.inputs], shown, **writing)
    tab.output.focus(writer.handlers.look_at, [session], [strip], **QUICK)
    tab.output.blur(writer.handlers.look_away, [session], [strip], **QUICK)
    tab.more.click(writer.go_on, [session, *controls.inputs], shown, **writing)
    tab.tree.select(writer.show, [session], [tab.output, tab.stats, tab.tree], **QUICK)
    tab.receipt.click(writer.receipt, [session], [tab.paper], **QUICK).success(None, [tab.paper], None, js=SAVE)
    tab.replay.upload(lambda: gr.update(value="Running it again…", visible=True), None, [tab.verdict], **QUICK).then(
        writer.replay, [tab.replay, session], [tab.verdict, tab.output, tab.stats, tab.tree], **QUICK
    )
    tab.link.connect(writer.link, [session, prompt, *controls.inputs])
    return shown
