"""Squeezing, likelihood displacement or healthy: the verdict on a run's curves, with its numbers.

"Why does my chosen log-probability fall, and is it a problem?" The rules compare each measurement
of a stage with its first, on held-out pairs, in nats a token (thresholds: `dynamics.verdict`):

- The chosen answers have *fallen* where ℓ̄(y_w) lies at least `fall` under the start, by more than
  `errors` standard errors of the pairs' changes.
- The top has *risen* where log p of the argmax token on the chosen answers' contexts lies at least
  `rise` over the start.

**Squeezing** (Ren and Sutherland, ICLR 2025): fallen and risen at once in `persist` measurements in
a row, and fallen still at the last one, while the rejected answers fell more than the chosen ones:
what both lost went to the answer that already led. Late in a run the top may fall as well, when the
policy has left the chosen answers' contexts; the verdict keeps what it saw.
**Displacement** (Razin et al., ICLR 2025): fallen in the last `persist` measurements without the
signs of squeezing.
**Healthy**: neither. A chosen answer that falls by less than `fall` is no finding.

An objective that pushes nothing down (SFT) cannot squeeze: the same signs are then told as
displacement, with the words "no rejected answer is pushed down: this is overfitting".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from cwdpo_bench.train.sections import VerdictRules

Name = Literal["healthy", "displacement", "squeezing"]
SEVERITY: tuple[Name, ...] = ("healthy", "displacement", "squeezing")


class Verdict(NamedTuple):
    """A name, the sentence that a user reads, and the numbers behind it."""

    name: Name
    sentence: str
    evidence: dict[str, float]

    def record(self) -> dict[str, Any]:
        """For `provenance.json` and `--json`."""
        return {"name": self.name, "sentence": self.sentence, "evidence": self.evidence}


class _Change(NamedTuple):
    """One measurement against the first of its stage."""

    step: int
    chosen: float
    error: float
    argmax: float
    rejected: float


def judge(
    rows: Sequence[dict[str, Any]], rules: VerdictRules, *, pushes_down: bool = True
) -> Verdict:
    """The verdict on the measurements of one stage, in their order.

    Args:
        rows: of `dynamics.parquet`, the first of them the start of the stage.
        rules: the recipe's thresholds.
        pushes_down: whether the objective lowers the rejected answers.
    """
    changes = [_change(row, rows[0]) for row in rows[1:]]
    evidence = _evidence(rows, changes)
    if not changes:
        return Verdict("healthy", "nothing to judge: one measurement", evidence)
    fallen = [_has_fallen(change, rules) for change in changes]
    squeezed = [
        down and change.argmax >= rules.rise and not change.rejected > change.chosen
        for down, change in zip(fallen, changes, strict=True)
    ]
    run = _first_run(squeezed, rules.persist)
    persists = len(changes) >= rules.persist and all(fallen[-rules.persist :])
    if run is not None and fallen[-1] and pushes_down:
        end = _end_of_run(squeezed, run)
        words = _squeezing_words(rows, changes, run, end)
        return Verdict("squeezing", words, evidence | _moment(changes, run, end))
    if persists:
        start = len(fallen) - fallen[::-1].index(False) if False in fallen else 0
        found = evidence | _moment(changes, start, len(changes) - 1)
        return Verdict("displacement", _displacement_words(changes, pushes_down), found)
    return Verdict("healthy", _healthy_words(changes[-1], rules), evidence)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several stages the gravest; the last of those as grave."""
    return max(reversed(verdicts), key=lambda verdict: SEVERITY.index(verdict.name))


def _change(row: dict[str, Any], start: dict[str, Any]) -> _Change:
    def since(column: str) -> float:
        value = float(row.get(column, math.nan)) - float(start.get(column, math.nan))
        return value

    error = float(row.get("chosen_change_error", 0.0))
    return _Change(
        int(row["step"]),
        since("chosen_mean_logp"),
        0.0 if math.isnan(error) else error,
        since("argmax_mean_logp"),
        since("rejected_mean_logp"),
    )


