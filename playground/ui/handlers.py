"""What the page's buttons do: plain generators over a `Playground`, without layout."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import gradio as gr

from playground import CheckpointError, Playground, RequestError, SamplingParams
from playground.checkpoint.chat import Message
from playground.engine.requests import MAX_SEED, Sampler, whole_number
from playground.inspect.receipt import Receipt, read_receipts
from playground.inspect.run import Run
from playground.inspect.scales import ScaleGrid, projections, weight_scales
from playground.shelf import Shelf
from playground.ui.components import BranchTree, Heatmap, TextView
from playground.ui.painting import Pane, paints
from playground.ui.runs import RunBook
from playground.ui.session import Session, refuse_during_a_run, run_of, stop, told
from playground.ui.words import defaults_note, in_words, title

ABSORBED = "Absorbed at decode: this projection is folded into the query and the output, no activation meets it."


def _sampler(text: str) -> str:
    return Sampler(text).value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or abs(value) > 1e6:
        raise ValueError(text)
    return value


def _whole(text: str) -> int:
    value = int(text)
    if not -1 <= value <= MAX_SEED:
        raise ValueError(text)
    return value


LINKED = {  # what an address can carry, in the order of the page's inputs
    "prompt": lambda text: text[:20_000],
    "sampler": _sampler,
    "temperature": _number,
    "max_new_tokens": _whole,
    "seed": _whole,
    "top_k": _whole,
    "top_p": _number,
    "min_p": _number,
    "past_end": lambda text: text == "true",
}


class Handlers:
    def __init__(self, shelf: Shelf):
        self.shelf, self.book = shelf, RunBook()

    @property
    def playground(self) -> Playground:
        return self.shelf.current

    def params(self, sampler, temperature, seed, top_k, top_p, min_p) -> SamplingParams:
        seed, top_k = whole_number("Seed", seed), whole_number("Top-k", top_k)
        return SamplingParams(sampler, temperature, top_k, top_p, min_p, seed).with_drawn_seed()

    def generate(
        self, prompt, sampler, temperature, max_new_tokens, seed, top_k, top_p, min_p, past_end, session: Session
    ) -> Iterator[tuple]:
        """Yields the text so far, the figures, the panel's strip, and the tree of branches."""
        with run_of(session):
            params = self.params(sampler, temperature, seed, top_k, top_p, min_p)
            session.seed = params.seed
            run = self.begin(prompt, [params], max_new_tokens, past_end, trace_scales=True)[0]
            session.tree = []
            yield from self.write(session, run)

    def begin(
        self, prompt, params: list[SamplingParams], max_new_tokens, past_end, trace_scales: bool, forms=None
    ) -> list[Run]:
        """Starts one row per setting."""
        limit = whole_number("Max new tokens", max_new_tokens)
        options = {"ignore_eos": bool(past_end), "trace_scales": trace_scales}
        return self.book.begin(self.playground, prompt, params, limit, forms, **options)

    def branch(
        self, event: gr.EventData, sampler, temperature, max_new_tokens, seed, top_k, top_p, min_p, past_end,
        session: Session,
    ) -> Iterator[tuple]:  # fmt: skip
        """Goes on from a token of the text with another one in its place, or draws again from there."""
        with run_of(session):
            settings = (sampler, temperature, seed, top_k, top_p, min_p)
            run = self._branch(session, *self._chosen(event), max_new_tokens, past_end, settings)
            yield from self.write(session, run)

    def branch_column(self, event: gr.EventData, max_new_tokens, past_end, session: Session) -> Iterator[tuple]:
        """Goes on from a token of a compared column, under the column's own settings: a tree of its own."""
        with run_of(session):
            source, at, token = self._chosen(event)
            p = source.params
            settings = (p.sampler.value, p.temperature, -1, p.top_k, p.top_p, p.min_p)
            run = self._branch(session, source, at, token, max_new_tokens, past_end, settings)
            session.tree = [source]
            yield from self.write(session, run)

    def _chosen(self, event: gr.EventData) -> tuple[Run, int, int | None]:
        """The run, the place in it and the token there, None to draw again, that a view's script names."""
        asked = asked_for(event)
        run, token = self.book.get(asked.get("run")), asked.get("token")
        return run, whole_number("Index", asked.get("index")), None if token is None else whole_number("Token", token)

    def go_on(
        self, sampler, temperature, max_new_tokens, seed, top_k, top_p, min_p, past_end, session: Session
    ) -> Iterator[tuple]:
        """More of the text that is shown."""
        with run_of(session):
            if session.current is None or not session.current.tokens:
                raise RequestError("There is no text to continue yet; press Run first.")
            source = session.current
            ended = source.stats and source.stats["finish_reason"] == "eos"
            if ended and not past_end:
                raise RequestError("The text has come to its end; tick “Write past the end” to continue it.")
            at, settings = len(source.tokens), (sampler, temperature, seed, top_k, top_p, min_p)
            yield from self.write(session, self._branch(session, source, at, None, max_new_tokens, past_end, settings))

    def _branch(self, session: Session, source: Run, at: int, token: int | None, limit, past_end, settings) -> Run:
        sampler, temperature, seed, *filters = settings
        if token is not None or at == len(source.tokens):  # the same luck, unless a seed is asked for
            seed = source.params.seed if whole_number("Seed", seed) < 0 else seed
        params = self.params(sampler, temperature, seed, *filters)
        session.seed = params.seed
        limit = whole_number("Max new tokens", limit)
        return self.book.branch(self.playground, source, at, token, params, limit, bool(past_end))

    def write(self, session: Session, run: Run) -> Iterator[tuple]:
        """Shows a run of the page's tree while it writes."""
        session.tree, session.current = [*session.tree, run], run
        tree = BranchTree.show(session.tree, run)
        for (pane,) in self.paint(session, [run]):
            session.scales = pane.scales
            yield TextView.show(run), pane.stats, self.activation_view(session), tree

    def show(self, event: gr.EventData, session: Session) -> tuple:
        """Another run of the tree."""
        with told():
            refuse_during_a_run(session)
            run = session.current = self.book.get(asked_for(event).get("run"))
        return TextView.show(run), run.stats, BranchTree.show(session.tree, run)

    def follow_link(self, request: gr.Request) -> list:
        """Prompt and settings that the page's address carries; what is missing or wrong there stays as it is."""
        found = []
        for name, read in LINKED.items():
            try:
                found.append(read(request.query_params[name]))
            except (KeyError, ValueError):
                found.append(gr.skip())
        return found

    def receipt(self, session: Session) -> str:
        """Of the run that is shown."""
        with told():
            refuse_during_a_run(session)
            if session.current is None:
                raise RequestError("There is no run yet; press Run first.")
            return self.book.receipt(self.playground, session.current)

    def replay(self, file: bytes | None, session: Session) -> str:
        """Runs an uploaded receipt, or those of a comparison, again; says in words how it went."""
        try:
            with run_of(session):
                found = self._replayed(read_receipts((file or b"").decode(errors="replace")), session)
        except gr.Error as error:
            return error.message
        if len(found) == 1:
            return in_words(found[0])
        return "\n".join(f"Column {n}: {in_words(one)}" for n, one in enumerate(found, 1))

    def _replayed(self, receipts: list[Receipt], session: Session) -> list[dict]:
        try:
            return [self.book.replay(self.playground, one, session.streams.append) for one in receipts]
        finally:
            stop(session)

    def paint(self, session: Session, runs: list[Run]) -> Iterator[list[Pane]]:
        """Yields the panes at every paint; a closed generator cancels the rows."""
        session.streams = [run.stream for run in runs]
        try:
            panes = [Pane(run, run.stream.service.engine.cache.total_tokens) for run in runs]
            yield panes
            for _ in paints(panes):
                yield panes
        finally:
            stop(session)

    def answer(self, messages: list[Message], params: SamplingParams, max_new_tokens, past_end) -> Run:
        """The assistant's next turn, not yet painted."""
        limit = whole_number("Max new tokens", max_new_tokens)
        playground, options = self.playground, {"ignore_eos": bool(past_end), "trace_scales": True, "inspect": True}
        stream = playground.chat(messages, params, limit, **options)
        return self.book.keep(Run.of(stream, playground.tokenizer, "", playground.form))

    def layer_names(self, layer: int) -> list[str]:
        return projections(self.playground.model, layer)

    def choose(self, layer: int, projection: str | None, session: Session) -> tuple:
        """A choice in the panel: the dropdown of the layer's projections, and both pictures. Another page may have
        switched to a model with fewer layers since this one's list was made."""
        with told():
            layer = min(layer, self.playground.config.num_hidden_layers - 1)
        names = self.layer_names(layer)
        session.layer = layer
        session.projection = projection if projection in names else names[0] if names else None
        return (
            gr.update(choices=names, value=session.projection),
            self.weight_view(session.layer, session.projection),
            self.activation_view(session),
        )

    def weight_view(self, layer: int, projection: str | None) -> dict:
        if projection is None:
            return Heatmap.empty("Weight scales", "This layer is not quantised: it has none.")
        scales = weight_scales(self.playground.model, layer, projection)
        (rows, columns), grid = scales.shape, scales.grid
        note = f"{rows} x {columns} weight, one scale per 128x128 tile: {grid.rows} x {grid.columns}"
        if scales.error:
            note += (
                f". Quantised at load: a tile's relative error is {scales.error[0]:.2%}, at most {scales.error[1]:.2%}"
            )
        return Heatmap.show(grid, "Weight scales", note, "row", "column")

    def activation_view(self, session: Session) -> dict:
        title = "Activation scales of the newest token"
        names = [] if session.projection else self.layer_names(session.layer)
        projection = session.projection or (names[0] if names else "")
        strip = session.scales.get(f"layers.{session.layer}.{projection}")
        if strip:
            note = f"{128 * len(strip)} values enter, one scale per 1x128 block: {len(strip)}"
            return Heatmap.show(ScaleGrid.of([strip]), title, note, "row", "block")
        if not session.scales:
            return Heatmap.empty(title, "They appear here while the model writes.")
        if projection.endswith("kv_b_proj"):
            return Heatmap.empty(title, ABSORBED)
        return Heatmap.empty(title, "The gate did not send the newest token to this expert.")

    def switch(self, name: str, session: Session, progress=gr.Progress()) -> list:  # noqa: B008  gradio's convention
        """Another model of the shelf. A failure is told, and everything stays as it was."""
        shown = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal shown
            if done == total or time.perf_counter() - shown > 0.1:
                shown = time.perf_counter()
                progress((done >> 20, total >> 20), desc=f"Loading {name}", unit="MB")

        try:
            self.shelf.switch(name, tell)
        except CheckpointError as error:
            return self.describe(session, str(error))
        return self.describe(session)

    def describe(self, session: Session, failure: str = "") -> list:
        """Updates of everything on the page that depends on the model, in the order of `build_page`."""
        session.forget_model()
        with told():
            playground = self.playground
        d = playground.defaults
        layers = [(f"Layer {i}", i) for i in range(playground.config.num_hidden_layers)]
        return [
            gr.update(value=self.shelf.name),
            gr.update(value=failure, visible=bool(failure)),
            title(playground),
            gr.update(maximum=playground.context, value=playground.default_tokens),
            d.temperature,
            d.top_k,
            d.top_p,
            d.min_p,
            defaults_note(playground),
            gr.update(choices=layers, value=0),
            *self.choose(0, None, session),
            gr.update(visible=playground.template is not None),
            {"turns": []},
        ]


def asked_for(event: gr.EventData) -> dict:
    """What a view's script sent along; a hostile one may send anything."""
    return event._data if isinstance(event._data, dict) else {}
