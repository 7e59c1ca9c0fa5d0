"""Ranks with ties by significance: systems that cannot be told apart share a rank.

Being apart is not transitive (a from c, but neither from b), so systems are put in clusters, as the
WMT shared tasks do: a new rank starts only where every system above is significantly better than
every one below. Source: Bojar et al., Findings of WMT 2016, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from cwdpo_bench.leaderboards.paired import Drawn, Runs, difference, exact_p
from cwdpo_bench.leaderboards.significance import holm


def ranks_of(
    systems: Mapping[str, Runs],
    drawn: Mapping[str, Mapping[str, Drawn]],
    metrics: Mapping[str, bool | None],
    alpha: float,
) -> dict[str, dict[str, int]]:
    """The rank of each system on each metric that has a better side.

    All pairs are tested, with Holm over the pairs of a metric.

    Args:
        systems: by name, their runs.
        drawn: what `paired.resample` gave for them.
        metrics: name → whether higher is better; None is not ranked.
        alpha: the level at which two systems are apart.

    Returns:
        Metric → system → rank, 1 the best; after a shared rank as many numbers are left out.
    """
    found = {}
    for metric, higher in metrics.items():
        holders = {name: row[metric] for name, row in drawn.items() if metric in row}
        if higher is None or not holders:
            continue
        sign = 1.0 if higher else -1.0
        order = sorted(holders, key=lambda name: -sign * holders[name].value)
        found[metric] = _clustered(order, _apart(systems, holders, order, metric, alpha))
    return found


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


def _clustered(order: list[str], apart: set[tuple[str, str]]) -> dict[str, int]:
    ranks, start = {}, 0
    for place, name in enumerate(order):
        above, below = order[:place], order[place:]
        if all((one, other) in apart for one in above for other in below):
            start = place
        ranks[name] = start + 1
    return ranks
