"""The footer that stays: rates, time to first token, cache, seed."""

from __future__ import annotations

from playground.ui.components.view import View


class StatsBar(View):
    """Value: a dictionary as `playground.ui.painting` makes it, or None before the first run."""

    template = '<div role="status"><dl class="stats"></dl></div>'
    about = "figures of the run; `finish_reason` is null while it writes"
