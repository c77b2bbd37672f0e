"""The head of the page: what it is for, and which model runs on what."""

from __future__ import annotations

from playground.engine.events import ModelInfo
from playground.ui.components.view import View


class Masthead(View):
    """Value: what `show` returns."""

    about = "the model's name, what it is, and what computes it"

    @staticmethod
    def show(info: ModelInfo) -> dict:
        form = "FP8 E4M3" if info.form == "fp8" else "unquantised"
        about = [in_millions(info.weights), f"{info.layers} layers", form]
        if info.cache_form == "fp8":
            about.append("FP8 cache")
        where = "CPU" if info.device == "cpu" else info.device_name
        return {"name": info.name, "about": ", ".join(about), "where": where, "path": info.path}


def in_millions(count: int) -> str:
    """As people say it: 28M, 8.2B."""
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{round(count / 1e6)}M"
