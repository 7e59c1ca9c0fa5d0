"""How a number, a metric and a verdict look, in the terminal and in markdown alike."""

from __future__ import annotations

from cwdpo_bench.leaderboards.comparison import Comparison, Score, TaskComparison

MARKS = {"better": "▲", "worse": "▼", "higher": "↑", "lower": "↓", "same": "="}
DASH = "–"

QUALITY = (
    *(f"BLEU-{n}" for n in range(1, 5)),
    "METEOR",
    "ROUGE-L",
    "CIDEr",
    "SPICE",
    "accuracy",
    "accuracy_option",
    "accuracy_plain",
    "parse_failures",
)
"""What answers are worth; every other metric is calibration and confidence."""

PLAIN = ("brier", "nll", "entropy", "tv", "js")
"""Shown as they are, with three decimals; all others × 100, with one."""

UNITS = {"nll": "nats", "entropy": "nats", "js": "nats"}

HEADLINES = ("CIDEr", "accuracy")
CALIBRATION_HEADLINES = ("token_ece", "ece")
"""The first of each that a task has stands in the overview."""


def scale(metric: str) -> float:
    """What a value of `metric` is multiplied by where it is shown."""
    return 1.0 if metric in PLAIN else 100.0


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """`value` of `metric` as text: × 100 with one decimal, or plain with three."""
    digits = 3 if metric in PLAIN else 1
    rounded = round(value * scale(metric), digits)
    # Without the 0.0 a small negative number would read "-0.0".
    return f"{rounded + 0.0:{'+' if signed else ''}.{digits}f}"


def interval(metric: str, ends: tuple[float, float], *, signed: bool = False) -> str:
    """`[low, high]` of `metric`."""
    low, high = (number(metric, end, signed=signed) for end in ends)
    return f"[{low}, {high}]"


def group_metric(task: TaskComparison) -> str | None:
    """The metric that is shown by group: the task's headline; None where nothing is grouped."""
    found = {name for group in task.groups.values() for row in group.values() for name in row}
    return next((name for name in HEADLINES if name in found), None)


def p_value(p: float) -> str:
    """Three decimals; `<.001` below that, `1` where it rounds to 1."""
    if p < 0.001:
        return "<.001"
    return f"{p:.3f}".removeprefix("0") if p < 0.9995 else "1"


def label(metric: str, higher_is_better: bool | None) -> str:
    """The metric's name, which way is better, and the unit where there is one."""
    way = {True: " ↑", False: " ↓", None: ""}[higher_is_better]
    unit = f" ({UNITS[metric]})" if metric in UNITS else ""
    return f"{metric}{way}{unit}"


def mark(score: Score) -> str:
    """The verdict's sign; empty for the baseline, which is compared with nothing."""
    return "" if score.difference is None else MARKS[score.difference.verdict]


def value_with_mark(metric: str, score: Score) -> str:
    """`39.6 ▲`."""
    return f"{number(metric, score.value)} {mark(score)}".rstrip()


def metric_groups(task: TaskComparison) -> dict[str, list[str]]:
    """The task's metrics by what they tell."""
    quality = [name for name in task.metrics if name in QUALITY]
    rest = [name for name in task.metrics if name not in QUALITY]
    captions = any(name in ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "SPICE") for name in quality)
    named = {"captions" if captions else "choices": quality, "calibration": rest}
    return {title: names for title, names in named.items() if names}


def overview(comparison: Comparison) -> dict[str, list[tuple[TaskComparison, str]]]:
    """The columns of the overview by title: one headline a task, then one of its calibration."""
    return {
        title: [
            (task, next(name for name in headlines if name in task.metrics))
            for task in comparison.tasks
            if any(name in task.metrics for name in headlines)
        ]
        for title, headlines in (("Scores", HEADLINES), ("Calibration", CALIBRATION_HEADLINES))
    }


def plain(text: str) -> str:
    """`text` on one line, without control, escape or direction characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def caption(task: TaskComparison) -> str:
    """What the reader of a task's table must know about it."""
    drawn = f"{task.n} samples in {task.clusters} clusters"
    if task.tests == 0:
        return f"{drawn}; no paired differences"
    return (
        f"{drawn}; {task.resamples:,} paired resamples; p adjusted by Holm over the "
        f"{task.tests} differences of this task"
    )


def legend(comparison: Comparison) -> list[str]:
    """How the tables are read, line by line."""
    return [
        "Values × 100, except brier, nll, entropy, tv and js; brackets hold 95 % intervals of the "
        "cluster bootstrap.",
        f"Against the baseline {plain(comparison.baseline)}: "
        f"▲ better, ▼ worse, ↑ higher, ↓ lower where neither is better "
        f"(Holm-adjusted p ≤ {comparison.alpha:g}); = no such difference.",
    ]
