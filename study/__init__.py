"""Recipes × seeds × benchmarks to tables: cells that are made once, resumed, and compared."""

from cwdpo_bench.study.run import choose, commands, plan, plan_text, run_one, run_study

__all__ = ["choose", "commands", "plan", "plan_text", "run_one", "run_study"]
