"""The verdict on top of a report: what the gate says of each system, and what was found, in words.

The gate is `gate.run_gate` with the package's own policy, or one that the caller names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cwdpo_bench.leaderboards.comparison import Comparison, Difference, System, TaskComparison
from cwdpo_bench.leaderboards.display import (
    MARKS,
    interval,
    number,
    overview,
)
from cwdpo_bench.leaderboards.gate import GateResult, run_gate
from cwdpo_bench.leaderboards.gate_reports import SIGNS, line_of
from cwdpo_bench.markup import plain

_WORDS = {
    "pass": "passes",
    "regression": "regression",
    "inconclusive": "inconclusive",
    "not judged": "not judged",
}


@dataclass(frozen=True)
class Finding:
    """One significant difference of a headline metric.

    Attributes:
        verdict: better or worse.
        words: task, metric, difference and interval.
    """

    verdict: str
    words: str


@dataclass(frozen=True)
class SystemVerdict:
    """What is said of one system.

    Attributes:
        name: of the system.
        verdict: of the gate: pass, regression, inconclusive or not judged.
        sign: the verdict's.
        words: the verdict as a word of the page.
        reason: in one sentence.
        findings: significant differences of the headline metrics, better and worse.
        checks: the gate's lines that did not pass.
        passed: how many of the gate's checks did.
    """

    name: str
    verdict: str
    sign: str
    words: str
    reason: str
    findings: tuple[Finding, ...] = field(default=())
    checks: tuple[str, ...] = field(default=())
    passed: int = 0


def judge_systems(comparison: Comparison, policy: Path | None = None) -> list[SystemVerdict]:
    """The gate's answer for every system but the baseline, in the comparison's order.

    Args:
        comparison: what `compare_runs` gave.
        policy: the gate's rules; the package's own by default.
    """
    base = next(s for s in comparison.systems if s.name == comparison.baseline)
    return [
        _judge(comparison, system, base, policy)
        for system in comparison.systems
        if system is not base
    ]


def headline(verdicts: Sequence[SystemVerdict], baseline: str) -> list[str]:
    """All verdicts in a few sentences: what the gate says, and who gained without losing."""
    base = plain(baseline)
    if not verdicts:
        return [f"{base} stands alone: there is nothing to compare it with."]
    said = {
        "regression": f"Worse than {base} beyond the gate's limits",
        "pass": f"No worse than {base} within the gate's limits",
        "inconclusive": "Too few samples to tell whether it is worse",
        "not judged": "Could not be judged",
    }
    named = {kind: [v.name for v in verdicts if v.verdict == kind] for kind in said}
    lines = [f"{said[kind]}: {_listed(names)}." for kind, names in named.items() if names]
    gained = [v.name for v in verdicts if {f.verdict for f in v.findings} == {"better"}]
    if gained:
        told = "Significantly better on a headline metric and worse on none"
        lines.append(f"{told}: {_listed(gained)}.")
    return lines


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(plain(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def leaders(comparison: Comparison) -> list[str]:
    """Who leads each headline metric, as far as the tests can tell."""
    if len(comparison.systems) < 2:
        return []
    lines = []
    for columns in overview(comparison).values():
        for task, metric in columns:
            ranks = task.ranks.get(metric, {})
            first = [name for name, rank in ranks.items() if rank == 1]
            if not first or len(ranks) < 2:
                continue
            place = f"{plain(task.name)} {metric}"
            if metric in task.best:
                lines.append(
                    f"{place}: {plain(task.best[metric])}, significantly better than every other"
                )
            elif len(first) == len(ranks):
                lines.append(f"{place}: the test set does not tell the {len(ranks)} systems apart")
            elif len(first) == 1:
                lines.append(f"{place}: {plain(first[0])}, though not clearly ahead of every other")
            else:
                lines.append(f"{place}: {_listed(first)}; no system is significantly better")
    return lines


def _judge(
    comparison: Comparison, system: System, base: System, policy: Path | None
) -> SystemVerdict:
    findings = tuple(_findings(comparison, system.name))
    result = run_gate(system.paths, base.paths, policy)
    failed = tuple(line_of(c) for c in result.checks if c.verdict != "pass")
    return SystemVerdict(
        name=system.name,
        verdict=result.verdict,
        sign=SIGNS[result.verdict],
        words=_WORDS[result.verdict],
        reason=_reason(result),
        findings=findings,
        checks=failed,
        passed=sum(check.verdict == "pass" for check in result.checks),
    )


def _reason(result: GateResult) -> str:
    if result.error is not None:
        return plain(result.error)
    required = [check for check in result.checks if check.required]
    guilty = [check for check in required if check.verdict == result.verdict]
    places = ", ".join(dict.fromkeys(f"{plain(c.task)} {c.metric}" for c in guilty))
    if result.verdict == "pass":
        return (
            f"none of {len(required)} required checks shows a loss beyond its limit, and each test "
            "set could have shown one"
        )
    if result.verdict == "regression":
        return f"a loss beyond the limit is shown on {places}"
    if result.verdict == "inconclusive":
        needed = [c.samples_needed for c in guilty if c.samples_needed is not None]
        more = f"; about {max(needed):,} images or questions would tell" if needed else ""
        return f"neither a loss nor its absence is shown on {places}{more}"
    if not required:
        return "the runs hold nothing that the policy requires"
    return f"{places}: {plain(guilty[0].reason)}"


def _findings(comparison: Comparison, system: str) -> list[Finding]:
    found = []
    for columns in overview(comparison).values():
        for task, metric in columns:
            score = task.scores.get(system, {}).get(metric)
            if score is not None and score.difference is not None:
                verdict = score.difference.verdict
                if verdict in ("better", "worse"):
                    words = _words(task, metric, score.difference)
                    found.append(Finding(verdict, f"{MARKS[verdict]} {words}"))
    return found


def _words(task: TaskComparison, metric: str, difference: Difference) -> str:
    return (
        f"{plain(task.name)} {metric} {number(metric, difference.value, signed=True)} "
        f"{interval(metric, difference.ci95, signed=True)}"
    )
