"""The live panel in a terminal, and the plain lines where there is none."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cwdpo_bench.train.panel import TrainPanel, sparkline
from cwdpo_bench.train.verdict import Verdict

HEALTHY = Verdict("healthy", "healthy: the chosen answers have lost 0.01 nats a token", {})
SQUEEZED = Verdict("squeezing", "squeezing: at steps 2 to 4 …", {})


def _row(stage: str, step: int, chosen: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "chosen_mean_logp": chosen,
        "rejected_mean_logp": -4.0,
        "argmax_mean_logp": -0.3,
        "top1_probability": 0.78,
        "token_ece": 0.031,
        "cooling_weight": float("nan"),
    }


def _follow(console: Console) -> None:
    with TrainPanel("dpo", console) as panel:
        panel.measured(_row("stage1", 0, -0.5), HEALTHY)
        for step in range(1, 5):
            if step % 2 == 0:
                panel.measured(_row("stage1", step, -0.5 - step / 10), SQUEEZED)
            panel.step("stage1", step, 4, 0.7 - step / 100)


def test_without_a_terminal_every_measurement_is_a_line() -> None:
    stream = io.StringIO()
    _follow(Console(file=stream, width=300))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("dpo stage1: step 0, chosen log p -0.500")
    assert "healthy" in lines[0]
    assert lines[-1].startswith("dpo stage1: step 4/4, loss 0.6600, chosen log p -0.900")
    assert "top-1 0.780" in lines[-1]
    assert "token ECE 0.031" in lines[-1]
    assert "squeezing" in lines[-1]
    assert "0:00 left" in lines[-1]
    assert "w_c" not in lines[-1]
    assert not any("\x1b" in line for line in lines)


def test_a_last_step_that_was_measured_is_told_once() -> None:
    stream = io.StringIO()
    with TrainPanel("dpo", Console(file=stream, width=300)) as panel:
        panel.step("stage1", 1, 2, 0.7)
        panel.measured(_row("stage1", 2, -0.5), HEALTHY)
        panel.step("stage1", 2, 2, None)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("dpo stage1: step 2/2, loss 0.7000, chosen log p -0.500")


def test_in_a_terminal_curves_and_verdict_are_drawn() -> None:
    stream = io.StringIO()
    _follow(Console(file=stream, force_terminal=True, width=120))
    shown = stream.getvalue()
    for words in ("chosen log p", "argmax log p", "squeezing: at steps 2 to 4", "4/4", "left"):
        assert words in shown
    assert "█" in shown


def test_a_second_stage_starts_its_own_curves() -> None:
    stream = io.StringIO()
    with TrainPanel("cw-dpo", Console(file=stream, width=300)) as panel:
        panel.measured(_row("stage1", 0, -0.5), SQUEEZED)
        panel.step("stage1", 1, 1, 0.9)
        panel.measured(_row("stage2", 0, -0.4), HEALTHY)
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("cw-dpo stage2: step 0")
    assert "loss" not in last


def test_a_sparkline_spans_its_own_range_and_leaves_out_gaps() -> None:
    assert sparkline([0, 1]) == "▁█"
    assert sparkline([1, float("nan"), 0]) == "█▁"
    assert sparkline([2, 2, 2]) == "▁▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(100)), width=10)) == 10
