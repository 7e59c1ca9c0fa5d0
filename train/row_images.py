"""The images of a preference row: checked without decoding when it is read, opened when needed.

A row names files under one folder, which no path may leave, or brings the encoded bytes: in a
table, or as a `data:` address. Missing, foreign, broken and oversized ones are found by the header.
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.sources import BadRow, Cell, Stored, root_of
from cwdpo_bench.vlm import MAX_PIXELS, open_image, path_inside


@dataclass(frozen=True)
class Masked:
    """An image of which a share of the pixels, drawn by `seed`, is replaced by its mean color."""

    source: ImageSource
    share: float
    seed: str

    def open(self, name: str) -> Image.Image:
        """Decode and mask; the same pixels every time."""
        pixels = np.array(open_source(self.source, name))
        rng = np.random.default_rng(list(hashlib.sha256(self.seed.encode()).digest()))
        hidden = rng.random(pixels.shape[:2]) < self.share
        pixels[hidden] = pixels.reshape(-1, pixels.shape[-1]).mean(0).round().astype(pixels.dtype)
        return Image.fromarray(pixels)


ImageSource = Path | bytes | Stored | Masked


def open_source(source: ImageSource, name: str) -> Image.Image:
    """The image, decoded to RGB.

    Raises:
        UserError: missing, broken or too large; `name` says whose it is.
    """
    if isinstance(source, Masked):
        return source.open(name)
    return open_image(source.read() if isinstance(source, Stored) else source, name=name)


class RowImages:
    """Checks the images of a source's rows."""

    def __init__(self, data: Path, image_root: Path | None) -> None:
        """Find the folder that paths are relative to.

        Raises:
            UserError: `image_root` is no folder.
        """
        if image_root is not None and not image_root.is_dir():
            raise UserError(f"data.image_root: {image_root}: no such folder")
        self._root = image_root or root_of(data)
        # Rows share images; a file is looked at once.
        self._known: dict[str, Path] = {}

    def of(self, value: Any, field: str, where: str) -> Iterator[ImageSource]:
        """What a field holds: nothing, one image or a list.

        Args:
            value: of the field.
            field: its name.
            where: the row's place.

        Raises:
            BadRow: names the field.
        """
        values = value if isinstance(value, list) else [] if value is None else [value]
        for item in values:
            if isinstance(item, dict):
                item = item.get("bytes") or item.get("path")
            if isinstance(item, Cell):
                _check_header(item.data, "the image", field)
                yield item.stored()
            elif isinstance(item, bytes):
                _check_header(item, "the image", field)
                yield item
            elif isinstance(item, str) and item.startswith("data:"):
                yield _data_address(item, field)
            elif isinstance(item, str):
                yield self._file(item, field, where)
            else:
                raise BadRow("bad image", f"field {field}: neither a path nor bytes")

    def _file(self, item: str, field: str, where: str) -> Path:
        if (known := self._known.get(item)) is not None:
            return known
        if not item.strip():
            raise BadRow("bad image", f"field {field}: an empty path")
        if "\0" in item or not _is_unicode(item):
            raise BadRow("bad image", f"field {field}: {item!r} is no path")
        if "://" in item:
            raise BadRow(
                "image address",
                f"field {field}: {item!r} is an address; bring the image and write its path",
            )
        if self._root is None:
            raise BadRow(
                "image without root",
                f"field {field}: {item!r} is a path, and a data set of the Hub has no folder; name "
                "the images' folder with data.image_root",
            )
        try:
            path = path_inside(self._root, item, name=where)
            if not path.is_file():
                kind = "is a folder or no plain file" if path.exists() else "does not exist"
                raise BadRow("missing image", f"field {field}: {item!r} {kind}")
        except UserError as error:
            raise BadRow("image outside", f"field {field}: {item!r} leaves {self._root}") from error
        except (OSError, RuntimeError, ValueError) as error:
            # Too long a name, or a link that leads to itself.
            raise BadRow("bad image", f"field {field}: {item[:200]!r} is no path") from error
        _check_header(path, repr(item), field)
        self._known[item] = path
        return path


def _check_header(source: Path | bytes, told: str, field: str) -> None:
    """Find foreign, broken and oversized images; pixels are decoded when they are needed."""
    try:
        with warnings.catch_warnings():
            # Our own limit is below, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise BadRow("image too large", f"field {field}: {told} is too large to decode") from error
    except PermissionError as error:
        raise BadRow("broken image", f"field {field}: {told} cannot be read") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, OverflowError) as error:
        raise BadRow("broken image", f"field {field}: {told} is not an image") from error
    if width * height == 0:
        raise BadRow("broken image", f"field {field}: {told} has no pixels")
    if width * height > MAX_PIXELS:
        raise BadRow(
            "image too large",
            f"field {field}: {told} has {width}x{height} pixels, more than the limit of "
            f"{MAX_PIXELS}; scale it down",
        )


def _data_address(text: str, field: str) -> bytes:
    head, comma, body = text.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        data = base64.b64decode(body, validate=True)
    except ValueError as error:
        raise BadRow(
            "bad image", f"field {field}: not data:image/…;base64, and base64 text behind it"
        ) from error
    _check_header(data, "the image", field)
    return data


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
