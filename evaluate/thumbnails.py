"""Small pictures of a benchmark's samples, for a page that shows them."""

from __future__ import annotations

import io
from pathlib import Path

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.images import image_sources
from cwdpo_bench.evaluate.samples import ImageSource, RowImages
from cwdpo_bench.evaluate.tasks import find_task
from cwdpo_bench.files import sha256_of
from cwdpo_bench.vlm import open_image


def sources(
    task: str, root: Path, data_sha256: str | None = None
) -> dict[str, tuple[ImageSource, ...]]:
    """Where the pictures of a benchmark's samples are, by sample id.

    Args:
        task: of the benchmark.
        root: the data root.
        data_sha256: of the annotations as a run read them; None where nothing is known of it.

    Raises:
        UserError: the benchmark is not under `root`, or its annotations are not those of the run.
    """
    benchmark = find_task(task)
    files = benchmark.files(root) if root.is_dir() else []
    if not files:
        raise UserError(f"{root}: holds no data of {task}")
    if data_sha256 is not None and sha256_of(files) != data_sha256:
        raise UserError(f"{files[0]}: not the data that the run was made on")
    return {sample.id: image_sources(sample) for sample in benchmark.load(root)}


def thumbnail(source: ImageSource, root: Path, edge: int, quality: int) -> bytes:
    """A picture as WebP, its longer side at most `edge` pixels.

    Args:
        source: as `sources` gives it.
        root: the data root; no picture may lie outside it.
        edge: in pixels; a smaller picture stays as it is.
        quality: of WebP, 0 to 100.

    Raises:
        UserError: missing, broken, too large or outside `root`.
    """
    if isinstance(source, RowImages):
        raise UserError(f"{source.name}: pictures of lmms-eval's data sets are not shown")
    image = open_image(source, name="thumbnail", root=root, coarse=2 * edge)
    image.thumbnail((edge, edge))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()
