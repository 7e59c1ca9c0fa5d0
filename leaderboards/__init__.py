"""Run folders in; paired statistics, verdicts and tables out. No model, no torch."""

from cwdpo_bench.leaderboards.compare import compare_runs
from cwdpo_bench.leaderboards.comparison import (
    Comparison,
    Difference,
    Score,
    System,
    TaskComparison,
    to_json,
)
from cwdpo_bench.leaderboards.exports import to_csv, to_html, to_latex
from cwdpo_bench.leaderboards.markdown import to_markdown
from cwdpo_bench.leaderboards.model_card import to_model_index, update_between_markers
from cwdpo_bench.leaderboards.report import build_report
from cwdpo_bench.leaderboards.report_server import serve_report
from cwdpo_bench.leaderboards.systems import parse_systems
from cwdpo_bench.leaderboards.table import render, render_text

__all__ = [
    "Comparison",
    "Difference",
    "Score",
    "System",
    "TaskComparison",
    "build_report",
    "compare_runs",
    "parse_systems",
    "render",
    "render_text",
    "serve_report",
    "to_csv",
    "to_html",
    "to_json",
    "to_latex",
    "to_markdown",
    "to_model_index",
    "update_between_markers",
]
