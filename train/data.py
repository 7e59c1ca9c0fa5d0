"""Preference data: rows in, checked `Pair`s out; every bad row has a place and a reason.

Formats (TRL's conventions): JSON lines, parquet, or a folder of `datasets`, with `images` (or
`image`), `prompt`, `chosen`, `rejected`; optional `id`, `references` (all texts that count as
right, for rewards; else `chosen`), `corrected` (the rejected answer mended) and `rejected_images`
(image contrast), and for the probe `paraphrase` (of the chosen answer) and `other_meaning` (in its
form); plain strings or lists of messages. Rows of public sets are read as `train/layouts.py` says.
Image paths are relative to the data file and may not leave its folder.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import sha256_of
from cwdpo_bench.train.layouts import UnknownLayout, as_pair_row
from cwdpo_bench.vlm import Prompt, open_image, path_inside


@dataclass(frozen=True)
class Masked:
    """An image of which a share of the pixels, drawn by `seed`, is replaced by its mean color."""

    source: ImageSource
    share: float
    seed: str

    def open(self, name: str) -> Image.Image:
        """Decode and mask; the same pixels every time."""
        pixels = np.array(_open(self.source, name))
        rng = np.random.default_rng(list(hashlib.sha256(self.seed.encode()).digest()))
        hidden = rng.random(pixels.shape[:2]) < self.share
        pixels[hidden] = pixels.reshape(-1, pixels.shape[-1]).mean(0).round().astype(pixels.dtype)
        return Image.fromarray(pixels)


ImageSource = Path | bytes | Masked


def _open(source: ImageSource, name: str) -> Image.Image:
    return source.open(name) if isinstance(source, Masked) else open_image(source, name=name)


@dataclass(frozen=True)
class Pair:
    """A prompt with its chosen and its rejected answer; images are opened when needed.

    Attributes:
        id: unique in its file.
        where: file and line, for messages.
        images: what the chosen answer describes.
        prompt: the user's turn.
        chosen: the better answer.
        rejected: the worse one, where there is one.
        references: what a reward compares an answer with, one text or more.
        corrected: the worse one with its faults mended, where the row brings it.
        rejected_images: what the rejected answer is judged under, where it is not `images`.
    """

    id: str
    where: str
    images: tuple[ImageSource, ...]
    prompt: str
    chosen: str
    rejected: str | None
    references: tuple[str, ...]
    corrected: str | None = None
    rejected_images: tuple[ImageSource, ...] | None = None
    paraphrase: str | None = None
    other_meaning: str | None = None

    def open(self) -> Prompt:
        """The prompt with its images decoded.

        Raises:
            UserError: an image is missing or broken; the row is named.
        """
        return Prompt(self.prompt, tuple(_open(source, self.where) for source in self.images))


@dataclass(frozen=True)
class PreferenceData:
    """The rows of one file, in order.

    Attributes:
        pairs: the good rows.
        dropped: reason and number of the bad rows that were skipped.
        fingerprint: SHA-256 of the file's bytes.
        layouts: what the rows were taken for, and how many.
        rows: on request the rows that the pairs were made of, their fields by our names.
    """

    pairs: list[Pair]
    dropped: dict[str, int]
    fingerprint: str
    layouts: dict[str, int]
    rows: list[dict[str, Any]]


_IMAGE_FIELDS = {"images", "image", "rejected_images"}


class _BadRow(Exception):
    """A reason to drop a row: a short class of fault, and the text with its place."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_pairs(
    path: Path,
    *,
    on_bad_row: Literal["stop", "skip"] = "stop",
    need_rejected: bool = True,
    with_images: bool = True,
    keep_rows: bool = False,
) -> PreferenceData:
    """Read and check a preference file without decoding its images.

    Args:
        path: `.jsonl`, `.parquet`, or a folder written by `datasets.save_to_disk`.
        on_bad_row: stop at the first bad row, or skip and count it by reason.
        need_rejected: whether rows without a rejected answer are bad.
        with_images: whether the images are wanted; without, they need not be there.
        keep_rows: whether the rows are wanted beside the pairs.

    Raises:
        UserError: the file is missing or unreadable, a row is bad (line, field, reason), two rows
            share an id, or no good row is left.
    """
    if not path.exists():
        raise UserError(f"{path}: no such preference data")
    pairs: list[Pair] = []
    kept_rows: list[dict[str, Any]] = []
    dropped: dict[str, int] = {}
    seen: dict[str, str] = {}
    layouts: Counter[str] = Counter()
    for where, row in rows_of(path):
        try:
            if isinstance(row, _BadRow):
                raise row
            try:
                layout, row = as_pair_row(row)
            except UnknownLayout as error:
                raise _BadRow("bad layout", str(error)) from error
            wanted = row.keys() - (set() if with_images else _IMAGE_FIELDS)
            pair = _pair({key: row[key] for key in wanted}, where, path, need_rejected)
            if pair.id in seen:
                raise _BadRow("doubled id", f"field id: {pair.id!r} stands at {seen[pair.id]} too")
        except _BadRow as bad:
            if on_bad_row == "stop":
                raise UserError(
                    f"{where}: {bad}; mend the row, or skip such rows with data.on_bad_row=skip"
                ) from bad
            dropped[bad.reason] = dropped.get(bad.reason, 0) + 1
            continue
        seen[pair.id] = where
        layouts[layout] += 1
        pairs.append(pair)
        if keep_rows:
            kept_rows.append(row)
    if not pairs:
        raise UserError(f"{path}: no usable row{f' (dropped: {dropped})' if dropped else ''}")
    return PreferenceData(pairs, dropped, fingerprint(path), dict(layouts), kept_rows)


