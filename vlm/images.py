"""Opening images that users bring: bounded in size, inside their root, one clear error a fault."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from cwdpo_bench.errors import UserError

MAX_PIXELS = 64_000_000
"""Refused above this many pixels before decoding: a few kilobytes can unfold to gigabytes."""

MAX_SENT = 8_000_000
"""Bytes of a file that is sent as it is."""
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png"}
_OF_PIXELS = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "adobe", "adobe_transform"}
_OF_PIXELS |= {"progressive", "progression", "dpi", "gamma", "srgb", "chromaticity", "icc_profile"}
"""What Pillow tells of a file that says nothing of where and when it was made."""


def path_inside(root: Path, relative: str | Path, *, name: str) -> Path:
    """Resolve `relative` under `root`, following links.

    Raises:
        UserError: the path leaves `root`; `name` says where it was written.
    """
    resolved = (root / relative).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise UserError(
            f"{name}: image path {str(relative)!r} leaves the data folder {root}; "
            "put the image inside it"
        )
    return resolved


def open_image(
    source: Path | bytes | str,
    *,
    name: str,
    root: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    coarse: int | None = None,
) -> Image.Image:
    """Decode an image to RGB.

    Args:
        source: a path, the encoded bytes, or their base64 text.
        name: what an error calls the image: the file and line, or the sample's id.
        root: where set, a path may not leave this folder and is relative to it.
        max_pixels: the largest width times height that is decoded.
        coarse: where set, a JPEG may be decoded at a fraction of its size, several times faster,
            its sides at least so long (or whole where it is smaller).

    Raises:
        UserError: missing, unreadable, too large, not an image, or outside `root`.
    """
    return _decode(*_read(source, name, root), max_pixels, coarse)


def image_to_send(
    source: Path | bytes | str, *, name: str, root: Path | None = None
) -> tuple[str, bytes]:
    """An image for another program: its media type and its bytes.

    JPEG and PNG of at most `MAX_SENT` bytes go as they are, unless they hold more than pixels or
    pixels that another program may show otherwise (transparency, a rotation in EXIF, CMYK);
    everything else goes as PNG of what `open_image` gives. Arguments and errors are its own.
    """
    data, where = _read(source, name, root)
    image = _decode(data, where, MAX_PIXELS, None)
    with Image.open(io.BytesIO(data)) as header:
        kind = _SENT_AS_THEY_ARE.get(str(header.format))
        plain = header.mode in {"RGB", "L"} and set(header.info) <= _OF_PIXELS
    if kind is not None and plain and len(data) <= MAX_SENT:
        return kind, data
    return "image/png", png_of(image)


def png_of(image: Image.Image) -> bytes:
    """The same pixels on the other side, and nothing but pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _read(source: Path | bytes | str, name: str, root: Path | None) -> tuple[bytes, str]:
    """An image as it is encoded, and what an error calls it."""
    if isinstance(source, Path):
        path = path_inside(root, source, name=name) if root is not None else source
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"{name}: image {path} does not exist") from error
        except OSError as error:
            raise UserError(f"{name}: image {path} cannot be read ({error.strerror})") from error
        return data, f"{name}: image {path}"
    if isinstance(source, str):
        try:
            return base64.b64decode(source, validate=True), f"{name}: image"
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{name}: the image is not base64 text ({error})") from error
    return source, f"{name}: image"


@contextmanager
def _cut_off_refused() -> Iterator[None]:
    """Pillow's switch for images that end too early is the process's, and lmms-eval turns it on."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _decode(data: bytes, where: str, max_pixels: int, coarse: int | None) -> Image.Image:
    try:
        with warnings.catch_warnings(), _cut_off_refused():
            # Pillow's own bomb warning is replaced by our limit, checked before any decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise UserError(
                        f"{where} has {width}x{height} pixels, more than the limit of "
                        f"{max_pixels}; scale it down"
                    )
                if coarse is not None:
                    image.draft("RGB", (coarse, coarse))
                if image.mode.startswith("I;16"):
                    # Pillow would cut all that is above 255 off, and so turn it white.
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        # Pillow's own text names an object in memory.
        raise UserError(f"{where} is broken or of no known image format; replace it") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{where} is broken ({error}); replace it") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} is too large to decode ({error}); scale it down") from error
