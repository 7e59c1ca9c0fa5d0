"""How a number, a metric and a verdict look, in the terminal and in markdown alike."""

from __future__ import annotations

from cwdpo_bench.leaderboards.comparison import Comparison, Score, TaskComparison
from cwdpo_bench.markup import plain

MARKS = {"better": "▲", "worse": "▼", "higher": "↑", "lower": "↓", "same": "="}
DASH = "–"

QUALITY = (
    *(f"BLEU-{n}" for n in range(1, 5)),
    "METEOR",
    "ROUGE-L",
    "CIDEr",
    "CIDEr-plain",
    "SPICE",
    "accuracy",
    "accuracy_option",
    "accuracy_option_shift_mean",
    "accuracy_plain",
    "parse_failures",
)
"""What answers are worth."""

FAMILIES = {
    "hallucination": (
        *("CHAIR-i", "CHAIR-s", "object_recall"),
        *("precision", "recall", "f1", "yes_share"),
    ),
    "calibration": (
        *("ece", "ece_adaptive", "ece_debiased", "ece_classwise", "mce", "token_ece"),
        *("brier", "brier_reliability", "brier_resolution", "brier_uncertainty", "nll"),
        *("aurc", "auroc", "temperature"),
        *(f"{n}_scaled" for n in ("ece", "ece_adaptive", "ece_debiased", "mce", "brier", "nll")),
        *(f"{n}_shift_mean" for n in ("ece", "brier", "nll")),
        *("option_mass", "option_order_bias", "option_recall_sd"),
    ),
    "diversity": ("distinct-1", "distinct-2", "self-CIDEr", "vendi"),
    "dynamics": ("entropy", "top1_probability", "tv", "js"),
}
"""What the other metrics tell; those that stand in none are "other"."""

PLAIN = (
    *("brier", "brier_reliability", "brier_resolution", "brier_uncertainty", "brier_scaled"),
    *("brier_shift_mean", "nll", "nll_scaled", "nll_shift_mean", "entropy", "tv", "js"),
    *("temperature", "vendi"),
)
"""Shown as they are, with three decimals; all others × 100, with one."""

UNITS = dict.fromkeys(("nll", "nll_scaled", "nll_shift_mean", "entropy", "js"), "nats")

HEADLINES = ("CIDEr", "accuracy")
CALIBRATION_HEADLINES = ("token_ece", "ece")
"""The first of each that a task has stands in the overview."""


def is_plain(metric: str) -> bool:
    """Whether values are shown as they are; lmms-eval's have scales of their own."""
    return metric in PLAIN or metric.startswith("lmms:")


def scale(metric: str) -> float:
    """What a value of `metric` is multiplied by where it is shown."""
    return 1.0 if is_plain(metric) else 100.0


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """`value` of `metric` as text: × 100 with one decimal, or plain with three."""
    digits = 3 if is_plain(metric) else 1
    rounded = round(value * scale(metric), digits)
    # Without the 0.0 a small negative number would read "-0.0".
    return f"{rounded + 0.0:{'+' if signed else ''}.{digits}f}"


def interval(metric: str, ends: tuple[float, float], *, signed: bool = False) -> str:
    """`[low, high]` of `metric`."""
    low, high = (number(metric, end, signed=signed) for end in ends)
    return f"[{low}, {high}]"


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
    """`39.6 ▲`; over several seeds `39.6 ±0.4 ▲`."""
    spread = "" if score.seed_sd is None else f" ±{number(metric, score.seed_sd)}"
    return f"{number(metric, score.value)}{spread} {mark(score)}".rstrip()


def metric_groups(task: TaskComparison) -> dict[str, list[str]]:
    """The task's metrics by what they tell."""
    quality = [name for name in task.metrics if name in QUALITY]
    captions = any(name in ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "SPICE") for name in quality)
    named = {"captions" if captions else "choices": quality}
    for title, names in FAMILIES.items():
        named[title] = [name for name in task.metrics if name in names]
    placed = {name for names in named.values() for name in names}
    named["lmms-eval"] = [name for name in task.metrics if name.startswith("lmms:")]
    placed |= set(named["lmms-eval"])
    named["other"] = [name for name in task.metrics if name not in placed]
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


