"""Our own views: one folder each, with the Python class and its script and style beside it.

Model and user text reaches the page through `textContent` only: the templates below are fixed strings, and no value is
ever put into one.
"""

from playground.ui.components.bar_table.bar_table import BarTable
from playground.ui.components.branch_tree.branch_tree import BranchTree
from playground.ui.components.chat_view.chat_view import ChatView
from playground.ui.components.fork_view.fork_view import ForkView
from playground.ui.components.heatmap.heatmap import Heatmap
from playground.ui.components.stats.stats import StatsBar
from playground.ui.components.text_view.text_view import TextView

__all__ = ["BarTable", "BranchTree", "ChatView", "ForkView", "Heatmap", "StatsBar", "TextView"]
