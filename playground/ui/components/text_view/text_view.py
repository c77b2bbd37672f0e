"""The text that a row writes: one growing string; the script appends what is new."""

from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent


class TextView(gr.HTML):
    """Value: the continuation so far. When a new run starts, the script shows the prompt box's text before it."""

    def __init__(self, title: str, **kwargs):
        super().__init__(
            value="",
            label=title,
            html_template='<div class="tv-text" role="log" aria-live="polite" tabindex="0"></div>',
            css_template=(_HERE / "text_view.css").read_text(),
            js_on_load=(_HERE / "text_view.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict:
        return {"type": "string", "description": "the continuation so far, without the prompt"}