def fingerprint(path: Path) -> str:
    """SHA-256 over a file, or over the files of a folder in the order of their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256_of(file for file in files if file.is_file())


def split_stages(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
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
    return [pairs[i] for i in first], [pairs[i] for i in second]


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any] | _BadRow]]:
    """The rows of a preference file as they stand, each with its place; none is checked."""
    if path.is_dir():
        yield from _dataset_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".json" and (whole := _json_document(path)) is not None:
        yield from whole
    elif path.suffix in {".jsonl", ".json"}:
        yield from _json_rows(path)
    else:
        raise UserError(f"{path}: not .jsonl, .parquet or a datasets folder")


def _json_document(path: Path) -> list[tuple[str, dict[str, Any] | _BadRow]] | None:
    """The rows of a file that is one JSON list, or one object of rows by id; None of any other."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError:
        return None
    if isinstance(document, dict) and all(isinstance(row, dict) for row in document.values()):
        named = [(f"{path}: row {key}", {"id": key, **row}) for key, row in document.items()]
        return list(named)
    if not isinstance(document, list):
        return None
    return [
        (
            f"{path}: row {number}",
            row if isinstance(row, dict) else _BadRow("not an object", "the row is no JSON object"),
        )
        for number, row in enumerate(document, start=1)
    ]


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | _BadRow]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{path}: line {number}"
            try:
                row = json.loads(raw.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield where, _BadRow("not JSON", f"not JSON ({error})")
                continue
            if isinstance(row, dict):
                yield where, row
            else:
                yield where, _BadRow("not an object", "the line is not a JSON object")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as parquet
    from pyarrow.lib import ArrowInvalid

    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({error})") from error
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", row


def _dataset_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{path}: not a folder written by datasets.save_to_disk") from error
    if isinstance(data, datasets.DatasetDict):
        raise UserError(f"{path}: holds the splits {sorted(data)}; name the folder of one of them")
    for column, feature in data.features.items():
        # Undecoded, so that a broken image is our clear error and not a decoder's.
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
    for number, row in enumerate(data, start=1):
        yield f"{path}: row {number}", row


def _pair(row: dict[str, Any], where: str, path: Path, need_rejected: bool) -> Pair:
    prompt = _text(row, "prompt", role="user")
    chosen = _text(row, "chosen", role="assistant")
    root = path.parent if path.is_file() else path
    images = tuple(_images(row.get("images", row.get("image")), "images", where, root))
    rejected, rejected_images = None, None
    if row.get("rejected_images") is not None:
        rejected_images = tuple(_images(row["rejected_images"], "rejected_images", where, root))
        if rejected_images == images:
            raise _BadRow("equal images", "fields images and rejected_images: the same images")
    if need_rejected or row.get("rejected") is not None:
        rejected = _text(row, "rejected", role="assistant")
        if rejected_images is None and normalized(chosen) == normalized(rejected):
            raise _BadRow("equal answers", "fields chosen and rejected: the same answer")
    corrected = None
    if row.get("corrected") is not None:
        corrected = _text(row, "corrected", role="assistant")
        if rejected is None:
            raise _BadRow("no rejected", "field corrected: needs the rejected answer it corrects")
    identity = row.get("id")
    if identity is not None and not isinstance(identity, str | int):
        raise _BadRow("bad id", "field id: not a string")
    return Pair(
        id=where.rsplit(" ", 1)[-1] if identity is None else str(identity),
        where=where,
        images=images,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        references=_references(row) or (chosen,),
        corrected=corrected,
        rejected_images=rejected_images,
        **{field: _optional_text(row, field) for field in ("paraphrase", "other_meaning")},
    )


def normalized(text: str) -> str:
    """The text without what makes no other answer: case, spacing, the full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def _references(row: dict[str, Any]) -> tuple[str, ...]:
    value = row.get("references")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _BadRow("bad references", "field references: not a list of texts")
    if not value or not all(text.strip() for text in value):
        raise _BadRow("empty references", "field references: empty, or holds an empty text")
    return tuple(value)


def _optional_text(row: dict[str, Any], field: str) -> str | None:
    return None if row.get(field) is None else _text(row, field, role="assistant")


def _text(row: dict[str, Any], field: str, role: str) -> str:
    value = row.get(field)
    if value is None:
        raise _BadRow(f"no {field}", f"field {field}: missing")
    if isinstance(value, list):
        value = _last_message(value, field, role)
    if not isinstance(value, str):
        raise _BadRow(f"bad {field}", f"field {field}: neither text nor a list of messages")
    if not value.strip():
        raise _BadRow(f"empty {field}", f"field {field}: empty")
    return value


def _last_message(messages: list[Any], field: str, role: str) -> Any:
    """The text of a one-message conversation, TRL's conversational form."""
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != role:
        raise _BadRow(f"bad {field}", f"field {field}: not one message of the role {role!r}")
    content = messages[0].get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(text for text in parts if text)
    return content


def _images(value: Any, field: str, where: str, root: Path) -> Iterator[Path | bytes]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes):
            yield item
        elif isinstance(item, str):
            try:
                path = path_inside(root, item, name=where)
            except UserError as error:
                raise _BadRow("image outside", f"field {field}: {item!r} leaves {root}") from error
            _check_header(path, item, field)
            yield path
        else:
            raise _BadRow("bad image", f"field {field}: neither a path nor bytes")


def _check_header(path: Path, written: str, field: str) -> None:
    """Find missing and foreign files before training starts; pixels are decoded when needed."""
    try:
        with Image.open(path):
            pass
    except FileNotFoundError as error:
        raise _BadRow("missing image", f"field {field}: {written!r} does not exist") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _BadRow("broken image", f"field {field}: {written!r} is not an image") from error
