"""Our own views: one folder each, with the Python class and its script and style beside it.

Model and user text reaches the page through `textContent` only: the templates below are fixed strings, and no value is
ever put into one. Styles belong to the page (`CSS`): gradio would write a component's own anew with every value, and
the browser then works out the style of every token on the page.
"""

from pathlib import Path

from playground.ui.components.bar_table.bar_table import BarTable
from playground.ui.components.branch_tree.branch_tree import BranchTree
from playground.ui.components.chat_view.chat_view import ChatView
from playground.ui.components.figures.figures import Figures
from playground.ui.components.fork_view.fork_view import ForkView
from playground.ui.components.heatmap.heatmap import Heatmap
from playground.ui.components.inspector.inspector import Inspector
from playground.ui.components.masthead.masthead import Masthead
from playground.ui.components.stats.stats import StatsBar
from playground.ui.components.text_view.text_view import TextView
from playground.ui.components.token_chips.token_chips import TokenChips

SHARED = (Path(__file__).parent / "shared.js").read_text(encoding="utf-8")
"""What their scripts have in common, for the page's head."""

CSS = "\n".join(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*/*.css")))

__all__ = [
    "CSS", "SHARED", "BarTable", "BranchTree", "ChatView", "Figures", "ForkView", "Heatmap", "Inspector", "Masthead",
    "StatsBar", "TextView", "TokenChips",
]  # fmt: skip
