"""The pictures of a report under one budget of bytes, most telling samples first.

The benchmarks' files are read by what the caller passes in (`PictureReader`); this module decides
which pictures go into the page and how small they must be.
"""

from __future__ import annotations

import base64
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import RunFolder
from cwdpo_bench.progress import progress_bar

BUDGET = 26_000_000
"""Bytes that a page has for its samples and, as base64 text, for their pictures."""

SIZES = ((320, 70), (256, 65), (192, 60), (160, 55), (128, 50), (112, 45))
"""Longer side in pixels and WebP's quality, from good to barely telling."""

MOST_PER_SAMPLE = 4
_TRIED = 24


class PictureReader(Protocol):
    """How pictures are found and shrunk; `evaluate.thumbnails` is one."""

    def sources(
        self, task: str, root: Path, data_sha256: str | None = None
    ) -> Mapping[str, Sequence[Any]]:
        """The pictures of a benchmark's samples by id; raises `UserError` where there are none."""

    def thumbnail(self, source: Any, root: Path, edge: int, quality: int) -> bytes:
        """A picture as WebP; raises `UserError` where it cannot be opened."""


class Wanted(NamedTuple):
    """A sample whose pictures are asked for."""

    task: str
    id: str


@dataclass
class Pictures:
    """What goes into the page.

    Attributes:
        encoded: base64 text of WebP files.
        of: sample → places in `encoded`.
        notes: what was left out, and why.
        edge: longer side of the pictures in pixels; 0 where there are none.
    """

    encoded: list[str] = field(default_factory=list)
    of: dict[Wanted, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    edge: int = 0


@dataclass(frozen=True)
class _Found:
    root: Path
    sources: Mapping[str, Sequence[Hashable]]


def gather_pictures(
    wanted: Sequence[Wanted],
    runs: Mapping[str, RunFolder],
    reader: PictureReader | None,
    data_root: Path | None = None,
    budget: int = BUDGET,
) -> Pictures:
    """Shrink the pictures of samples until they fit.

    Args:
        wanted: samples, the most telling first; those that fit no more are left out.
        runs: by task, a run that did it: its provenance says where the data lay.
        reader: None leaves all pictures out.
        data_root: where the data lie now, if not where the runs say.
        budget: bytes of base64 text that are left for them.
    """
    pictures = Pictures()
    if reader is None:
        pictures.notes.append("no pictures, as asked")
        return pictures
    found: dict[str, _Found] = {}
    for task in dict.fromkeys(sample.task for sample in wanted):
        try:
            found[task] = _find(task, runs[task], reader, data_root)
        except UserError as error:
            pictures.notes.append(f"{task}: no pictures: {error}")
    there = [s for s in wanted if s.task in found and s.id in found[s.task].sources]
    if there:
        _fill(pictures, there, found, reader, budget)
    return pictures


def _find(task: str, run: RunFolder, reader: PictureReader, data_root: Path | None) -> _Found:
    provenance = run.results["provenance"]
    stated = provenance.get("data_root")
    root = data_root or (Path(stated) if isinstance(stated, str) else None)
    if root is None:
        raise UserError("the run names no data root; name it with --data-root")
    hashes = provenance.get("data_sha256")
    sha256 = hashes.get(task) if isinstance(hashes, dict) else None
    return _Found(root, reader.sources(task, root, sha256))


def _fill(
    pictures: Pictures,
    samples: Sequence[Wanted],
    found: Mapping[str, _Found],
    reader: PictureReader,
    budget: int,
) -> None:
    # The circular orders of a question share their picture.
    asked = {
        s: [(s.task, p) for p in found[s.task].sources[s.id][:MOST_PER_SAMPLE]] for s in samples
    }
    distinct = list(dict.fromkeys(picture for places in asked.values() for picture in places))
    shrink = _Shrink(found, reader)
    pictures.edge, quality = _size_that_fits(distinct, shrink, budget)
    place: dict[tuple[str, Hashable], int] = {}
    used, left_out = 0, 0
    with progress_bar() as bars:
        bar = bars.add_task("pictures", total=len(distinct), note="")
        for picture in distinct:
            bars.advance(bar)
            if left_out:
                left_out += 1
                continue
            data = shrink(picture, pictures.edge, quality)
            if data is None:
                continue
            encoded = base64.b64encode(data).decode()
            used += len(encoded)
            if used > budget:
                left_out = 1
                continue
            place[picture] = len(pictures.encoded)
            pictures.encoded.append(encoded)
    pictures.of = {s: [place[p] for p in own if p in place] for s, own in asked.items()}
    if left_out:
        pictures.notes.append(
            f"{left_out:,} of {len(distinct):,} pictures are left out to keep the page small: "
            "those of the samples on which the systems differ least"
        )
    if shrink.failed:
        pictures.notes.append(
            f"{len(shrink.failed)} of {len(distinct):,} pictures could not be opened "
            f"({shrink.failed[0]})"
        )


class _Shrink:
    """Makes thumbnails and remembers which could not be made."""

    def __init__(self, found: Mapping[str, _Found], reader: PictureReader) -> None:
        self._found, self._reader = found, reader
        self.failed: list[str] = []

    def __call__(self, picture: tuple[str, Hashable], edge: int, quality: int) -> bytes | None:
        task, source = picture
        try:
            return self._reader.thumbnail(source, self._found[task].root, edge, quality)
        except UserError as error:
            self.failed.append(str(error))
            return None


def _size_that_fits(
    distinct: Sequence[tuple[str, Hashable]], shrink: _Shrink, budget: int
) -> tuple[int, int]:
    """The best of `SIZES` at which all pictures would fit, judged by a few of them."""
    step = max(1, len(distinct) // _TRIED)
    tried = distinct[::step][:_TRIED]
    for edge, quality in SIZES:
        sizes = [len(data) for picture in tried if (data := shrink(picture, edge, quality))]
        shrink.failed.clear()
        if sizes and len(distinct) * (sum(sizes) / len(sizes)) * 4 / 3 <= 0.95 * budget:
            return edge, quality
    return SIZES[-1]
