"""The text that a run writes, token by token: coloured, and each token explained to whoever looks at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gradio as gr

from playground.inspect.run import Run

_HERE = Path(__file__).parent


class TextView(gr.HTML):
    """Value: what `show` returns, or None. `explain({"run", "index"})` answers for a token, or with an `error`.

    Where it `branches`, a click on an alternative triggers `select` with the run, the index and the token, None to draw
    again.
    """

    def __init__(self, title: str, explain: Callable[[dict], dict], branches: bool = False, **kwargs):
        def answer(asked: dict) -> dict:  # gradio marks the function itself, which a method does not allow
            return explain(asked)

        super().__init__(
            value=None,
            label=title,
            html_template=(_HERE / "text_view.html").read_text(),
            js_on_load=(_HERE / "text_view.js").read_text(),
            apply_default_css=False,
            server_functions=[answer],
            branches=branches,
            **kwargs,
        )

    @staticmethod
    def show(run: Run, prompt: bool = True) -> dict:
        """Strings that only grow while the run writes: gradio then sends what is new."""
        return {"run": run.id, "prompt": run.prompt if prompt else "", "text": run.text, "marks": run.marks}

    @staticmethod
    def show_piece(run: Run, start: int, end: int | None, prompt: bool, fork: bool) -> dict:
        """Some of its tokens; `fork` marks the first of them."""
        text, marks = run.piece(start, end)
        mark = start if fork and len(run.tokens) > start else None
        prompt = run.prompt if prompt else ""
        return {"run": run.id, "prompt": prompt, "text": text, "marks": marks, "start": start, "fork": mark}

    def api_info(self) -> dict:
        return {"type": "object", "description": "run, prompt, text, and marks: figures of every token"}
