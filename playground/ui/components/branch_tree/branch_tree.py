"""The runs that grew out of one prompt, as a tree to move in."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from playground.inspect.run import Run

_HERE = Path(__file__).parent


class BranchTree(gr.HTML):
    """Value: what `show` returns, or None before the first run. A click triggers `select` with the run."""

    def __init__(self, **kwargs):
        super().__init__(
            value=None,
            html_template='<nav class="bt" aria-label="Branches"></nav>',
            js_on_load=(_HERE / "branch_tree.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    @staticmethod
    def show(tree: list[Run], current: Run) -> list[dict]:
        """Every run under the one that it branched off from."""
        rows = []

        def visit(run: Run, depth: int) -> None:
            rows.append({"run": run.id, "depth": depth, "label": _label(run), "current": run is current})
            for child in tree:
                if child.parent is run:
                    visit(child, depth + 1)

        for run in tree:
            if run.parent not in tree:
                visit(run, 0)
        return rows

    def api_info(self) -> dict:
        return {"type": "object", "description": "the runs that grew out of one prompt"}


def _label(run: Run) -> str:
    luck = "greedy" if run.params.is_greedy else f"seed {run.params.seed}"
    if run.parent is None:
        return f"First run, {luck}"
    if run.forced is not None:
        replaced = run.parent.tokens[run.at].id if run.at < len(run.parent.tokens) else None
        instead = f" instead of “{run.spelled(replaced).strip()}”" if replaced is not None else ""
        return f"Token {run.at + 1}: “{run.spelled(run.forced).strip()}”{instead}"
    if run.at == len(run.parent.tokens):
        return f"Continued after token {run.at}"
    return f"Drawn again from token {run.at + 1}, {luck}"
