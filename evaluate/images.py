"""The pictures of samples: looked for before a run, opened when their turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample, ImageSource, RowImages
from cwdpo_bench.vlm import MAX_PIXELS, open_image, path_inside


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
    samples: Sequence[CaptionSample] | Sequence[ChoiceSample], root: Path
) -> None:
    """Look for every image file without opening it, before the first hour of answers is spent.

    Raises:
        UserError: a file is not there or outside `root`.
    """
    for sample in samples:
        for source in image_sources(sample):
            if isinstance(source, Path):
                path = path_inside(root, source, name=_place(sample))
                if not path.is_file():
                    raise UserError(f"{_place(sample)}: image {path} does not exist")


def _place(sample: CaptionSample | ChoiceSample) -> str:
    return f"sample {sample.id}"
