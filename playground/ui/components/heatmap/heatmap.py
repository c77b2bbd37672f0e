"""A grid of scales on a canvas, with a legend, a readout for pointer and keyboard, and a text equivalent."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import gradio as gr

from playground.inspect.scales import ScaleGrid

_HERE = Path(__file__).parent


class Heatmap(gr.HTML):
    """Value: what `Heatmap.show` or `Heatmap.empty` returns. Values are coloured on a logarithmic scale."""

    def __init__(self, value: dict | None = None, **kwargs):
        super().__init__(
            value=value,
            html_template=(_HERE / "heatmap.html").read_text(),
            js_on_load=(_HERE / "heatmap.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    @staticmethod
    def show(grid: ScaleGrid, title: str, note: str, row_word: str, column_word: str) -> dict:
        return {"title": title, "note": note, "row": row_word, "column": column_word} | asdict(grid)

    @staticmethod
    def empty(title: str, note: str) -> dict:
        return {"title": title, "note": note}

    def api_info(self) -> dict:
        return {"type": "object", "description": "rows, columns and base64 float32 scales"}
