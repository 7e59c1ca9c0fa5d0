"""A preference source read row by row as training reads it: what is good, what is not and where.

Nothing of a good row is kept but its id where it has one, so that a source may be larger than
memory; image files are looked at by their header.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo_bench.train.data import Reading
from cwdpo_bench.train.layouts import AUTO


def check_file(
    data: Path,
    *,
    with_images: bool = True,
    need_rejected: bool = True,
    image_root: Path | None = None,
    layout: str = AUTO,
) -> dict[str, Any]:
    """What `read_pairs` would make of a source; arguments are its own.

    Returns:
        `rows`, `good`, `layouts`: what good rows were taken for, `dropped`: bad rows by reason,
        `first`: of each reason the first place, with the words of its error.

    Raises:
        UserError: nothing is there, or no row is good.
    """
    reading = Reading(data, "skip", need_rejected, with_images, image_root, layout)
    good = sum(1 for _ in reading.pairs())
    return {
        "rows": good + reading.dropped.total(),
        "good": good,
        "layouts": dict(reading.layouts),
        "dropped": dict(reading.dropped.most_common()),
        "first": dict(reading.places),
    }