def caption(task: TaskComparison) -> str:
    """What the reader of a task's table must know about it."""
    drawn = f"{task.n} samples in {task.clusters} clusters"
    if task.tests == 0:
        return f"{drawn}; no paired differences"
    return (
        f"{drawn}; {task.resamples:,} paired resamples; p adjusted by Holm over the "
        f"{task.tests} differences of this task{_power(task)}"
    )


def _power(task: TaskComparison) -> str:
    """The smallest difference of the headlines that this test set shows, in the worst pair."""
    told = []
    for metric in (*HEADLINES, *CALIBRATION_HEADLINES):
        scores = [row[metric] for row in task.scores.values() if metric in row]
        least = [s.difference.detectable for s in scores if s.difference is not None]
        # Equal systems vary in nothing, which says nothing of the test set.
        if any(least):
            told.append(f"{metric} {number(metric, max(least))}")
    return f"; smallest difference shown with 80 % chance: {', '.join(told)}" if told else ""


def legend(comparison: Comparison) -> list[str]:
    """How the tables are read, line by line."""
    return [
        "Values × 100, except brier, nll, entropy, temperature, tv, js, vendi and what lmms-eval "
        "computed; brackets hold 95 % intervals: Wilson's for a share of independent questions, "
        "else those of the cluster bootstrap.",
        f"Against the baseline {plain(comparison.baseline)}: "
        f"▲ better, ▼ worse, ↑ higher, ↓ lower where neither is better "
        f"(Holm-adjusted p ≤ {comparison.alpha:g}); = no such difference.",
        *_seed_legend(comparison),
    ]


def _seed_legend(comparison: Comparison) -> list[str]:
    several = [f"{plain(s.name)} ({len(s.paths)})" for s in comparison.systems if len(s.paths) > 1]
    if not several:
        return []
    told = (
        f"Mean ± standard deviation over training seeds: {', '.join(several)}; resampled with "
        "seeds first, then images."
    )
    single = [plain(s.name) for s in comparison.systems if len(s.paths) == 1]
    lone = f" Of one seed, whose spread is unknown: {', '.join(single)}." if single else ""
    return [told + lone]


def group_cell(task: TaskComparison, group: str, system: str) -> str:
    """Value and mark of a group, with its paired difference; a dash where there is none."""
    metric = task.group_metric
    value = task.groups.get(group, {}).get(system, {}).get(metric or "")
    if metric is None or value is None:
        return DASH
    difference = task.group_differences.get(group, {}).get(system)
    if difference is None:
        return number(metric, value)
    return (
        f"{number(metric, value)} {MARKS[difference.verdict]} "
        f"({number(metric, difference.value, signed=True)})"
    )


def is_best(task: TaskComparison, metric: str, system: str) -> bool:
    """Bold is earned: significantly better than every other system."""
    return task.best.get(metric) == system


PROVENANCE_COLUMNS = ("system", "seed", "date", "versions", "signature of the run")


def provenance_rows(comparison: Comparison) -> list[list[str]]:
    """What each system's run states of itself; empty where it states nothing."""
    rows = []
    for system in comparison.systems:
        stated = system.provenance
        libraries = stated.get("libraries")
        versions = {"cwdpo-bench": stated.get("cwdpo-bench")} | (
            libraries if isinstance(libraries, dict) else {}
        )
        rows.append(
            [
                system.name,
                ", ".join(str(seed) for seed in system.seeds if seed is not None),
                str(stated.get("date", "")),
                ", ".join(f"{name} {version}" for name, version in versions.items() if version),
                system.signature,
            ]
        )
    return rows
