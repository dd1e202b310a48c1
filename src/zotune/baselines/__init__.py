"""What a sceptic asks for, in the same harness: first-order training and a linear probe, beside what it costs.

This is the room that may import autograd. The rows, prompts, losses and evaluations are those of zeroth-order runs.
"""

from zotune.baselines.bars import draw_comparison
from zotune.baselines.compare import Row, comparison_markdown, comparison_table, verdict
from zotune.baselines.first_order import FIRST_ORDER, FirstOrder, train_first_order
from zotune.baselines.meter import Usage, measure
from zotune.baselines.probe import Probe, linear_probe

__all__ = [
    "FIRST_ORDER",
    "FirstOrder",
    "Probe",
    "Row",
    "Usage",
    "comparison_markdown",
    "comparison_table",
    "draw_comparison",
    "linear_probe",
    "measure",
    "train_first_order",
    "verdict",
]
