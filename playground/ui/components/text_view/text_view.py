"""The text that a run writes, token by token: coloured, and each token explained to whoever looks at it."""

from __future__ import annotations

from collections.abc import Callable

from playground.inspect.run import Run
from playground.ui.components.view import View


class TextView(View):
    """Value: what `show` returns, or None. `explain({"run", "index"})` answers for a token, or with an `error`.

    The inspector shows the token that somebody looks at. Where the text `branches`, choosing an alternative there
    triggers `select` with the run, the index and the token, None to draw again. A token that is chosen to stay triggers
    `focus` with run and index, and `blur` when it is left.
    """

    about = "run, prompt, text, and marks: figures of every token"

    def __init__(self, title: str, explain: Callable[[dict], dict], value=None, branches: bool = False, **kwargs):
        def answer(asked: dict) -> dict:  # gradio marks the function itself, which a method does not allow
            return explain(asked)

        super().__init__(value, label=title, server_functions=[answer], branches=branches, **kwargs)

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
