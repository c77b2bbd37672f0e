"""Numbers per token beside each other: as bars of probability, or as plain figures."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent


class BarTable(gr.HTML):
    """Value: `columns`, `rows` of a `label`, `values` and perhaps `chosen`, and a `note`; `figures` shows numbers
    instead of bars, `done` from 0 to 1 progress. Or, as at first, an `empty` sentence."""

    def __init__(self, title: str, empty: str, **kwargs):
        super().__init__(
            value={"empty": empty},
            label=title,
            html_template='<section class="bb" tabindex="0"></section>',
            js_on_load=(_HERE / "bar_table.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict:
        return {"type": "object", "description": "columns, rows and a note"}
