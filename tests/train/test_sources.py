"""Where rows may come from, offline: folders, tables with images in them, the Hub's cache."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from cwdpo_bench import cli
from cwdpo_bench.errors import UserError
from cwdpo_bench.train import sources
from cwdpo_bench.train.data import fingerprint, read_pairs
from cwdpo_bench.train.preferences.check import check_file
from cwdpo_bench.train.preferences.files import perturb_file
from cwdpo_bench.train.sources import HubSet, Stored, hub_set

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def png(color: tuple[int, int, int], size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def rows(**more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": "What?", "chosen": f"a cat {i}", "rejected": f"a dog {i}"}
        | {name: value[i] for name, value in more.items()}
        for i in range(3)
    ]


def colors(path: Path, **settings: Any) -> list[list[Any]]:
    pairs = read_pairs(path, **settings).pairs
    return [[image.getpixel((0, 0)) for image in pair.open().images] for pair in pairs]


# --- images that lie in tables -------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Two images a row, in the form that `datasets` writes, two rows a group."""
    images = [
        [{"bytes": png(c), "path": "x.png"}, {"bytes": png(c[::-1]), "path": None}] for c in COLORS
    ]
    pd.DataFrame(rows(images=images)).to_parquet(tmp_path / "p.parquet", row_group_size=2)
    return tmp_path / "p.parquet"


def test_images_of_a_parquet_file_stay_in_it(parquet: Path) -> None:
    pairs = read_pairs(parquet).pairs
    assert all(isinstance(image, Stored) for pair in pairs for image in pair.images)
    assert colors(parquet) == [[c, c[::-1]] for c in COLORS]
    # Opened in any order.
    assert [pairs[i].open().images[1].getpixel((0, 0)) for i in (2, 0, 1)] == [
        COLORS[i][::-1] for i in (2, 0, 1)
    ]


def test_plain_bytes_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    pd.DataFrame(rows(image=[png(c) for c in COLORS])).to_parquet(tmp_path / "p.parquet")
    assert colors(tmp_path / "p.parquet") == [[c] for c in COLORS]


def test_equal_images_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    pd.DataFrame(rows(image=[png(COLORS[0])] * 3)).to_parquet(tmp_path / "p.parquet")
    assert len({pair.images for pair in read_pairs(tmp_path / "p.parquet").pairs}) == 1


def test_a_table_larger_than_what_is_held(tmp_path: Path) -> None:
    """What reading keeps does not grow with the images: here they are 24 MB, of noise."""
    rng = np.random.default_rng(0)
    path = tmp_path / "p.parquet"
    images = []
    for _ in range(40):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (450, 450, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    frame = pd.DataFrame(
        {
            "image": images,
            "prompt": "What?",
            "chosen": [f"a cat {i}" for i in range(40)],
            "rejected": "a dog",
        }
    )
    frame.to_parquet(path, row_group_size=4)
    assert path.stat().st_size > 20_000_000
    del images, frame
    tracemalloc.start()
    pairs = read_pairs(path).pairs
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 40
    assert kept < 2_000_000
    assert pairs[39].open().images[0].size == (450, 450)


def test_saved_datasets_are_read_and_their_images_stay_there(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            **{name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")},
        }
    )
    pictures = [[Image.new("RGB", (8, 8), c), Image.new("RGB", (8, 8), c[::-1])] for c in COLORS]
    table = datasets.Dataset.from_list(rows(images=pictures), features=features)
    table.save_to_disk(str(tmp_path / "set"))
    assert colors(tmp_path / "set") == [[c, c[::-1]] for c in COLORS]
    assert isinstance(read_pairs(tmp_path / "set").pairs[0].images[0], Stored)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"holds the splits \['test', 'train'\]"):
        read_pairs(tmp_path / "both")


def test_rows_with_images_in_a_table_are_not_written_on(parquet: Path) -> None:
    with pytest.raises(UserError, match="row 1: the images stand in the table as bytes"):
        perturb_file(parquet, parquet.parent / "o.jsonl", {"replace_obj": 1})


# --- folders and the Hub -------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` of its own, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    sources._from_hub.cache_clear()
    sources._saved.cache_clear()
    return folder


def clone(folder: Path) -> Path:
    """A folder of data files, as a data set's repository holds them."""
    (folder / "data").mkdir(parents=True)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            **{name: datasets.Value("string") for name in ("chosen", "rejected")},
        }
    )
    own = [
        {"question" if key == "prompt" else key: value for key, value in row.items()}
        for row in rows(image=[{"bytes": png(c), "path": "a.png"} for c in COLORS])
    ]
    table = datasets.Dataset.from_list(own, features=features)
    table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return folder