def _has_fallen(change: _Change, rules: VerdictRules) -> bool:
    return change.chosen <= -rules.fall and change.chosen < -rules.errors * change.error


def _first_run(flags: Sequence[bool], length: int) -> int | None:
    """Where the first run of `length` true values begins."""
    for start in range(len(flags) - length + 1):
        if all(flags[start : start + length]):
            return start
    return None


def _end_of_run(flags: Sequence[bool], start: int) -> int:
    """The last place of the run of true values that holds `start`."""
    end = start
    while end + 1 < len(flags) and flags[end + 1]:
        end += 1
    return end


def _moment(changes: Sequence[_Change], first: int, last: int) -> dict[str, float]:
    """The steps of the stage between which the verdict's signs were there."""
    return {"first_step": changes[first].step, "last_step": changes[last].step}


def _evidence(rows: Sequence[dict[str, Any]], changes: Sequence[_Change]) -> dict[str, float]:
    """What the sentence rests on; JSON has no NaN, so what is not known is absent."""
    found: dict[str, float] = {}
    if changes:
        last = changes[-1]
        found = {
            "chosen_change": last.chosen,
            "chosen_change_error": last.error,
            "argmax_change": last.argmax,
            "largest_argmax_change": max(change.argmax for change in changes),
            "rejected_change": last.rejected,
        }
    for column in ("top1_probability", "token_ece"):
        found[f"{column}_start"] = float(rows[0].get(column, math.nan))
        found[f"{column}_end"] = float(rows[-1].get(column, math.nan))
    greedy = _known(rows, "greedy_mean_logp")
    if len(greedy) > 1:
        found["greedy_change"] = greedy[-1] - greedy[0]
    return {name: round(value, 4) for name, value in found.items() if math.isfinite(value)}


def _known(rows: Sequence[dict[str, Any]], column: str) -> list[float]:
    values = [float(row.get(column, math.nan)) for row in rows]
    return [value for value in values if math.isfinite(value)]


def _squeezing_words(
    rows: Sequence[dict[str, Any]],
    changes: Sequence[_Change],
    first: int,
    end: int,
) -> str:
    begin, at = changes[first], changes[end]
    words = (
        f"squeezing: at steps {begin.step} to {at.step} the chosen answers had lost "
        f"{-at.chosen:.2f} nats a token and the rejected ones {-at.rejected:.2f}, while the argmax "
        f"token gained {at.argmax:.2f}"
    )
    greedy = _known(rows[: end + 2], "greedy_mean_logp")
    if len(greedy) > 1 and greedy[-1] > greedy[0]:
        words += f" and the greedy answer y* {greedy[-1] - greedy[0]:.2f}"
    last = changes[-1]
    if last.step != at.step:
        side = "gained" if last.argmax > 0 else "lost"
        words += (
            f"; by step {last.step} the chosen answers have lost {-last.chosen:.2f} and the argmax "
            f"token has {side} {abs(last.argmax):.2f}"
        )
    return words


def _displacement_words(changes: Sequence[_Change], pushes_down: bool) -> str:
    last = changes[-1]
    words = f"displacement: the chosen answers have lost {-last.chosen:.2f} nats a token"
    if not pushes_down:
        return f"{words}; no rejected answer is pushed down: this is overfitting"
    if math.isfinite(last.rejected):
        verb = "lost" if last.rejected < 0 else "gained"
        words += f" (the rejected ones {verb} {abs(last.rejected):.2f})"
    side = "gained" if last.argmax > 0 else "lost"
    return f"{words}; the argmax token has {side} {abs(last.argmax):.2f}: no sign of squeezing"


def _healthy_words(last: _Change, rules: VerdictRules) -> str:
    verb = "gained" if last.chosen >= 0 else "lost"
    limit = "" if last.chosen >= 0 else f", less than the {rules.fall:g} that count as a fall"
    if last.chosen <= -rules.fall:
        limit = ", not yet for good"
    return f"healthy: the chosen answers have {verb} {abs(last.chosen):.2f} nats a token{limit}"
