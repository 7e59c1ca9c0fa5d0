"""Small pictures of samples: of every layout, from the data that the run saw, bounded in size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate import thumbnails
from cwdpo_bench.evaluate.tasks import TASKS
from cwdpo_bench.files import sha256_of


@pytest.mark.parametrize("task", ["coco", "flickr30k", "nocaps", "mmmu", "mmbench"])
def test_every_sample_of_every_layout_has_its_pictures(data_root: Path, task: str) -> None:
    found = thumbnails.sources(task, data_root)
    assert set(found) == {sample.id for sample in TASKS[task].load(data_root)}
    for sources in found.values():
        for source in sources:
            data = thumbnails.thumbnail(source, data_root, 16, 50)
            with Image.open(io.BytesIO(data)) as image:
                assert image.format == "WEBP"
                assert max(image.size) <= 16


def test_other_data_than_the_runs_are_refused(data_root: Path) -> None:
    right = sha256_of(TASKS["coco"].files(data_root))
    assert thumbnails.sources("coco", data_root, right)
    with pytest.raises(UserError, match="not the data that the run was made on"):
        thumbnails.sources("coco", data_root, "0" * 64)


def test_a_root_without_the_benchmark_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: holds no data of coco"):
        thumbnails.sources("coco", tmp_path / "nowhere")


def test_a_coarsely_decoded_jpeg_gives_the_same_small_picture(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 800)[None, :, None] * np.ones((600, 1, 3))
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    data = thumbnails.thumbnail(Path("a.jpg"), tmp_path, 100, 90)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (100, 75)
        small = np.asarray(image.convert("RGB"), dtype=float)
    assert np.abs(small[37, :, 0] - np.linspace(0, 255, 100)).max() < 8


def test_pictures_outside_the_root_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves the data folder"):
        thumbnails.thumbnail(Path("../a.jpg"), tmp_path, 100, 50)
    with pytest.raises(UserError, match="does not exist"):
        thumbnails.thumbnail(Path("a.jpg"), tmp_path, 100, 50)
