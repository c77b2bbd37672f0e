"""The figures of compared runs, one line for each column."""

from __future__ import annotations

from playground.ui.components.view import View


class Figures(View):
    """Value: a list of `label` and `stats`, the latter as `playground.ui.painting` makes them; None before the first
    run."""

    template = '<div class="fg" tabindex="0" role="region" aria-label="Figures of the columns"></div>'
    about = "figures of every column"
