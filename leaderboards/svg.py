"""Drawing by hand: SVG elements, linear axes with round ticks, and a frame to plot in.

Everything a caller passes as text or attribute is escaped, so a model's name is never markup.
Colours are classes of the page's style sheet, so that one drawing serves dark, light and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

SERIES = 8
"""Classes `s0` … `s7` of the style sheet; further series repeat the colours with another dash."""


def element(tag: str, *children: Markup | str, **attributes: object) -> Markup:
    """`<tag …>children</tag>`; text children and attributes are escaped.

    `class_` stands for `class`, an underscore for a hyphen; an attribute that is None is left out.
    """
    parts = [
        f' {name.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for name, value in attributes.items()
        if value is not None
    ]
    inner = Markup("").join(children)
    # Tag and attribute names come from this package's code alone.
    return Markup(f"<{tag}{''.join(parts)}>{inner}</{tag}>")


def drawing(width: float, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    """An `<svg>` that screen readers announce by its label."""
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {_value(width)} {_value(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )


def text(x: float, y: float, words: str, **attributes: object) -> Markup:
    """Text whose baseline starts at (x, y)."""
    return element("text", words, x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def rectangle(
    x: float, y: float, width: float, height: float, *children: Markup, **attributes: object
) -> Markup:
    """A rectangle; a negative size is none."""
    size = {"width": max(width, 0.0), "height": max(height, 0.0)}
    return element("rect", *children, x=x, y=y, **size, **attributes)


def polyline(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """A line through points."""
    path = " ".join(f"{_value(x)},{_value(y)}" for x, y in points)
    return element("polyline", points=path, **attributes)


def tip(words: str) -> Markup:
    """What shows when the pointer rests on the parent."""
    return element("title", words)


def series_class(place: int) -> str:
    """The colour and dash of the series at this place."""
    return f"s{place % SERIES} d{place // SERIES % 3}"


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value; those beyond the ends lie on them."""
        span = self.high - self.low
        share = (min(max(value, self.low), self.high) - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """About `count` round values within the axis."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / count
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(place * step, 12) + 0.0 for place in range(first, last + 1)]


def padded(
    values: Iterable[float], *, least: float = 1e-6, zero: bool = False
) -> tuple[float, float]:
    """Ends of an axis that holds all finite values with some air; with `zero` also 0."""
    finite = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    air = 0.06 * max(high - low, least)
    return low - air, high + air


def tick_label(value: float) -> str:
    """A round number without needless zeros."""
    return f"{value:g}".replace("-", "−")


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
