"""The gate: may this candidate replace the baseline? Each rule of the policy gets a verdict.

- pass: the limit is kept, and the test set could have told otherwise;
- regression: a change beyond the limit is shown;
- inconclusive: neither; it says how many samples would do;
- not judged: a missing task, another benchmark, other samples or settings.

What each rule tests stands in `judging.py`. Required rules are one family (Holm), so the chance
that a candidate within all limits is called a regression is the policy's level for the gate as a
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.leaderboards.judging import Question, Verdict, judge, put_question
from cwdpo_bench.leaderboards.paired import Drawn, Runs, resample
from cwdpo_bench.leaderboards.policy import ANY_TASK, Limit, Policy, Rule, load_policy
from cwdpo_bench.leaderboards.sides import PublishedSide, Side, load_candidate, load_side
from cwdpo_bench.leaderboards.signatures import grave_difference
from cwdpo_bench.leaderboards.significance import holm
from cwdpo_bench.leaderboards.statistics import TaskStatistics, check_same_samples

RESAMPLES = 10_000
SEED = 0

EXIT_STATUS: dict[Verdict, int] = {
    "pass": 0,
    "regression": 1,
    "inconclusive": 2,
    "not judged": 3,
}
OnInconclusive = Literal["fail", "pass"]


@dataclass(frozen=True)
class Check:
    """One limit of the policy on one task, and what came of it. Numbers on the metric's own scale.

    Attributes:
        task, group, metric: what was looked at; group None is the whole task.
        rule: the limit as the policy has it.
        required: whether it counts for the gate.
        verdict: see the module.
        reason: in a sentence, with the numbers.
        value: of the candidate.
        baseline: of the baseline.
        difference: candidate − baseline (or − the floor, for min_value).
        interval: of the difference, two-sided at 1 − 2·level: each end is a one-sided bound.
        p_holm: of "the limit is kept", one-sided, over the family.
        clusters: images or questions drawn.
        samples_needed: how many would settle it, where it is inconclusive and more would help.
    """

    task: str
    group: str | None
    metric: str
    rule: str
    required: bool
    verdict: Verdict
    reason: str
    value: float | None = None
    baseline: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_holm: float | None = None
    clusters: int | None = None
    samples_needed: int | None = None

    @property
    def name(self) -> str:
        """`nocaps [out-domain] CIDEr: max_drop 0, detect 8`."""
        part = "" if self.group is None else f" [{self.group}]"
        return f"{self.task}{part} {self.metric}: {self.rule}"


@dataclass(frozen=True)
class GateResult:
    """The gate's answer.

    Attributes:
        verdict: of all required checks: a regression outweighs what could not be judged, that
            outweighs what is inconclusive.
        exit_status: 0 pass, 1 regression, 2 inconclusive, 3 could not judge.
        checks: in the policy's order.
        candidate, baseline: as they are called.
        policy: where the rules come from.
        level: of false alarms over the required rules.
        error: why nothing could be judged at all; None where rules were looked at.
        notes: what a reader must know.
    """

    verdict: Verdict
    exit_status: int
    checks: tuple[Check, ...]
    candidate: str
    baseline: str
    policy: str
    level: float | None
    error: str | None = None
    notes: tuple[str, ...] = ()


def run_gate(
    candidate: str | Path | Sequence[str | Path],
    baseline: str | Path | Sequence[str | Path],
    policy: str | Path | Policy | None = None,
    *,
    inconclusive: OnInconclusive | None = None,
) -> GateResult:
    """Judge a candidate against a baseline. Mistakes in the input are an answer: "not judged".

    Args:
        candidate: a run folder, or those of a system's seeds: a list, or `NAME=FOLDER,FOLDER`.
        baseline: the same, a file of `gate --write-baseline`, or `published:NAME`.
        policy: a policy or its file; the package's own by default.
        inconclusive: in place of the policy's.
    """
    source = "its own" if isinstance(policy, Policy) else str(policy or "the default policy")
    try:
        rules = _policy(policy)
        sides = load_candidate(candidate), load_side(baseline)
        planned = list(_plan(rules, *sides))
    except UserError as error:
        return GateResult(
            verdict="not judged",
            exit_status=EXIT_STATUS["not judged"],
            checks=(),
            candidate=str(candidate),
            baseline=str(baseline),
            policy=source,
            level=None,
            error=str(error),
        )
    checks = tuple(_judged(planned, rules))
    verdict = _overall(checks)
    lenient = (inconclusive or rules.inconclusive) == "pass"
    return GateResult(
        verdict=verdict,
        exit_status=0 if verdict == "inconclusive" and lenient else EXIT_STATUS[verdict],
        checks=checks,
        candidate=sides[0].name,
        baseline=sides[1].name,
        policy=source,
        level=rules.level,
        notes=tuple(_notes(*sides)),
    )


def _policy(policy: str | Path | Policy | None) -> Policy:
    if isinstance(policy, Policy):
        return policy
    return load_policy(None if policy is None else Path(policy))


def to_json(result: GateResult) -> dict[str, Any]:
    """The answer as plain values."""
    return asdict(result)


def _overall(checks: tuple[Check, ...]) -> Verdict:
    verdicts = [check.verdict for check in checks if check.required]
    for verdict in ("regression", "not judged", "inconclusive"):
        if verdict in verdicts:
            return verdict
    # Nothing that was required was looked at, so nothing passed.
    return "pass" if verdicts else "not judged"


def _notes(candidate: Side, baseline: Side | PublishedSide) -> Iterator[str]:
    if isinstance(baseline, PublishedSide):
        yield (
            "the baseline is a published figure: a point of another model on other settings, whose "
            "own uncertainty is unknown; there is no paired test, and a verdict is no more than "
            "where the candidate's interval lies"
        )
    sides = [side for side in (candidate, baseline) if isinstance(side, Side)]
    if any(side.seeds > 1 for side in sides):
        told = ", ".join(f"{side.name}: {side.seeds}" for side in sides)
        yield (
            f"seeds ({told}): values are means over them, and their spread is part of every "
            "interval; more of them narrow it where more samples would not"
        )


# --- which checks there are ----------------------------------------------------------------------


class _Planned(NamedTuple):
    """A check to be made: its question, or why there is none."""

    task: str
    group: str | None
    rule: Rule
    limit: Limit
    question: Question | None
    why_not: str


def _plan(policy: Policy, candidate: Side, baseline: Side | PublishedSide) -> Iterator[_Planned]:
    parts = _Parts(candidate, baseline, sorted({rule.metric for rule in policy.rules}))
    for rule in policy.rules:
        for task, group in _places(rule, candidate, baseline):
            for limit in rule.limits():
                try:
                    question, why_not = parts.question(task, group, rule.metric, limit), ""
                except UserError as error:
                    question, why_not = None, str(error)
                yield _Planned(task, group, rule, limit, question, why_not)


def _places(
    rule: Rule, candidate: Side, baseline: Side | PublishedSide
) -> Iterator[tuple[str, str | None]]:
    """Where a rule applies; a place that it names is there even if a run lacks it."""
    tasks = [rule.task]
    if rule.task == ANY_TASK:
        tasks = [name for name in baseline.tasks if baseline.has(name, None, rule.metric)]
    for task in tasks:
        if rule.group != "*":
            yield task, rule.group
        elif task in candidate.tasks:
            yield from ((task, name) for name in sorted(candidate.tasks[task][0].group_names))
        else:
            yield task, None


class _Parts:
    """Parts of tasks, each resampled once for all metrics of the policy."""

    def __init__(self, candidate: Side, baseline: Side | PublishedSide, metrics: list[str]) -> None:
        self._candidate, self._baseline, self._metrics = candidate, baseline, metrics
        self._drawn: dict[tuple[str, str | None], dict[str, dict[str, Drawn]]] = {}
        self._same: dict[str, int] = {}

    def question(self, task: str, group: str | None, metric: str, limit: Limit) -> Question:
        """What `judge` needs for one limit.

        Raises:
            UserError: it cannot be judged, and why.
        """
        candidate, baseline = self._candidate, self._baseline
        if task not in candidate.tasks:
            raise UserError(f"{candidate.name} did not run {task}")
        own = [_part(run, group, candidate.name, task) for run in candidate.tasks[task]]
        for run in own:
            _need_metric(run, metric, candidate.name, task)
        other: list[TaskStatistics] = []
        if limit.kind != "min_value":
            if not baseline.has(task, group, metric):
                where = task if group is None else f"{task} [{group}]"
                raise UserError(f"{baseline.name} has no {metric} of {where}")
            if isinstance(baseline, Side):
                other = [_part(run, group, baseline.name, task) for run in baseline.tasks[task]]
        self._check_comparable(task, [candidate, baseline] if other else [candidate])
        drawn = self._resampled(task, group, own, other)
        point = None
        if limit.kind == "min_value":
            point = limit.value
        elif isinstance(baseline, PublishedSide):
            point = baseline.figures[task, metric, group]
        paired = drawn.get("baseline", {}).get(metric) if point is None else None
        return put_question(metric, limit, own, other, drawn["candidate"][metric], paired, point)

    def _check_comparable(self, task: str, sides: Sequence[Side | PublishedSide]) -> None:
        """All runs did the same task on the same samples."""
        if self._same.get(task, 0) >= len(sides):
            return
        runs = [
            (side.name, signature, statistics)
            for side in sides
            if isinstance(side, Side)
            for signature, statistics in zip(side.signatures[task], side.tasks[task], strict=True)
        ]
        (name, signature, first), *others = runs
        for other_name, other_signature, other in others:
            if told := grave_difference(signature, other_signature):
                raise UserError(f"the two runs did not do the same task ({told})")
            check_same_samples(first, other, f"{task}: {name}", other_name)
        self._same[task] = len(sides)

    def _resampled(
        self, task: str, group: str | None, own: Runs, other: Runs
    ) -> dict[str, dict[str, Drawn]]:
        found = self._drawn.get((task, group), {})
        if not found or (other and "baseline" not in found):
            systems = {"candidate": own} | ({"baseline": other} if other else {})
            found = resample(systems, self._metrics, resamples=RESAMPLES, seed=SEED)
            self._drawn[task, group] = found
        return found


def _part(task: TaskStatistics, group: str | None, name: str, where: str) -> TaskStatistics:
    if group is None:
        return task
    if group not in task.group_names:
        raise UserError(
            f"{name}: {where} has no group {group!r}; {nearest(group, task.group_names)}"
        )
    return task.group(group)


def _need_metric(part: TaskStatistics, metric: str, name: str, task: str) -> None:
    if metric not in part.blocks:
        raise UserError(f"{name}: {task} has no {metric}; {nearest(metric, part.blocks)}")


# --- what comes of them --------------------------------------------------------------------------


def _judged(planned: list[_Planned], policy: Policy) -> Iterator[Check]:
    """All checks, required and advisory rules each a family of their own."""
    adjusted: dict[int, float] = {}
    sizes: dict[bool, int] = {}
    for required in (True, False):
        family = [
            place
            for place, plan in enumerate(planned)
            if plan.question is not None and plan.rule.required is required
        ]
        p_values = [question.p for place in family if (question := planned[place].question)]
        adjusted |= dict(zip(family, holm(p_values), strict=True))
        sizes[required] = len(family)
    for place, plan in enumerate(planned):
        rule = plan.rule
        said = rule.describe(plan.limit.kind)
        if plan.question is None:
            yield Check(
                task=plan.task,
                group=plan.group,
                metric=rule.metric,
                rule=said,
                required=rule.required,
                verdict="not judged",
                reason=plan.why_not,
            )
            continue
        level = rule.level or policy.level
        answer = judge(plan.question, adjusted[place], level, sizes[rule.required])
        yield Check(
            task=plan.task,
            group=plan.group,
            metric=rule.metric,
            rule=said,
            required=rule.required,
            verdict=answer.verdict,
            reason=answer.reason,
            value=plan.question.value,
            baseline=plan.question.reference,
            difference=plan.question.difference,
            interval=answer.interval,
            p_holm=adjusted[place],
            clusters=plan.question.clusters,
            samples_needed=answer.samples_needed,
        )
