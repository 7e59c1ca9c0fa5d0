"""NoCaps captions: validation, 4,500 images in three domains (Agrawal et al., ICCV 2019).

Layout: `nocaps/nocaps_val_4500_captions.json`, COCO's caption form with `domain` on every image,
and the images in `nocaps/images/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.coco import caption_prompt, image_list, reference, text_field
from cwdpo_bench.evaluate.samples import CaptionSample
from cwdpo_bench.files import read_json

ANNOTATIONS = Path("nocaps/nocaps_val_4500_captions.json")
IMAGES = Path("nocaps/images")
DOMAINS = ("in-domain", "near-domain", "out-domain")


def load_nocaps(root: Path) -> list[CaptionSample]:
    """The images of `nocaps/nocaps_val_4500_captions.json`, each in the group of its domain.

    Raises:
        UserError: the file is missing, an image has no caption or an unknown domain, or a caption
            has no image.
    """
    path = root / ANNOTATIONS
    content = read_json(path)
    images = image_list(content, path)
    captions = _captions(content, path)
    samples = []
    for index, image in enumerate(images):
        where = f"{path}: images[{index}]"
        if image.get("id") is None:
            raise UserError(f"{where}: no 'id'")
        references = captions.pop(image["id"], None)
        if references is None:
            raise UserError(f"{where}: no caption for image id {image['id']!r}, or a doubled id")
        domain = text_field(image, "domain", where)
        if domain not in DOMAINS:
            raise UserError(f"{where}: unknown domain {domain!r}; {nearest(domain, DOMAINS)}")
        samples.append(
            CaptionSample(
                id=str(image["id"]),
                prompt=caption_prompt(),
                image=IMAGES / text_field(image, "file_name", where),
                references=tuple(references),
                groups=(domain,),
            )
        )
    if captions:
        raise UserError(f"{path}: a caption names image id {next(iter(captions))!r}, not in images")
    if not samples:
        raise UserError(f"{path}: no images")
    return samples


def _captions(content: Any, path: Path) -> dict[Any, list[str]]:
    """Captions by image id, in the file's order."""
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f"{path}: needs a list 'annotations' of captions")
    captions: dict[Any, list[str]] = {}
    for index, annotation in enumerate(annotations):
        where = f"{path}: annotations[{index}]"
        if not isinstance(annotation, dict) or annotation.get("image_id") is None:
            raise UserError(f"{where}: needs 'image_id' and 'caption'")
        text = reference(annotation.get("caption"), where)
        captions.setdefault(annotation["image_id"], []).append(text)
    return captions
