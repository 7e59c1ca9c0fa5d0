"""Run folders in; paired statistics, tables and markdown out. No model, no torch."""

from cwdpo_bench.leaderboards.compare import compare_runs
from cwdpo_bench.leaderboards.comparison import (
    Comparison,
    Difference,
    Score,
    System,
    TaskComparison,
    to_json,
)
from cwdpo_bench.leaderboards.markdown import to_markdown
from cwdpo_bench.leaderboards.table import render, render_text

__all__ = [
    "Comparison",
    "Difference",
    "Score",
    "System",
    "TaskComparison",
    "compare_runs",
    "render",
    "render_text",
    "to_json",
    "to_markdown",
]
