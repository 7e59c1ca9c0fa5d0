"""The gate's policy: a YAML file of rules, each one limit or more on one metric.

Limits are written in the unit of the tables (points, value × 100, but for the metrics shown plain),
so that a mistake in the unit makes a rule too strict, never silently empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.leaderboards.display import scale
from cwdpo_bench.leaderboards.statistics import OWN_EDGES

DEFAULT_POLICY = Path(__file__).parent / "policies" / "default.yaml"
ANY_TASK = "*"

Kind = Literal["max_drop", "max_rise", "min_value", "non_inferior"]
KINDS: tuple[Kind, ...] = ("max_drop", "max_rise", "min_value", "non_inferior")


class Limit(NamedTuple):
    """One limit of a rule, on the metric's own scale."""

    kind: Kind
    value: float
    detect: float | None


class Rule(BaseModel):
    """What one metric must keep to.

    Attributes:
        metric: a name in `METRICS`.
        task: a benchmark, or "*" for every one of the baseline that has the metric.
        group: a part of it (a NoCaps domain), or "*" for each.
        max_drop: a drop that is shown to be larger is a regression.
        max_rise: the same for a rise, where less is better (ECE).
        min_value: the candidate's own value must not be lower.
        non_inferior: the margin by which the candidate may be worse; passes only where more is
            excluded.
        detect: for max_drop and max_rise: how far beyond the limit a change must be detectable.
        level: in place of the policy's.
        required: false tells the verdict without failing the gate.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    metric: str
    task: str = ANY_TASK
    group: str | None = None
    max_drop: float | None = Field(default=None, ge=0)
    max_rise: float | None = Field(default=None, ge=0)
    min_value: float | None = None
    non_inferior: float | None = Field(default=None, gt=0)
    detect: float | None = Field(default=None, gt=0)
    level: float | None = Field(default=None, gt=0, lt=0.5)
    required: bool = True

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; {nearest(self.metric, METRICS)}")
        higher = METRICS[self.metric].higher_is_better
        if not any(getattr(self, kind) is not None for kind in KINDS):
            raise ValueError(f"{self.metric} has no limit; write one of {', '.join(KINDS)}")
        if self.max_drop is not None and higher is False:
            raise ValueError(f"less {self.metric} is better; write max_rise in place of max_drop")
        if self.max_rise is not None and higher is True:
            raise ValueError(f"more {self.metric} is better; write max_drop in place of max_rise")
        if self.min_value is not None and higher is not True:
            raise ValueError(f"min_value needs a metric of which more is better, not {self.metric}")
        if self.non_inferior is not None and higher is None:
            raise ValueError(f"{self.metric} has no better side; non_inferior says nothing")
        if (self.max_drop is not None or self.max_rise is not None) and self.detect is None:
            raise ValueError(
                f"{self.metric}: write `detect` beside max_drop or max_rise: how far beyond the "
                "limit a change must be detectable, or passing would mean nothing"
            )
        if self.group is not None and self.metric in OWN_EDGES:
            raise ValueError(f"{self.metric} cannot be judged by group; its bins are the whole's")
        return self

    def limits(self) -> Iterator[Limit]:
        """The rule's limits, on the metric's own scale."""
        unit = scale(self.metric)
        detect = None if self.detect is None else self.detect / unit
        for kind in KINDS:
            value = getattr(self, kind)
            if value is not None:
                yield Limit(kind, value / unit, detect)

    def describe(self, kind: Kind) -> str:
        """The limit as the policy has it."""
        said = f"{kind} {getattr(self, kind):g}"
        return f"{said}, detect {self.detect:g}" if kind in ("max_drop", "max_rise") else said


class Policy(BaseModel):
    """All rules of a gate.

    Attributes:
        level: the chance of a false alarm over all required rules together.
        inconclusive: whether a gate that cannot tell fails.
        rules: what is checked.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    level: float = Field(default=0.05, gt=0, lt=0.5)
    inconclusive: Literal["fail", "pass"] = "fail"
    rules: list[Rule] = Field(min_length=1)


def load_policy(path: Path | None = None) -> Policy:
    """Read a policy file; without one, the policy that the package ships.

    Raises:
        UserError: no such file, no YAML, or a key, metric or value that is not one; the place is
            named, and for a misspelled word the nearest known one.
    """
    source = DEFAULT_POLICY if path is None else path
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such policy file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{source}:{line} not YAML ({problem})") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: a policy is a mapping with the key 'rules'")
    return policy_of(content, str(source))


def policy_of(content: dict[str, Any], source: str) -> Policy:
    """A policy from plain values; `source` names them in messages."""
    try:
        return Policy.model_validate(content)
    except ValidationError as error:
        told = "; ".join(_explain(dict(problem)) for problem in error.errors())
        raise UserError(f"{source}: {told}") from error


def _explain(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    place = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = Rule.model_fields if location[0] == "rules" else Policy.model_fields
        return f"{place}: unknown key; {nearest(location[-1], known)}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
