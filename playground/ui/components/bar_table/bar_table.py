"""Numbers per token beside each other: as bars of probability, or as plain figures."""

from __future__ import annotations

from playground.ui.components.view import View


class BarTable(View):
    """Value: `columns`, `rows` of a `label`, `values` and perhaps `chosen`, and a `note`; `figures` shows numbers
    instead of bars, `done` from 0 to 1 progress. Or, as at first, an `empty` sentence."""

    template = '<section class="bb" tabindex="0"></section>'
    about = "columns, rows and a note"

    def __init__(self, title: str, empty: str, **kwargs):
        super().__init__({"empty": empty}, label=title, **kwargs)
