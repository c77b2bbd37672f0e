"""The footer that stays: rates, time to first token, cache, seed."""

from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent


class StatsBar(gr.HTML):
    """Value: a dictionary as `playground.ui.painting` makes it, or None before the first run."""

    def __init__(self, **kwargs):
        super().__init__(
            value=None,
            html_template='<div role="status"><dl class="stats"></dl></div>',
            js_on_load=(_HERE / "stats.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict:
        return {"type": "object", "description": "figures of the run; `finish_reason` is null while it writes"}
