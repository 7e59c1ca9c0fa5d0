"""Where preference rows come from: a file, a folder or a data set of the Hub. None is checked here.

JSON lines are read line by line, parquet group by group, and what `datasets` gives lies in a
memory-mapped file, so that memory never holds a whole source. Images that stand in a table as bytes
stay there too: a row carries a `Cell`, and what is kept of it is `Stored`, which reads the bytes
again when the image is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from cwdpo_bench.errors import UserError, one_line
from cwdpo_bench.files import sha256_of

LONGEST_LINE = 64 * 2**20
"""Bytes of a line of JSON; a longer one is a file without line breaks."""
SUFFIXES = (".jsonl", ".json", ".parquet")
_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.-]+))?")

Fields = dict[str, Any]
ReadBytes = Callable[[], bytes]


class BadRow(Exception):
    """A reason to drop a row: a short class of fault, and the text with its place."""

    def __init__(self, reason: str, detail: str) -> None:
        """Take both."""
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Stored:
    """An image that lies in a table; equal where the bytes are."""

    digest: str
    read: ReadBytes = field(compare=False, repr=False)


@dataclass(frozen=True)
class Cell:
    """An image as a table's row brings it: its bytes, and how to get them again."""

    data: bytes
    read: ReadBytes

    def stored(self) -> Stored:
        """What is kept of it."""
        return Stored(hashlib.sha256(self.data).hexdigest(), self.read)


class HubSet(NamedTuple):
    """A data set of the Hub: `owner/name`, `owner/name:split`, `owner/name:configuration:split`."""

    name: str
    config: str | None
    split: str | None


Placed = Iterator[tuple[str, Fields | BadRow]]


def rows_of(data: Path) -> Placed:
    """The rows as they stand, each with its place for messages.

    Raises:
        UserError: nothing is there, or it is no preference data.
    """
    if data.is_dir():
        return _dataset_rows(data, data)
    if data.is_file():
        if data.suffix == ".parquet":
            return _parquet_rows(data)
        if data.suffix == ".json" and (whole := _json_document(data)) is not None:
            return iter(whole)
        if data.suffix in SUFFIXES:
            return _json_rows(data)
        raise UserError(f"{data}: not .jsonl, .parquet or a datasets folder")
    if (hub := hub_set(data)) is None:
        raise UserError(f"{data}: no such preference data")
    return _dataset_rows(data, hub)


def hub_set(data: Path) -> HubSet | None:
    """The data set of the Hub that a name which is no file stands for; None where it is a path."""
    found = _ID.fullmatch(str(data))
    if found is None or data.exists() or data.suffix in SUFFIXES or data.parent.is_dir():
        return None
    first, second = found["first"], found["second"]
    return HubSet(found["name"], first if second else None, second or first)


def root_of(data: Path) -> Path | None:
    """The folder that image paths are relative to; None for a data set of the Hub."""
    if data.is_dir():
        return data
    return data.parent if data.is_file() else None


def fingerprint(data: Path) -> str:
    """SHA-256 over a file, over the files of a folder in the order of their names, or over what the
    Hub's data set has become on disk."""
    if (hub := hub_set(data)) is not None:
        files = [Path(one["filename"]) for one in _from_hub(hub).cache_files]
    else:
        files = sorted(data.rglob("*")) if data.is_dir() else [data]
    return sha256_of(file for file in files if file.is_file())


