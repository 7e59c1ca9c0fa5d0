"""Preference data: sources in, checked `Pair`s out; every bad row has a place and a reason.

Sources are files, folders and data sets of the Hub (`train/sources.py`), rows in TRL's form or a
public set's (`train/layouts.py`), checked by `train/pairs.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.kept_pairs import KeptPairs, keep_pairs, taken
from cwdpo_bench.train.layouts import AUTO, UnknownLayout, as_pair_row
from cwdpo_bench.train.pairs import Pair, normalized, pair_of
from cwdpo_bench.train.row_images import ImageSource, Masked, RowImages
from cwdpo_bench.train.sources import BadRow, Cell, fingerprint, rows_of

__all__ = [
    "ImageSource",
    "Masked",
    "Pair",
    "PreferenceData",
    "Reading",
    "fingerprint",
    "normalized",
    "read_pairs",
    "split_stages",
]


@dataclass(frozen=True)
class PreferenceData:
    """The rows of one file, in order.

    Attributes:
        pairs: the good rows, which lie in a file and not in memory.
        dropped: reason and number of the bad rows that were skipped.
        fingerprint: SHA-256 of the file's bytes.
        layouts: what the rows were taken for, and how many.
        rows: on request the rows that the pairs were made of, their fields by our names.
    """

    pairs: KeptPairs
    dropped: dict[str, int]
    fingerprint: str
    layouts: dict[str, int]
    rows: list[dict[str, Any]]


def read_pairs(
    path: Path,
    *,
    on_bad_row: Literal["stop", "skip"] = "stop",
    need_rejected: bool = True,
    with_images: bool = True,
    keep_rows: bool = False,
    image_root: Path | None = None,
    layout: str = AUTO,
    folder: Path | None = None,
) -> PreferenceData:
    """Read and check a preference file without decoding its images.

    Args:
        path: `.jsonl`, `.parquet`, a folder that `datasets` reads, or the name of a data set of the
            Hub (`owner/name`, `owner/name:split`).
        on_bad_row: stop at the first bad row, or skip and count it by reason.
        need_rejected: whether rows without a rejected answer are bad.
        with_images: whether the images are wanted; without, they need not be there.
        keep_rows: whether the rows are wanted beside the pairs.
        image_root: what image paths are relative to and may not leave; default the file's folder.
        layout: of the rows, see `train/layouts.py`; by default told by each row's fields.
        folder: where the pairs lie meanwhile; the system's temporary folder by default.

    Raises:
        UserError: the file is missing or unreadable, a row is bad (line, field, reason), two rows
            share an id, or no good row is left; the pairs' folder is full.
    """
    reading = Reading(path, on_bad_row, need_rejected, with_images, image_root, layout)
    rows: list[dict[str, Any]] = []

    def checked() -> Iterator[Pair]:
        for pair, row in reading.pairs():
            if keep_rows:
                if any(_has_cell(value) for value in row.values()):
                    raise UserError(
                        f"{pair.where}: the images stand in the table as bytes; rows can be "
                        "written on only where images are files beside them"
                    )
                rows.append(row)
            yield pair

    pairs = keep_pairs(checked(), folder)
    return PreferenceData(
        pairs, dict(reading.dropped), fingerprint(path), dict(reading.layouts), rows
    )


def _has_cell(value: object) -> bool:
    return isinstance(value, Cell) or (isinstance(value, list) and any(map(_has_cell, value)))


@dataclass
class Reading:
    """One pass over a preference source; what was found stands in it when the pass is over.

    Attributes:
        dropped: bad rows that were skipped, by reason.
        places: of each reason the first place.
        layouts: what good rows were taken for.
    """

    path: Path
    on_bad_row: Literal["stop", "skip"] = "stop"
    need_rejected: bool = True
    with_images: bool = True
    image_root: Path | None = None
    layout: str = AUTO
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    layouts: Counter[str] = field(default_factory=Counter)

    def pairs(self) -> Iterator[tuple[Pair, dict[str, Any]]]:
        """The good rows one by one, each as a pair and as the row that it was made of.

        Raises:
            UserError: as `read_pairs`.
        """
        images = RowImages(self.path, self.image_root) if self.with_images else None
        ids = _Ids()
        for where, row in rows_of(self.path):
            try:
                if isinstance(row, BadRow):
                    raise row
                try:
                    layout, row = as_pair_row(row, self.layout)
                except UnknownLayout as error:
                    raise BadRow("bad layout", str(error)) from error
                pair = pair_of(row, where, images, self.need_rejected)
                ids.add(pair.id, where)
            except BadRow as bad:
                if self.on_bad_row == "stop":
                    raise UserError(
                        f"{where}: {bad}; mend the row, or skip such rows with data.on_bad_row=skip"
                    ) from bad
                self.dropped[bad.reason] += 1
                self.places.setdefault(bad.reason, f"{where}: {bad}")
                continue
            self.layouts[layout] += 1
            yield pair, row
        if not self.layouts:
            first = next(iter(self.places.values()), "")
            dropped = f" (dropped: {dict(self.dropped)}; the first: {first})" if first else ""
            raise UserError(f"{self.path}: no usable row{dropped}")


class _Ids:
    """The ids that were met. A row without one is called by its number, which needs no memory: of
    such rows a mark a row is kept, and of the others where they stood."""

    def __init__(self) -> None:
        self._places: dict[str, int | str] = {}
        self._unnamed = bytearray()

    def add(self, identity: str, where: str) -> None:
        """Note one.

        Raises:
            BadRow: it was met before.
        """
        number = where.rsplit(" ", 1)[-1]
        unnamed = identity == number
        known = self._places.get(identity)
        if known is None and identity.isdecimal() and len(identity) < 12:
            place = int(identity)
            if place < len(self._unnamed) and self._unnamed[place]:
                known = place
        if known is not None:
            raise BadRow(
                "doubled id",
                f"field id: {identity!r} stands at {where[: -len(number)]}{known} too",
            )
        if unnamed and number.isdecimal():
            place = int(number)
            self._unnamed.extend(bytes(max(0, place + 1 - len(self._unnamed))))
            self._unnamed[place] = 1
        else:
            self._places[identity] = int(number) if number.isdecimal() else number


def split_stages(
    pairs: Sequence[Pair], share: float, seed: int
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Two disjoint parts for the two stages (SPEC 1: 75 % and 25 %), drawn by `seed`.

    Raises:
        UserError: too few pairs for a part to hold one.
    """
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    cut = round(share * len(pairs))
    if not 0 < cut < len(pairs):
        raise UserError(f"{len(pairs)} pairs cannot be split into two stages; bring more rows")
    first, second = sorted(order[:cut]), sorted(order[cut:])
    return taken(pairs, first), taken(pairs, second)