def test_a_folder_of_data_files_is_read(cache: Path, tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    assert colors(folder) == [[c] for c in COLORS]
    assert read_pairs(folder).layouts == {"mmpr": 3}
    table = folder / "data" / "train-00000-of-00001.parquet"
    table.rename(table.with_name("test-00000-of-00001.parquet"))
    (folder / "loader.py").write_text("raise SystemExit('the code of a data set ran')")
    sources._saved.cache_clear()
    assert len(read_pairs(folder).pairs) == 3


def test_a_data_set_of_the_hub_is_read_from_its_cache(cache: Path, tmp_path: Path) -> None:
    # The cache calls its files by the folder, as it calls those of the Hub by the data set.
    datasets.load_dataset(str(clone(tmp_path / "a_set")), cache_dir=str(cache))
    (made,) = (path for path in cache.glob("*/default*") if path.is_dir())
    (cache / "someone___a_set").mkdir()
    made.rename(cache / "someone___a_set" / "default")
    name = Path("someone/a_set")
    assert colors(name) == [[c] for c in COLORS]
    assert colors(Path("someone/a_set:train")) == [[c] for c in COLORS]
    assert len(fingerprint(name)) == 64
    assert check_file(name)["good"] == 3
    with pytest.raises(
        UserError, match=r"splits \['train'\]; name one of them, as in someone/a_set:tr"
    ):
        read_pairs(Path("someone/a_set:test"))


def test_an_unknown_data_set_is_one_clear_error(cache: Path) -> None:
    with pytest.raises(UserError, match="someone/no_set: no such file, and no data set"):
        read_pairs(Path("someone/no_set"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", HubSet("a/b", None, None)),
        ("a/b:train", HubSet("a/b", None, "train")),
        ("a/b:en:train", HubSet("a/b", "en", "train")),
        ("a/b.jsonl", None),
        ("b", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("../b", None),
    ],
)
def test_names_of_the_hub(
    name: str, expected: HubSet | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_set(Path(name)) == expected
    (tmp_path / "a").mkdir()
    # A folder of that name is meant where there is one, be the file in it missing.
    assert hub_set(Path(name)) is None


def test_paths_of_a_hub_set_need_a_root(cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    table = datasets.Dataset.from_list(rows(image=["a.png"] * 3))
    monkeypatch.setattr(sources, "_from_hub", lambda hub: table)
    with pytest.raises(UserError, match=r"row 1: field images: 'a.png' is a path.*data.image_root"):
        read_pairs(Path("a/b"))
    Image.new("RGB", (8, 8), COLORS[0]).save(tmp_path / "a.png")
    assert colors(Path("a/b"), image_root=tmp_path) == [[COLORS[0]]] * 3


# --- the images' root ----------------------------------------------------------------------------


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Path]:
    """Rows in one folder, the images that they name in another."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8), COLORS[1]).save(tmp_path / "images" / "sub" / "a.png")
    file = tmp_path / "rows" / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows(image=["sub/a.png"] * 3))))
    return file, tmp_path / "images"


def test_an_image_root_is_where_paths_begin_and_end(apart: tuple[Path, Path]) -> None:
    file, images = apart
    with pytest.raises(UserError, match=r"'sub/a.png' does not exist"):
        read_pairs(file)
    assert colors(file, image_root=images) == [[COLORS[1]]] * 3
    with pytest.raises(UserError, match=r"'sub/a.png' does not exist"):
        read_pairs(file, image_root=images / "sub")
    (images / "sub" / "a.png").rename(images / "a.png")
    file.write_text(json.dumps(rows(image=["../a.png"] * 3)[0]))
    with pytest.raises(UserError, match=r"'../a.png' leaves .*sub"):
        read_pairs(file, image_root=images / "sub")
    with pytest.raises(UserError, match=r"data.image_root: .*none: no such folder"):
        read_pairs(file, image_root=images / "none")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["negatives", *map(str, arguments)])


def test_check_says_what_rows_were_taken_for_and_every_kind_of_bad_row(
    apart: tuple[Path, Path],
) -> None:
    file, images = apart
    good = run("check", file, "--image-root", images)
    assert (good.exit_code, good.stdout.splitlines()[0]) == (0, f"{file}: 3 of 3 rows are good")
    assert "taken for trl: 3" in good.stdout
    with file.open("a") as lines:
        lines.write('\n{"prompt": "x"}\nno\n{"prompt": "y"}\n')
    bad = run("check", file, "--image-root", images)
    assert bad.exit_code == 2
    assert "3 of 6 rows are good" in bad.stdout
    assert f"2 x no chosen, the first: {file}: line 4: field chosen: missing" in bad.stdout
    assert "1 x not JSON, the first:" in bad.stdout
    record = json.loads(run("check", file, "--without-images", "--json").stdout)
    assert record["dropped"] == {"no chosen": 2, "not JSON": 1}
    named = run("check", file, "--format", "povod")
    assert "did you mean 'povid'" in str(named.exception)


def test_rows_with_a_root_are_written_as_they_are(
    apart: tuple[Path, Path], vlm_of_demo: Any
) -> None:
    file, images = apart
    output = file.parent / "kept.jsonl"
    model = ["--model", vlm_of_demo, "--output", output, "--image-root", images]
    assert run("filter", file, *model).exit_code == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["image"] for row in written} == {"sub/a.png"}
    assert len(read_pairs(output, image_root=images).pairs) == 3


@pytest.fixture
def vlm_of_demo(tiny_model_folder: Path) -> Path:
    return tiny_model_folder
