"""The pytest plugin: the fixture `assert_no_regression`, for a gate among a project's own tests.

It imports nothing heavy until the fixture is called: plugins are loaded in every session.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import pytest


class AssertNoRegression(Protocol):
    """The fixture's type, for annotations."""

    def __call__(
        self,
        candidate: str | Path,
        baseline: str | Path,
        policy: str | Path | None = None,
        *,
        inconclusive: Literal["fail", "pass"] | None = None,
    ) -> None:
        """Fail the test unless the gate passes."""


@pytest.fixture
def assert_no_regression() -> AssertNoRegression:
    """Fails the test unless the gate passes; the failure is the gate's own text.

    Call it with a candidate's run folder, a baseline (run folder, baseline file or
    `published:NAME`) and, where the package's policy does not do, a policy file. What is
    inconclusive fails too, unless `inconclusive="pass"`.
    """
    return _assert_no_regression


def _assert_no_regression(
    candidate: str | Path,
    baseline: str | Path,
    policy: str | Path | None = None,
    *,
    inconclusive: Literal["fail", "pass"] | None = None,
) -> None:
    __tracebackhide__ = True
    from cwdpo_bench.leaderboards.gate import run_gate
    from cwdpo_bench.leaderboards.gate_reports import to_text

    result = run_gate(candidate, baseline, policy, inconclusive=inconclusive)
    if result.exit_status != 0:
        pytest.fail(to_text(result), pytrace=False)
