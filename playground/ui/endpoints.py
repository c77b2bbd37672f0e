"""The page as an API: named, typed endpoints over the same handlers. gradio reads the annotations themselves, so this
file does without postponed ones; a generator's annotation is what it yields."""

import gradio as gr

from playground import RequestError
from playground.engine.requests import whole_number
from playground.inspect.receipt import read_receipts
from playground.ui.compare import CompareHandlers
from playground.ui.handlers import Handlers
from playground.ui.lab import LabHandlers
from playground.ui.session import Session, run_of, told


def add_endpoints(handlers: Handlers) -> None:
    """Inside of a page's `gr.Blocks`."""
    comparing, experiments = CompareHandlers(handlers), LabHandlers(handlers)

    def generate(
        prompt: str, sampler: str, temperature: float, max_new_tokens: int, seed: int = -1, top_k: int = 0,
        top_p: float = 1.0, min_p: float = 0.0, past_end: bool = False,
    ) -> tuple[str, dict, dict]:  # fmt: skip
        session = Session()
        with run_of(session):
            params = handlers.params(sampler, temperature, seed, top_k, top_p, min_p)
            run = handlers.begin(prompt, [params], max_new_tokens, past_end, trace_scales=True)[0]
            for (pane,) in handlers.paint(session, [run]):
                session.scales = pane.scales
                yield run.text, dict(pane.stats), handlers.activation_view(session)

    def compare(
        prompt: str, settings: list[dict], max_new_tokens: int = 128, shared_noise: bool = True, past_end: bool = False
    ) -> tuple[list[str], list[dict], dict]:
        for found, panes in comparing.write(prompt, settings, shared_noise, max_new_tokens, past_end, Session()):
            yield [run.text for run in found.runs], [dict(pane.stats) for pane in panes], found.fork or {}

    def draws(
        prompt: str, count: int = 20_000, temperature: float = 1.0, seed: int = 0, top_k: int = 0, top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> dict:  # fmt: skip
        yield from experiments.draws(prompt, count, temperature, seed, top_k, top_p, min_p, Session())

    def inspect(run: str, token: int = -1) -> list[dict]:
        with told():
            known = handlers.book.get(run)
            token = whole_number("Token", token)
            wanted = range(len(known.tokens)) if token == -1 else [token]
            return [handlers.book.token(run, index) for index in wanted]

    def receipt(run: str) -> str:
        with told():
            return handlers.book.receipt(handlers.playground, handlers.book.get(run))

    def replay(receipt: str) -> dict:
        with told():
            receipts = read_receipts(receipt)
            if len(receipts) > 1:
                raise RequestError(f"This is a list of {len(receipts)} receipts; replay them one at a time.")
            return handlers.book.replay(handlers.playground, receipts[0])

    about = {
        generate: "Writes; yields text, figures (with the `run` for /inspect and /receipt), activation scales.",
        compare: "Writes under 2 to 4 settings at once (sampler, temperature, top_k, top_p, min_p, seed, weights); "
        "yields texts, figures, and where they part.",
        draws: "Counts draws by every sampler from the prompt's next-token distribution; yields the table as it fills.",
        inspect: "What was behind a token of a run, or, with -1, behind each of them.",
        receipt: "The JSON that replays a run.",
        replay: "Runs a receipt again: identical, or the first token that differs, with both distributions.",
    }
    for function, description in about.items():
        gr.api(function, api_name=function.__name__, api_description=description, concurrency_limit=8)
