"""Pairs that lie in a file, not in memory: sets of rows may be larger than it.

The file has no name, so that its space is given back when the process ends, however it ends. A pair
is read when it is asked for, in some microseconds, and what is held of it is where it lies.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.pairs import Pair

_FIELDS = attrgetter(*(field.name for field in fields(Pair)))
_IMAGES, _REJECTED = (
    [field.name for field in fields(Pair)].index(name) for name in ("images", "rejected_images")
)


class Records:
    """Values of any kind in a file, by their number."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open the file in a folder, by default the system's for temporary files.

        Raises:
            UserError: nothing can be written there.
        """
        self._folder = folder or Path(tempfile.gettempdir())
        self._ends = array("q", [0])
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as we do
        except OSError as error:
            raise self._told(error) from error

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ends) - 1

    def add(self, value: Any) -> int:
        """Keep a value; returns its number. To be followed by `flush` before it is read.

        Raises:
            UserError: the disk is full.
        """
        data = pickle.dumps(value, protocol=5)
        try:
            self._file.write(data)
        except OSError as error:
            raise self._told(error) from error
        self._ends.append(self._ends[-1] + len(data))
        return len(self) - 1

    def flush(self) -> None:
        """Write what is buffered.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._told(error) from error

    def __getitem__(self, number: int) -> Any:
        """The value of a number, as new."""
        start, end = self._ends[number], self._ends[number + 1]
        # Neither a position nor mapped pages: several processes and threads may read.
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))

    def _told(self, error: OSError) -> UserError:
        return UserError(
            f"{self._folder}: rows cannot be kept there ({error.strerror}); free space there, or "
            "name another output, or TMPDIR where it is the temporary folder"
        )


class KeptPairs(Sequence[Pair]):
    """A sequence of pairs in a file; parts of it share the file."""

    def __init__(self, records: Records, places: npt.NDArray[np.int64]) -> None:
        """`places` are numbers of records, in the order of the sequence."""
        self._records, self._places = records, places

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> KeptPairs: ...

    def __getitem__(self, index: int | slice) -> Pair | KeptPairs:
        """A pair, read from the file, or a part of the sequence."""
        if isinstance(index, slice):
            return KeptPairs(self._records, self._places[index])
        return _pair(self._records[int(self._places[index])])

    def __iter__(self) -> Iterator[Pair]:
        """One after the other; none is held."""
        for place in self._places:
            yield _pair(self._records[int(place)])

    def __eq__(self, other: object) -> bool:
        """Whether it holds the pairs of any other sequence, in its order."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, index: Sequence[int]) -> KeptPairs:
        """The pairs of these indices, in their order."""
        return KeptPairs(self._records, self._places[np.asarray(index, dtype=np.int64)])


def keep_pairs(pairs: Iterable[Pair], folder: Path | None = None) -> KeptPairs:
    """Write pairs to a file as they come.

    Args:
        pairs: any number.
        folder: where the file lies; the system's temporary folder by default.

    Raises:
        UserError: the disk is full.
    """
    records = Records(folder)
    for pair in pairs:
        values = list(_FIELDS(pair))
        # A path is slow to write and to read; its text is not.
        values[_IMAGES] = _plain(values[_IMAGES])
        if values[_REJECTED] is not None:
            values[_REJECTED] = _plain(values[_REJECTED])
        records.add(values)
    records.flush()
    return KeptPairs(records, np.arange(len(records)))


def taken(pairs: Sequence[Pair], index: Sequence[int]) -> Sequence[Pair]:
    """The pairs of these indices, in their order; in the file where they lie in one."""
    return pairs.take(index) if isinstance(pairs, KeptPairs) else [pairs[i] for i in index]


def _plain(images: Sequence[Any]) -> list[Any]:
    return [str(source) if isinstance(source, Path) else source for source in images]


def _pair(values: list[Any]) -> Pair:
    values[_IMAGES] = _sources(values[_IMAGES])
    if values[_REJECTED] is not None:
        values[_REJECTED] = _sources(values[_REJECTED])
    return Pair(*values)


def _sources(images: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(Path(source) if isinstance(source, str) else source for source in images)
