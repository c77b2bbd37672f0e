"""A grid of scales on a canvas, with a legend, a readout for pointer and keyboard, and a text equivalent."""

from __future__ import annotations

from dataclasses import asdict

from playground.inspect.scales import ScaleGrid
from playground.ui.components.view import View


class Heatmap(View):
    """Value: what `Heatmap.show` or `Heatmap.empty` returns. Values are coloured on a logarithmic scale."""

    about = "rows, columns and base64 float32 scales"

    @staticmethod
    def show(grid: ScaleGrid, title: str, note: str, row_word: str, column_word: str) -> dict:
        return {"title": title, "note": note, "row": row_word, "column": column_word} | asdict(grid)

    @staticmethod
    def empty(title: str, note: str) -> dict:
        return {"title": title, "note": note}
