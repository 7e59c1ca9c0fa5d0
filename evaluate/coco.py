"""COCO and Flickr30k captions: the Karpathy test split of both, one JSON form.

Where COCO's instance annotations are there as well, its captions also get CHAIR (`chair.py`).

Layouts (Karpathy and Fei-Fei, CVPR 2015):
`coco/dataset_coco.json` with images in `coco/<filepath>/<filename>`, and
`flickr30k/dataset_flickr30k.json` with images in `flickr30k/flickr30k-images/` or `images/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.chair import Instances, objects_shown, read_instances
from cwdpo_bench.evaluate.samples import CaptionSample
from cwdpo_bench.files import read_json

SPLIT = "test"
COCO_ANNOTATIONS = Path("coco/dataset_coco.json")
FLICKR30K_ANNOTATIONS = Path("flickr30k/dataset_flickr30k.json")


def caption_prompt() -> str:
    """The one prompt of all caption benchmarks, in lmms-eval's wording."""
    return "Provide a one-sentence caption for the provided image."


def load_coco(root: Path) -> list[CaptionSample]:
    """The test images of `coco/dataset_coco.json` under `root`.

    Raises:
        UserError: the file is missing or not in Karpathy's form; the image is named.
    """
    return _load_karpathy(root, COCO_ANNOTATIONS, None, read_instances(root))


def load_flickr30k(root: Path) -> list[CaptionSample]:
    """The test images of `flickr30k/dataset_flickr30k.json` under `root`.

    Raises:
        UserError: the file is missing or not in Karpathy's form; the image is named.
    """
    home = FLICKR30K_ANNOTATIONS.parent
    folder = "flickr30k-images" if (root / home / "flickr30k-images").is_dir() else "images"
    return _load_karpathy(root, FLICKR30K_ANNOTATIONS, folder)


def _load_karpathy(
    root: Path, annotations: Path, folder: str | None, instances: Instances | None = None
) -> list[CaptionSample]:
    path = root / annotations
    images = image_list(read_json(path), path)
    samples = []
    for index, image in enumerate(images):
        if image.get("split") != SPLIT:
            continue
        where = f"{path}: images[{index}]"
        filename = text_field(image, "filename", where)
        filepath = folder if folder is not None else text_field(image, "filepath", where)
        sentences = image.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            raise UserError(f"{where} ({filename}): no sentences; every image needs a reference")
        references = tuple(
            reference(s.get("raw") if isinstance(s, dict) else s, f"{where} ({filename})")
            for s in sentences
        )
        # Flickr30k has no cocoid; its file names are Flickr's own photograph numbers.
        name = str(image.get("cocoid", Path(filename).stem))
        samples.append(
            CaptionSample(
                id=name,
                prompt=caption_prompt(),
                image=annotations.parent / filepath / filename,
                references=references,
                objects=objects_shown(name, references, instances),
            )
        )
    if not samples:
        raise UserError(f"{path}: no image has split {SPLIT!r}")
    return samples


def image_list(content: Any, path: Path) -> list[dict[str, Any]]:
    """The `images` of an annotation file, each an object.

    Raises:
        UserError: they are not there or of another type.
    """
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise UserError(f"{path}: needs an object with a list 'images' of objects")
    return images


def text_field(record: Mapping[str, Any], key: str, where: str) -> str:
    """A field that must be a non-empty string.

    Raises:
        UserError: it is missing, empty, or of another type.
    """
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} must be a non-empty string, not {value!r}")
    return value


def reference(value: Any, where: str) -> str:
    """A reference caption without the spaces around it.

    Raises:
        UserError: empty or not a string.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: a reference must be a non-empty string, not {value!r}")
    return value.strip()
