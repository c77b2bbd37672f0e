"""What the page's buttons do: plain generators over a `Playground`, without layout."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from playground import CheckpointError, Playground, RequestError, SamplingParams
from playground.engine.request import Sampler
from playground.engine.service import EngineError, Stream
from playground.inspect.scales import ScaleGrid, projections, weight_scales
from playground.ui.components import Heatmap
from playground.ui.painting import Pane, paints

COMPARED = (Sampler.GREEDY, Sampler.MULTINOMIAL, Sampler.GUMBEL)
SECOND_RUN = "This page is already writing; press Stop first, or wait for the end."
ABSORBED = "Absorbed at decode: this projection is folded into the query and the output, no activation meets it."


class Session:
    """What one open page remembers between events. Handlers of the page share the object, so that a choice in the
    panel takes effect in a run that is under way."""

    def __init__(self):
        self.running = False
        self.streams: list[Stream] = []  # of the run under way
        self.layer, self.projection = 0, None  # None: the layer's first
        self.seed: int | None = None  # of the last run that drew with one
        self.scales: dict[str, list[float]] = {}


def whole_number(name: str, value: object) -> int:
    """Gradio and JSON may bring 5 as 5.0. Raises `RequestError` for what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value != value // 1:
        raise RequestError(f"{name} is {value!r}; use a whole number.")
    return int(value)


class Handlers:
    def __init__(self, playground: Playground):
        self.playground = playground
        self.projections = projections(playground.model)

    def params(self, sampler, temperature, seed, top_k, top_p, min_p) -> SamplingParams:
        seed, top_k = whole_number("Seed", seed), whole_number("Top-k", top_k)
        return SamplingParams(sampler, temperature, top_k, top_p, min_p, seed).with_drawn_seed()

    def generate(
        self, prompt, sampler, temperature, max_new_tokens, seed, top_k, top_p, min_p, past_end, session: Session
    ) -> Iterator[tuple]:
        """Yields the continuation so far, the figures, and the panel's strip."""
        with Run(session):
            params = self.params(sampler, temperature, seed, top_k, top_p, min_p)
            session.seed = params.seed
            for panes in self.stream(session, prompt, [params], max_new_tokens, past_end):
                session.scales = panes[0].scales
                yield panes[0].text, panes[0].stats, self.activation_view(session)

    def compare(
        self, prompt, temperature, max_new_tokens, seed, top_k, top_p, min_p, past_end, session: Session
    ) -> Iterator[tuple]:
        """Yields text and figures of each column in turn."""
        with Run(session):
            drawn = self.params("greedy", temperature, seed, top_k, top_p, min_p).seed
            session.seed = drawn
            every = [self.params(s, temperature, drawn, top_k, top_p, min_p) for s in COMPARED]
            for panes in self.stream(session, prompt, every, max_new_tokens, past_end):
                yield tuple(value for pane in panes for value in (pane.text, pane.stats))

    def stream(
        self, session: Session, prompt, params: list[SamplingParams], max_new_tokens, past_end
    ) -> Iterator[list[Pane]]:
        """Starts one row per setting and yields the panes at every paint; a closed generator cancels the rows."""
        playground = self.playground
        options = {"ignore_eos": bool(past_end), "trace_scales": len(params) == 1}
        limit = whole_number("Max new tokens", max_new_tokens)
        session.streams = streams = playground.compare(prompt, params, limit, **options)
        try:
            tokens, total = len(playground.encode(prompt)), playground.service.engine.cache.total_tokens
            panes = [
                Pane(stream, tokens, total, None if p.is_greedy else p.seed)
                for stream, p in zip(streams, params, strict=True)
            ]
            yield panes
            for _ in paints(panes):
                yield panes
        finally:
            stop(session)

    def choose(self, layer: int, projection: str, session: Session) -> tuple:
        """A choice in the panel: the dropdown of the layer's projections, and both pictures."""
        names = self.projections[layer]
        session.layer = layer
        session.projection = projection if projection in names else names[0]
        return (
            gr.Dropdown(choices=names, value=session.projection),
            self.weight_view(session.layer, session.projection),
            self.activation_view(session),
        )

    def weight_view(self, layer: int, projection: str) -> dict:
        grid, (rows, columns) = weight_scales(self.playground.model, layer, projection)
        note = f"{rows} x {columns} weight, one scale per 128x128 tile: {grid.rows} x {grid.columns}"
        return Heatmap.show(grid, "Weight scales", note, "row", "column")

    def activation_view(self, session: Session) -> dict:
        title = "Activation scales of the newest token"
        projection = session.projection or self.projections[session.layer][0]
        strip = session.scales.get(f"layers.{session.layer}.{projection}")
        if strip:
            note = f"{128 * len(strip)} values enter, one scale per 1x128 block: {len(strip)}"
            return Heatmap.show(ScaleGrid.of([strip]), title, note, "row", "block")
        if not session.scales:
            return Heatmap.empty(title, "They appear here while the model writes.")
        if projection.endswith("kv_b_proj"):
            return Heatmap.empty(title, ABSORBED)
        return Heatmap.empty(title, "The gate did not send the newest token to this expert.")


class Run:
    """One run per page at a time; whatever goes wrong inside becomes a sentence for the page and the API."""

    def __init__(self, session: Session):
        self.session = session

    def __enter__(self) -> None:
        if self.session.running:
            raise gr.Error(SECOND_RUN, print_exception=False)
        self.session.running = True

    def __exit__(self, kind, error, trace) -> None:
        self.session.running = False
        if isinstance(error, (RequestError, CheckpointError, EngineError)):
            raise gr.Error(str(error), print_exception=False) from None


def stop(session: Session) -> None:
    """Cancels the rows of the run under way. Its generator then ends by itself, with the engine's own last figures;
    to cancel the generator instead would leave the footer to whichever message comes last."""
    for stream in session.streams:
        stream.close()
    session.streams = []
