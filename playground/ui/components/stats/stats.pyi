"""The footer that stays: rates, time to first token, cache, seed."""

from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent

from gradio.events import Dependency

class StatsBar(gr.HTML):
    """Value: a dictionary as `playground.ui.painting` makes it, or None before the first run."""

    def __init__(self, **kwargs):
        super().__init__(
            value=None,
            html_template='<dl class="stats" role="status"></dl>',
            css_template=(_HERE / "stats.css").read_text(),
            js_on_load=(_HERE / "stats.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict:
        return {"type": "object", "description": "figures of the run; `finish_reason` is null while it writes"}
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component