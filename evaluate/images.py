"""The pictures of samples: looked for before a run, opened when their turn comes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample, ImageSource, RowImages
from cwdpo_bench.files import sha256_of
from cwdpo_bench.vlm import MAX_PIXELS, image_to_send, open_image, path_inside, png_of


def image_sources(sample: CaptionSample | ChoiceSample) -> tuple[ImageSource, ...]:
    """Where a sample's pictures are, in the order in which the prompt speaks of them."""
    return sample.images if isinstance(sample, ChoiceSample) else (sample.image,)


def open_images(sample: CaptionSample | ChoiceSample, root: Path) -> tuple[Image.Image, ...]:
    """A sample's pictures, decoded.

    Args:
        sample: its files are relative to `root`.
        root: the data root; no picture may lie outside it.

    Raises:
        UserError: one is missing, broken, too large or outside `root`; names the sample.
    """
    place = _place(sample)
    opened: list[Image.Image] = []
    for source in image_sources(sample):
        if isinstance(source, RowImages):
            opened += _of_row(source, place)
        else:
            opened.append(open_image(source, name=place, root=root))
    return tuple(opened)


def images_to_send(sample: CaptionSample | ChoiceSample, root: Path) -> list[tuple[str, bytes]]:
    """A sample's pictures for a server: media type and bytes; arguments and errors as above."""
    place = _place(sample)
    sent: list[tuple[str, bytes]] = []
    for source in image_sources(sample):
        if isinstance(source, RowImages):
            sent += [("image/png", png_of(image)) for image in _of_row(source, place)]
        else:
            sent.append(image_to_send(source, name=place, root=root))
    return sent


def _of_row(source: RowImages, place: str) -> list[Image.Image]:
    try:
        images = [image.convert("RGB") for image in source.load()]
    except Exception as error:
        # Whatever a task's own code, its data set, Pillow or the network may raise.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place}: images of {source.name} cannot be had ({reason})") from error
    for image in images:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{place}: an image of {source.name} has {image.width}x{image.height} pixels, more "
                f"than the limit of {MAX_PIXELS}"
            )
    return images


def refuse_missing_images(
    samples: Sequence[CaptionSample] | Sequence[ChoiceSample], root: Path, allowed: int = 0
) -> None:
    """Look for every image file without opening it, before the first hour of answers is spent.

    Args:
        samples: of one task.
        root: the data root.
        allowed: so many samples may lack a file; each fails when its turn comes.

    Raises:
        UserError: more do, or a file is outside `root`.
    """
    missing = []
    for sample in samples:
        place = _place(sample)
        sources = [source for source in image_sources(sample) if isinstance(source, Path)]
        paths = [path_inside(root, source, name=place) for source in sources]
        lost = [path for path in paths if not path.is_file()]
        if lost:
            missing.append(f"{place}: image {lost[0]} does not exist")
    if len(missing) > allowed:
        others = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}{others}")


def image_digests(sample: CaptionSample | ChoiceSample, root: Path) -> list[str]:
    """SHA-256 of each of a sample's pictures as they are encoded; of none where one is missing.

    Pictures of a data set's row are told by its name alone; the data have a digest of their own.

    Raises:
        UserError: a file lies outside `root`.
    """
    found = []
    for source in image_sources(sample):
        if isinstance(source, Path):
            path = path_inside(root, source, name=_place(sample))
            known = path.is_file()
            found.append(_file_digest(path, path.stat().st_mtime_ns) if known else "missing")
        elif isinstance(source, RowImages):
            found.append(f"row {source.name}")
        else:
            data = source if isinstance(source, bytes) else source.encode()
            found.append(hashlib.sha256(data).hexdigest())
    return found


@lru_cache(maxsize=4096)
def _file_digest(path: Path, changed: int) -> str:
    """Of a picture that many questions share, read once."""
    return sha256_of([path])


def _place(sample: CaptionSample | ChoiceSample) -> str:
    return f"sample {sample.id}"
