"""Pairs in a file are the pairs, in every order, and hold no memory of their own."""

from __future__ import annotations

import errno
import gc
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import kept_pairs
from cwdpo_bench.train.data import read_pairs, split_stages
from cwdpo_bench.train.kept_pairs import keep_pairs, taken
from cwdpo_bench.train.pairs import Pair
from cwdpo_bench.train.row_images import Masked

TEXTS = st.text(min_size=1, max_size=20)
SOURCES = st.one_of(
    TEXTS.filter(lambda text: "\0" not in text).map(Path),
    st.binary(max_size=8),
    st.builds(Masked, TEXTS.map(str.encode), st.floats(0, 1), TEXTS),
)
IMAGES = st.lists(SOURCES, max_size=3).map(tuple)
PAIRS = st.builds(
    Pair,
    id=TEXTS,
    where=TEXTS,
    images=IMAGES,
    prompt=TEXTS,
    chosen=TEXTS,
    rejected=st.none() | TEXTS,
    references=st.lists(TEXTS, max_size=2).map(tuple),
    corrected=st.none() | TEXTS,
    rejected_images=st.none() | IMAGES,
    paraphrase=st.none() | TEXTS,
    other_meaning=st.none() | TEXTS,
)


@given(st.lists(PAIRS, max_size=5), st.data())
def test_what_is_kept_comes_back_as_it_was(pairs: list[Pair], data: st.DataObject) -> None:
    kept = keep_pairs(pairs)
    assert list(kept) == pairs
    assert kept == pairs
    assert [kept[i] for i in range(len(kept))] == pairs
    assert len(kept) == len(pairs)
    places = data.draw(st.lists(st.sampled_from(range(len(pairs))))) if pairs else []
    assert list(taken(kept, places)) == taken(pairs, places) == [pairs[i] for i in places]
    assert list(kept[1:3]) == pairs[1:3]
    assert list(kept.take(places)[::-1]) == [pairs[i] for i in places][::-1]
    with pytest.raises(IndexError):
        kept[len(pairs)]


def _row(i: int) -> dict[str, Any]:
    return {"id": f"row {i}", "prompt": "What?", "chosen": "a " * 40 + str(i), "rejected": str(i)}


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    def held(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("".join(json.dumps(_row(i)) + "\n" for i in range(rows)))
        gc.collect()
        tracemalloc.start()
        pairs = read_pairs(path, with_images=False).pairs
        first, second = split_stages(pairs, 0.75, 0)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(first) + len(second) == rows
        return size

    held(10)
    # Places alone: eight bytes in the file's list, in the whole's and in its parts'.
    assert (held(3000) - held(1000)) / 2000 < 40


def test_images_in_tables_are_found_again(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (0, 128, 0)).save(buffer, "PNG")
    rows = [{**_row(i), "images": [{"bytes": buffer.getvalue(), "path": None}]} for i in range(3)]
    features = datasets.Features(
        {**dict.fromkeys(_row(0), datasets.Value("string")), "images": [datasets.Image()]}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    table.save_to_disk(str(tmp_path / "set"))
    table.to_parquet(str(tmp_path / "set.parquet"))
    for name in ("set", "set.parquet"):
        for pair in read_pairs(tmp_path / name).pairs.take([2, 0]):
            assert pair.open().images[0].getpixel((0, 0)) == (0, 128, 0)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    records = kept_pairs.Records(tmp_path)
    monkeypatch.setattr(records, "_file", type("Full", (), {"write": full, "flush": full})())
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        records.add("x")
    with pytest.raises(UserError, match="TMPDIR"):
        records.flush()
    with pytest.raises(UserError, match="TMPDIR"):
        kept_pairs.Records(tmp_path / "nowhere")
