"""The token in which compared runs part: what each chose, from which probabilities, and why."""

from __future__ import annotations

from playground.ui.components.view import View


class ForkView(View):
    """Value: what `inspect.fork.explain_fork` returns, with `labels` of the columns; or a `note`, or None."""

    template = '<section class="fv" aria-label="Where the texts part" hidden></section>'
    about = "the first token in which the columns differ"
