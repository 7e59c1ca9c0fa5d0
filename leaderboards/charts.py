"""The report's charts: numbers in, one SVG out; every mark says its numbers when pointed at.

Nothing is told by colour alone: verdicts have signs, series have names and dashes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from cwdpo_bench.calibration.binned import ReliabilityBins
from cwdpo_bench.leaderboards.svg import (
    Axis,
    drawing,
    element,
    line,
    padded,
    polyline,
    rectangle,
    series_class,
    text,
    tick_label,
    tip,
)

_SHORT = 21
"""Longer names are cut in a chart; the whole name shows when pointed at."""


class Bar(NamedTuple):
    """A value or difference with its interval.

    Attributes:
        name: of the system or group.
        value, low, high: as shown (already × 100 where the metric is).
        words: the value and its sign as text.
        verdict: class of the mark: better, worse, higher, lower, same, or empty.
        series: place of the system among all, for its colour.
    """

    name: str
    value: float
    low: float
    high: float
    words: str
    verdict: str = ""
    series: int = 0


def forest(rows: Sequence[Bar], label: str) -> Markup:
    """Differences to the baseline with their intervals, a row a system, around a line at 0."""
    left, right, row = 150, 400, 24
    height = row * len(rows) + 26
    axis = Axis(*padded([end for r in rows for end in (r.low, r.high)], zero=True), left, right)
    bottom = row * len(rows) + 4
    parts = _grid(axis, 2, bottom)
    parts.append(line(axis.at(0), 2, axis.at(0), bottom, class_="zero"))
    for place, bar in enumerate(rows):
        y = row * place + row / 2 + 2
        said = f"{bar.name}: {bar.words}"
        marks = [
            tip(said),
            rectangle(0, y - row / 2, 560, row, class_="hit"),
            line(axis.at(bar.low), y, axis.at(bar.high), y, class_="whisker"),
            _mark(axis.at(bar.value), y, bar.verdict),
            text(left - 10, y + 4, _short(bar.name), text_anchor="end"),
            text(right + 12, y + 4, bar.words, class_="num"),
        ]
        parts.append(element("g", *marks, class_=f"row {bar.verdict}"))
    return drawing(560, height, label, parts)


def bars(rows: Sequence[Bar], ends: tuple[float, float], label: str) -> Markup:
    """Values from 0, a bar a system, with what was found against the baseline beside it.

    `ends` are the least and the greatest value of all groups, so that groups compare.
    """
    left, right, row = 150, 400, 17
    axis = Axis(min(0.0, ends[0]), max(0.0, ends[1]) or 1.0, left, right)
    parts = []
    for place, bar in enumerate(rows):
        y = row * place
        start, end = sorted((axis.at(0), axis.at(bar.value)))
        marks = [
            tip(f"{bar.name}: {bar.words}"),
            rectangle(start, y + 3, end - start, row - 5, class_=f"bar {series_class(bar.series)}"),
            text(left - 10, y + row - 4, _short(bar.name), text_anchor="end"),
            text(right + 12, y + row - 4, bar.words, class_=f"num {bar.verdict}"),
        ]
        parts.append(element("g", *marks))
    parts.append(line(axis.at(0), 0, axis.at(0), row * len(rows), class_="zero"))
    return drawing(560, row * len(rows) + 2, label, parts)


def reliability_chart(bins: ReliabilityBins, label: str, unit: str) -> Markup:
    """Accuracy against confidence by bin, its 95 % bands, and beneath how many fell into each.

    Args:
        bins: of `calibration.reliability`.
        label: for screen readers.
        unit: what was counted, "answers" or "tokens".
    """
    x, y = Axis(0, 1, 24, 158), Axis(0, 1, 156, 6)
    parts = [
        *(line(24, y.at(v), 158, y.at(v), class_="grid") for v in (0.0, 0.5, 1.0)),
        line(24, 156, 158, 6, class_="diagonal"),
        *(text(20, y.at(v) + 4, tick_label(v), text_anchor="end") for v in (0.0, 0.5, 1.0)),
        *(text(x.at(v), 216, tick_label(v), text_anchor="middle") for v in (0.0, 0.5, 1.0)),
    ]
    most = max(int(bins.counts.max()), 1)
    for place, count in enumerate(bins.counts):
        if not count:
            continue
        low, high = float(bins.edges[place]), float(bins.edges[place + 1])
        confidence, right = float(bins.confidence[place]), float(bins.accuracy[place])
        ends = float(bins.low[place]), float(bins.high[place])
        said = (
            f"confidence {low:.2f} to {high:.2f}: {count:,} {unit}, mean confidence "
            f"{confidence:.3f}, right {right:.3f}"
        )
        start, width = x.at(low), x.at(high) - x.at(low)
        middle, tall = start + width / 2, 34 * int(count) / most
        over = "over" if confidence > right else "under"
        marks = [
            tip(said),
            rectangle(start + 0.5, y.at(right), width - 1, 156 - y.at(right), class_="accuracy"),
            rectangle(
                start + 0.5,
                min(y.at(right), y.at(confidence)),
                width - 1,
                abs(y.at(right) - y.at(confidence)),
                class_=f"gap {over}",
            ),
            rectangle(start + 0.5, 202 - tall, width - 1, tall, class_="count"),
        ]
        if math.isfinite(ends[0]):
            whisker = line(middle, y.at(ends[0]), middle, y.at(ends[1]), class_="whisker")
            marks.append(whisker)
        parts.append(element("g", *marks))
    parts.append(text(24, 178, f"n ≤ {most:,}", class_="small"))
    return drawing(164, 220, label, parts)


class Curve(NamedTuple):
    """A named line; `series` is its place among all, for colour and dash."""

    name: str
    points: Sequence[tuple[float, float]]
    series: int


def risk_coverage_chart(curves: Sequence[Curve], label: str) -> Markup:
    """The share of wrong answers among those given, by the share that is given."""
    x = Axis(0, 1, 44, 384)
    top = max([0.05, *(risk for curve in curves for _, risk in curve.points)])
    y = Axis(0, min(1.0, top * 1.05), 200, 8)
    parts = [
        *(line(44, y.at(v), 384, y.at(v), class_="grid") for v in y.ticks()),
        *(text(38, y.at(v) + 4, tick_label(v), text_anchor="end") for v in y.ticks()),
        *(text(x.at(v), 218, tick_label(v), text_anchor="middle") for v in x.ticks()),
        text(214, 236, "coverage: share of questions answered", text_anchor="middle"),
        text(44, 250, "risk (upright): share of those that is wrong", class_="muted small"),
    ]
    for curve in curves:
        points = [(x.at(coverage), y.at(risk)) for coverage, risk in curve.points]
        style = series_class(curve.series)
        parts.append(element("g", tip(curve.name), polyline(points, class_=f"curve {style}")))
    return drawing(400, 256, label, parts)


class Moment(NamedTuple):
    """Where a verdict was earned: steps from `first` to `last`, and its name."""

    first: float
    last: float
    name: str


def curve_panel(
    curves: Sequence[Curve],
    ends: tuple[float, float],
    steps: tuple[float, float],
    label: str,
    *,
    moment: Moment | None = None,
    borders: Sequence[float] = (),
) -> Markup:
    """Curves over the update steps of one run.

    Args:
        curves: points (step, value).
        ends: of the upright axis, the same for all runs, so that panels compare.
        steps: first and last step of all runs.
        label: for screen readers.
        moment: of the verdict, shaded.
        borders: steps at which a stage begins.
    """
    x, y = Axis(*steps, 40, 212), Axis(*ends, 104, 6)
    parts = _step_axis(x, moment, borders, 6, 104)
    parts += [line(40, y.at(v), 212, y.at(v), class_="grid") for v in y.ticks(3)]
    parts += [text(36, y.at(v) + 4, tick_label(v), text_anchor="end") for v in y.ticks(3)]
    for curve in curves:
        points = [(x.at(step), y.at(value)) for step, value in curve.points]
        style = series_class(curve.series)
        marks = [polyline(points, class_=f"curve {style}")]
        marks += [
            element("circle", tip(f"{curve.name}, step {step:g}: {value:.3g}"), cx=px, cy=py, r=2.2)
            for (step, value), (px, py) in zip(curve.points, points, strict=True)
        ]
        parts.append(element("g", tip(curve.name), *marks, class_=f"dots {style}"))
    return drawing(220, 122, label, parts)


def histogram_panel(
    columns: Mapping[float, Sequence[float]],
    steps: tuple[float, float],
    label: str,
    *,
    moment: Moment | None = None,
    borders: Sequence[float] = (),
) -> Markup:
    """A histogram over time: a column a measurement, a row a tenth of [0, 1], dark where many are.

    Args:
        columns: step → the shares of the tenths, from 0 up.
        steps, label, moment, borders: as `curve_panel` takes them.
    """
    x, y = Axis(*steps, 40, 212), Axis(0, 1, 104, 6)
    parts = _step_axis(x, moment, borders, 6, 104)
    parts += [text(36, y.at(v) + 4, tick_label(v), text_anchor="end") for v in (0.0, 0.5, 1.0)]
    measured = sorted(columns)
    for place, step in enumerate(measured):
        before = measured[place - 1] if place else step
        after = measured[place + 1] if place + 1 < len(measured) else step
        start, end = x.at((before + step) / 2), x.at((step + after) / 2)
        if end - start < 3:
            start, end = x.at(step) - 2, x.at(step) + 2
        tenths = columns[step]
        for tenth, share in enumerate(tenths):
            if share > 0:
                low = tenth / len(tenths)
                top = y.at(low + 1 / len(tenths))
                said = f"step {step:g}: {100 * share:.0f} % within {low:.1f} to {low + 0.1:.1f}"
                cell = rectangle(
                    start,
                    top,
                    end - start,
                    y.at(low) - top,
                    tip(said),
                    class_="heat",
                    fill_opacity=round(0.15 + 0.85 * min(1.0, share), 3),
                )
                parts.append(cell)
    return drawing(220, 122, label, parts)


def _step_axis(
    x: Axis, moment: Moment | None, borders: Sequence[float], top: float, bottom: float
) -> list[Markup]:
    parts = []
    if moment is not None:
        start, end = x.at(moment.first), x.at(moment.last)
        if end - start < 3:
            start, end = start - 1.5, start + 1.5
        said = f"{moment.name}: steps {moment.first:g} to {moment.last:g}"
        shade = rectangle(
            start, top, end - start, bottom - top, tip(said), class_=f"moment {moment.name}"
        )
        parts.append(shade)
    parts += [line(x.at(b), top, x.at(b), bottom, class_="border") for b in borders]
    parts += [text(x.at(v), bottom + 14, tick_label(v), text_anchor="middle") for v in x.ticks(3)]
    parts.append(line(x.start, bottom, x.end, bottom, class_="axis"))
    return parts


def _grid(axis: Axis, top: float, bottom: float) -> list[Markup]:
    parts = []
    for value in axis.ticks():
        parts.append(line(axis.at(value), top, axis.at(value), bottom, class_="grid"))
        parts.append(text(axis.at(value), bottom + 15, tick_label(value), text_anchor="middle"))
    return parts


def _mark(x: float, y: float, verdict: str) -> Markup:
    """An upward, a downward triangle or a square: readable without colour."""
    shapes = {"better": -1, "higher": -1, "worse": 1, "lower": 1}
    if verdict not in shapes:
        return rectangle(x - 4, y - 4, 8, 8, class_="mark")
    way = shapes[verdict]
    points = " ".join(
        f"{px:.1f},{py:.1f}"
        for px, py in ((x - 6, y - 5 * way), (x + 6, y - 5 * way), (x, y + 6 * way))
    )
    return element("polygon", points=points, class_="mark")


def _short(name: str) -> str:
    return name if len(name) <= _SHORT else f"{name[: _SHORT - 1]}…"


def thinned(points: Sequence[tuple[float, float]], most: int = 160) -> list[tuple[float, float]]:
    """At most about `most` of the points, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    step = math.ceil(len(points) / most)
    return [*points[:-1][::step], points[-1]]
