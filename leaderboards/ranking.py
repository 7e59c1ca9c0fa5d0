"""Ranks with ties by significance: one more than the number of systems that are clearly better.

Being apart is not transitive (a from c, but neither from b): a and b are then first and c second.
The clusters of the WMT shared tasks would put all three on one rank, and with many systems nearly
everything there. Source: Chiang et al., Chatbot Arena (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

from cwdpo_bench.leaderboards.paired import Drawn, Runs, difference, exact_p
from cwdpo_bench.leaderboards.significance import holm


class Ranking(NamedTuple):
    """Where systems stand.

    Attributes:
        ranks: metric → system → rank, 1 where no system is significantly better.
        best: metric → the system that is significantly better than every other, where one is.
    """

    ranks: dict[str, dict[str, int]]
    best: dict[str, str]


def rank_systems(
    systems: Mapping[str, Runs],
    drawn: Mapping[str, Mapping[str, Drawn]],
    metrics: Mapping[str, bool | None],
    alpha: float,
) -> Ranking:
    """The rank of each system on each metric that has a better side and that two systems have.

    All pairs are tested, with Holm over the pairs of a metric.

    Args:
        systems: by name, their runs.
        drawn: what `paired.resample` gave for them.
        metrics: name → whether higher is better; None is not ranked.
        alpha: the level at which two systems are apart.
    """
    ranks, best = {}, {}
    for metric, higher in metrics.items():
        holders = {name: row[metric] for name, row in drawn.items() if metric in row}
        if higher is None or len(holders) < 2:
            continue
        sign = 1.0 if higher else -1.0
        order = sorted(holders, key=lambda name: -sign * holders[name].value)
        apart = _apart(systems, holders, order, metric, alpha)
        ranks[metric] = {name: 1 + sum((other, name) in apart for other in order) for name in order}
        if all((order[0], other) in apart for other in order[1:]):
            best[metric] = order[0]
    return Ranking(ranks, best)


def _apart(
    systems: Mapping[str, Runs],
    holders: Mapping[str, Drawn],
    order: list[str],
    metric: str,
    alpha: float,
) -> set[tuple[str, str]]:
    """The pairs (better, worse) that are significantly apart."""
    pairs = list(combinations(order, 2))
    clusters = systems[order[0]][0].cluster_count
    tested = [
        difference(
            holders[one],
            holders[other],
            clusters,
            exact_p(systems[one], systems[other], [metric]).get(metric),
        )
        for one, other in pairs
    ]
    adjusted = holm([pair.p for pair in tested])
    return {
        names
        for names, pair, p in zip(pairs, tested, adjusted, strict=True)
        if p <= alpha and pair.value != 0.0
    }