# --- JSON ----------------------------------------------------------------------------------------


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number; write null or leave the field out")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _json_document(path: Path) -> list[tuple[str, Fields | BadRow]] | None:
    """The rows of a file that is one JSON list, or one object of rows by id; None of any other."""
    try:
        document = _DECODER.decode(path.read_bytes().decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error
    except json.JSONDecodeError as error:
        if _is_lines(path):
            return None
        raise UserError(
            f"{path}: line {error.lineno}: not JSON ({error.msg}); mend it: the file is cut off or "
            "was edited by hand"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); write UTF-8") from error
    if isinstance(document, dict) and all(isinstance(row, dict) for row in document.values()):
        named = [(f"{path}: row {key}", {"id": key, **row}) for key, row in document.items()]
        return list(named)
    if not isinstance(document, list):
        return None
    return [
        (
            f"{path}: row {number}",
            row if isinstance(row, dict) else BadRow("not an object", "the row is no JSON object"),
        )
        for number, row in enumerate(document, start=1)
    ]


def _is_lines(path: Path) -> bool:
    """Whether the first line alone is a row: JSON lines under the other ending."""
    with path.open("rb") as file:
        first = next((line for line in _lines(file) if line.strip()), b"")
    return isinstance(_parsed(first), dict)


def _json_rows(path: Path) -> Placed:
    with path.open("rb") as file:
        for number, raw in enumerate(_lines(file), start=1):
            if number == 1:
                # Editors of another system begin a file with this mark.
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw and not raw.isspace():
                yield f"{path}: line {number}", _parsed(raw)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines; of one that is too long its beginning alone."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE + 1)


def _parsed(raw: bytes) -> Fields | BadRow:
    if len(raw) > LONGEST_LINE:
        return BadRow("too long", f"longer than {LONGEST_LINE:,} bytes; write one row a line")
    try:
        row = _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        return BadRow("not JSON", f"not JSON: not UTF-8 ({error.reason}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"not JSON ({error})")
    if isinstance(row, dict):
        return row
    listed = "; a list of rows is read from a file named .json" if isinstance(row, list) else ""
    return BadRow("not an object", f"the line is not a JSON object{listed}")


# --- parquet -------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Placed:
    import pyarrow.parquet as parquet
    from pyarrow.lib import ArrowException

    number = 0
    try:
        table = parquet.ParquetFile(path)
        for group in range(table.num_row_groups):
            place = 0
            for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                for row in batch.to_pylist():
                    number += 1
                    read = _ParquetCell(path, group, place)
                    yield f"{path}: row {number}", _with_cells(row, read)
                    place += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file, or a broken one ({error})") from error


@dataclass(frozen=True)
class _ParquetCell:
    path: Path
    group: int
    place: int

    def __call__(self, column: str, item: int | None) -> bytes:
        value = _column(self.path, self.group, column)[self.place].as_py()
        return _bytes_in(value if item is None else value[item]) or b""


@lru_cache(maxsize=2)
def _column(path: Path, group: int, column: str) -> Any:
    """A column of a row group; pairs are prepared in order, so the last one is wanted again."""
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


# --- datasets ------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _saved(path: Path) -> Any:
    """What `save_to_disk` wrote, or else the data files of the folder."""
    import datasets

    saved = [name for name in ("state.json", "dataset_dict.json") if (path / name).is_file()]
    if not saved and not any(path.rglob("*.parquet")) and not any(path.rglob("*.json*")):
        raise UserError(f"{path}: not a folder written by datasets.save_to_disk, nor of data files")
    try:
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{path}: not a folder written by datasets.save_to_disk, nor of data files that "
            f"datasets reads ({one_line(error)})"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if saved or len(found) > 1:
            raise UserError(
                f"{path}: holds the splits {sorted(found)}; name the folder or file of one of them"
            )
        (found,) = found.values()
    return _undecoded(found)


@lru_cache(maxsize=4)
def _from_hub(hub: HubSet) -> Any:
    """A data set of the Hub, or of the cache where there is no network; never its own code."""
    import datasets

    try:
        found = datasets.load_dataset(hub.name, hub.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{hub.name}: no such file, and no data set that the Hub or the cache gives "
            f"({one_line(error)})"
        ) from error
    split = next(iter(found)) if hub.split is None and len(found) == 1 else hub.split
    if split not in found:
        raise UserError(
            f"{hub.name}: holds the splits {sorted(found)}; name one of them, as in "
            f"{hub.name}:{min(found)}"
        )
    return _undecoded(found[split])


def _undecoded(data: Any) -> Any:
    """Images as bytes, so that a broken one is our clear error and not a decoder's."""
    import datasets

    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return data


def _opened(source: Path | HubSet) -> Any:
    return _saved(source) if isinstance(source, Path) else _from_hub(source)


def _dataset_rows(path: Path, source: Path | HubSet) -> Placed:
    for number, row in enumerate(_opened(source), start=1):
        yield f"{path}: row {number}", _with_cells(row, _DatasetCell(source, number - 1))


@dataclass(frozen=True)
class _DatasetCell:
    source: Path | HubSet
    place: int

    def __call__(self, column: str, item: int | None) -> bytes:
        value = _opened(self.source)[self.place][column]
        return _bytes_in(value if item is None else value[item]) or b""


# --- images in tables ----------------------------------------------------------------------------


def _with_cells(row: Fields, read: Callable[[str, int | None], bytes]) -> Fields:
    """The row with its encoded images as cells."""

    def cell(value: Any, column: str, item: int | None) -> Any:
        data = _bytes_in(value)
        return value if data is None else Cell(data, partial(read, column, item))

    return {
        column: [cell(one, column, item) for item, one in enumerate(value)]
        if isinstance(value, list)
        else cell(value, column, None)
        for column, value in row.items()
    }


def _bytes_in(value: Any) -> bytes | None:
    """Encoded bytes: as they are, or in the form that `datasets` gives an undecoded image."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        value = value["bytes"]
    return value if isinstance(value, bytes) else None
