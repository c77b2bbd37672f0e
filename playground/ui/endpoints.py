"""The page as an API: named, typed endpoints over the same handlers. gradio reads the annotations themselves, so this
file does without postponed ones; a generator's annotation is what it yields."""

import asyncio
from collections.abc import Callable

import gradio as gr

from playground import RequestError
from playground.engine.settings import SETTINGS, whole_number
from playground.inspect.receipt import read_receipts
from playground.ui.compare import CompareHandlers
from playground.ui.generate import GenerateHandlers
from playground.ui.handlers import Handlers
from playground.ui.lab import NAMES as DRAWN
from playground.ui.lab import LabHandlers
from playground.ui.session import Session, told
from playground.ui.settings import NAMES, spelled

REQUIRED = ("sampler", "temperature", "max_new_tokens")  # without them a request says too little


def add_endpoints(handlers: Handlers) -> None:
    """Inside of a page's `gr.Blocks`."""
    writing, comparing, experiments = GenerateHandlers(handlers), CompareHandlers(handlers), LabHandlers(handlers)

    async def generate(request: gr.Request, prompt: str, *values) -> tuple[str, dict, dict]:
        session = Session()
        async for _, stats, strip, _ in writing.generate(request, session, prompt, *values):
            yield session.current.text, stats, strip

    async def compare(
        request: gr.Request,
        prompt: str,
        settings: list[dict],
        max_new_tokens: int = 128,
        shared_noise: bool = True,
        past_end: bool = False,
    ) -> tuple[list[str], list[dict], dict]:
        shown = comparing.write(request, Session(), prompt, settings, shared_noise, max_new_tokens, past_end)
        async for found, panes in shown:
            yield [run.text for run in found.runs], [dict(pane.stats) for pane in panes], found.fork or {}

    async def draws(prompt: str, count: int = 20_000, *values) -> dict:
        async for table in experiments.draws(Session(), prompt, count, *values):
            yield table

    async def inspect_(run: str, token: int = -1) -> list[dict]:
        with told():
            known = handlers.book.get(run)
            token = whole_number("Token", token)
            wanted = range(len(known.tokens)) if token == -1 else [token]
            return await asyncio.to_thread(lambda: [handlers.book.token(run, index) for index in wanted])

    async def receipt(run: str) -> str:
        with told():
            return await asyncio.to_thread(handlers.book.receipt, handlers.playground, handlers.book.get(run))

    async def replay(receipt: str) -> dict:
        with told():
            receipts = read_receipts(receipt)
            if len(receipts) > 1:
                raise RequestError(f"This is a list of {len(receipts)} receipts; replay them one at a time.")
            return await writing.replayed(receipts[0], Session())

    async def status() -> dict:
        state = handlers.shelf.client.state
        ready = {"ready": state.phase == "ready"}
        model = state.info and {"name": state.info.name, "context": state.info.context, "form": state.info.form}
        ready["running"] = handlers.shelf.client.running
        return ready | {n: getattr(state, n) for n in ("phase", "done", "total", "message")} | {"model": model}

    def endpoint(name: str, function: Callable, returns: str, description: str) -> None:
        """`returns`: names of what the function returns; gradio would number them."""
        gr.api(function, api_name=name, api_description=description, concurrency_limit=None)
        outputs = next(event.outputs for event in handlers.page.fns.values() if event.api_name == name)
        for output, label in zip(outputs, returns.split(), strict=True):
            output.label = label

    settings = ", ".join(SETTINGS)
    endpoint(
        "generate",
        spelled(generate, NAMES, REQUIRED),
        "text figures scales",
        "Writes; yields text, figures (with the `run` for /inspect and /receipt), activation scales.",
    )
    endpoint(
        "compare",
        compare,
        "texts figures fork",
        f"Writes under 2 to 4 settings at once ({settings}, weights); yields texts, figures, and where they part.",
    )
    endpoint(
        "draws",
        spelled(draws, DRAWN, sampler="gumbel", temperature=1.0, seed=0),
        "table",
        "Counts draws by every sampler from the prompt's next-token distribution; yields the table as it fills.",
    )
    endpoint("inspect", inspect_, "tokens", "What was behind a token of a run, or, with -1, behind each of them.")
    endpoint("receipt", receipt, "receipt", "The JSON that replays a run.")
    endpoint(
        "replay",
        replay,
        "verdict",
        "Runs a receipt again: identical, or the first token that differs, with both distributions.",
    )
    endpoint(
        "status",
        status,
        "status",
        "What the engine is doing: loading, preparing or ready, on which model, and for how many requests.",
    )
