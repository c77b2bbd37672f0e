"""The token in which compared runs part: what each chose, from which probabilities, and why."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent


class ForkView(gr.HTML):
    """Value: what `inspect.fork.explain_fork` returns, with `labels` of the columns; or a `note`, or None."""

    def __init__(self, **kwargs):
        super().__init__(
            value=None,
            html_template='<section class="fv" aria-label="Where the texts part" hidden></section>',
            js_on_load=(_HERE / "fork_view.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict:
        return {"type": "object", "description": "the first token in which the columns differ"}
