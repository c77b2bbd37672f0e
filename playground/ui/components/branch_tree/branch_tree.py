"""The runs that grew out of one prompt, as a tree to move in."""

from __future__ import annotations

from playground.inspect.run import Run
from playground.ui.components.view import View


class BranchTree(View):
    """Value: what `show` returns, or None before the first run. A click triggers `select` with the run."""

    template = '<nav class="bt" aria-label="Branches"></nav>'
    about = "the runs that grew out of one prompt"

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
