"""The run that the page shows before anybody has pressed anything: recorded, and the page says so.

`python -m playground.inspect.example` records it anew with the embedded model.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from playground.api import Playground, load
from playground.engine.settings import RequestError, SamplingParams
from playground.inspect.book import RunBook

FILE = Path(__file__).parents[1] / "assets" / "example.json"
RUN = "example"  # its id; those of real runs are longer
PROMPT, PARAMS, TOKENS = "Once upon a time", SamplingParams("gumbel", 0.8, seed=7), 200
TITLE = "Example run, recorded. Press Run for your own."


@lru_cache(maxsize=1)
def recorded() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def example_view() -> dict:
    """As `TextView.show`, with a title, and the token that is open at first."""
    found = recorded()
    return {"run": RUN, "title": TITLE} | {name: found[name] for name in ("prompt", "text", "marks", "open")}


def example_token(index: object) -> dict:
    """As `inspect.tokens.explain`. Raises `RequestError`."""
    tokens = recorded()["tokens"]
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(tokens):
        raise RequestError(f"Token {repr(index)[:80]} is not there; the example has {len(tokens)}.")
    return tokens[index] | {"recorded": True}


def record(playground: Playground) -> dict:
    """Writes the example, and opens its most surprising word."""
    book = RunBook()
    (run,) = book.begin(playground, PROMPT, [PARAMS], TOKENS)
    for event in run.stream:
        run.add(event)
    tokens = [rounded(book.token(run.id, index)) for index in range(len(run.tokens))]
    surprise = [-token.logprob if token.text.strip().isalpha() else 0.0 for token in run.tokens]
    opened = surprise.index(max(surprise))
    return {"prompt": PROMPT, "text": run.text, "marks": run.marks, "open": opened, "tokens": tokens}


def rounded(value):
    """To seven digits, more than the page shows."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    with load() as playground:
        FILE.write_text(json.dumps(record(playground), ensure_ascii=False) + "\n", encoding="utf-8")
