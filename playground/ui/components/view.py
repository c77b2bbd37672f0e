"""What our own views have in common: a template and a script beside their class, and nothing of a value in either."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import gradio as gr


class View(gr.HTML):
    """`template` is a fixed string, or stands in the file `NAME.html` beside the class's own; the script is `NAME.js`.
    `about` says in a few words what the value is, for programs."""

    template = ""
    about = ""

    def __init__(self, value: Any = None, **kwargs):
        file = Path(inspect.getfile(type(self)))
        super().__init__(
            value=value,
            html_template=self.template or file.with_suffix(".html").read_text(encoding="utf-8"),
            js_on_load=file.with_suffix(".js").read_text(encoding="utf-8"),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict:
        return {"type": "object", "description": self.about}
