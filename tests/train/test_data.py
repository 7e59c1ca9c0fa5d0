"""Preference data: good rows come in, every bad row has its line, field and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import read_pairs, split_stages

GOOD = {"images": ["a.png"], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


def _write(folder: Path, *rows: Any) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"not an image")
    file = folder / "pairs.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_plain_and_conversational_rows_read_the_same(tmp_path: Path) -> None:
    conversational = {
        "image": "a.png",
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}],
        "chosen": [{"role": "assistant", "content": "A cat."}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
    }
    plain, other = read_pairs(_write(tmp_path, GOOD, conversational)).pairs
    assert (plain.prompt, plain.chosen, plain.rejected) == ("What is it?", "A cat.", "A dog.")
    assert (other.prompt, other.chosen, other.rejected) == (
        plain.prompt,
        plain.chosen,
        plain.rejected,
    )
    assert plain.open().images[0].size == other.open().images[0].size == (8, 8)


def test_parquet_and_datasets_folders_read_as_json_lines_do(tmp_path: Path) -> None:
    import datasets

    source = _write(tmp_path, GOOD, {**GOOD, "chosen": "A mat."})
    pd.DataFrame([GOOD, {**GOOD, "chosen": "A mat."}]).to_parquet(tmp_path / "pairs.parquet")
    picture = Image.new("RGB", (8, 8))
    rows = {
        "images": [[picture], [picture]],
        "prompt": ["What is it?"] * 2,
        "chosen": ["A cat.", "A mat."],
        "rejected": ["A dog."] * 2,
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            **{name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")},
        }
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    expected = [(p.prompt, p.chosen, p.rejected) for p in read_pairs(source).pairs]
    for other in (tmp_path / "pairs.parquet", tmp_path / "set"):
        pairs = read_pairs(other).pairs
        assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == expected
        assert [p.open().images[0].size for p in pairs] == [(8, 8), (8, 8)]


def test_a_correction_and_images_of_the_rejected_answer_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    contrast = {**GOOD, "rejected": GOOD["chosen"], "rejected_images": ["b.png"]}
    plain, corrected, other = read_pairs(
        _write(tmp_path, GOOD, {**GOOD, "corrected": "A cat"}, contrast)
    ).pairs
    assert (plain.corrected, plain.rejected_images) == (None, None)
    assert corrected.corrected == "A cat"
    # The same answer is a pair where the image is another: image contrast.
    assert other.rejected == other.chosen
    assert other.rejected_images == ((tmp_path / "b.png").resolve(),)


BAD_ROWS = {
    "no rejected to correct": (
        {**{k: v for k, v in GOOD.items() if k != "rejected"}, "corrected": "A cat"},
        "field rejected",
    ),
    "empty corrected": ({**GOOD, "corrected": " "}, "field corrected: empty"),
    "missing rejected image": ({**GOOD, "rejected_images": ["no.png"]}, "field rejected_images"),
    "equal images": ({**GOOD, "rejected_images": ["a.png"]}, "the same images"),
    "missing chosen": ({k: v for k, v in GOOD.items() if k != "chosen"}, "field chosen: missing"),
    "missing rejected": ({k: v for k, v in GOOD.items() if k != "rejected"}, "field rejected"),
    "missing prompt": ({k: v for k, v in GOOD.items() if k != "prompt"}, "field prompt: missing"),
    "empty chosen": ({**GOOD, "chosen": "  "}, "field chosen: empty"),
    "number chosen": ({**GOOD, "chosen": 3}, "field chosen: neither text"),
    "null chosen": ({**GOOD, "chosen": None}, "field chosen: missing"),
    "wrong role": ({**GOOD, "chosen": [{"role": "user", "content": "x"}]}, "field chosen: not one"),
    "two messages": (
        {**GOOD, "prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        "field prompt: not one",
    ),
    "equal": ({**GOOD, "rejected": "A cat."}, "fields chosen and rejected"),
    "equal but for case": ({**GOOD, "rejected": " a  CAT"}, "fields chosen and rejected"),
    "missing image": ({**GOOD, "images": ["none.png"]}, "'none.png' does not exist"),
    "broken image": ({**GOOD, "images": ["broken.png"]}, "'broken.png' is not an image"),
    "image outside": ({**GOOD, "images": ["../../etc/passwd"]}, "leaves"),
    "image number": ({**GOOD, "images": [3]}, "field images"),
    "not json": ('{"prompt": ', "not JSON"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "bad id": ({**GOOD, "id": [1]}, "field id"),
    "references text": ({**GOOD, "references": "A cat."}, "field references: not a list"),
    "references number": ({**GOOD, "references": [1]}, "field references: not a list"),
    "no references": ({**GOOD, "references": []}, "field references: empty"),
    "blank reference": ({**GOOD, "references": ["A cat.", " "]}, "field references: empty"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_with_line_field_and_mend(name: str, tmp_path: Path) -> None:
    row, words = BAD_ROWS[name]
    with pytest.raises(UserError) as error:
        read_pairs(_write(tmp_path, GOOD, row))
    message = str(error.value)
    assert "pairs.jsonl: line 2" in message
    assert words in message
    assert "data.on_bad_row=skip" in message


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_can_be_skipped_and_is_counted(name: str, tmp_path: Path) -> None:
    data = read_pairs(_write(tmp_path, BAD_ROWS[name][0], GOOD), on_bad_row="skip")
    assert [pair.chosen for pair in data.pairs] == ["A cat."]
    assert sum(data.dropped.values()) == 1


def test_doubled_ids_name_both_places(tmp_path: Path) -> None:
    row = {**GOOD, "id": "one"}
    with pytest.raises(UserError, match=r"line 2.*'one' stands at .*line 1"):
        read_pairs(_write(tmp_path, row, row))


def test_rows_for_sft_need_no_rejected_answer(tmp_path: Path) -> None:
    row = {k: v for k, v in GOOD.items() if k != "rejected"}
    assert read_pairs(_write(tmp_path, row), need_rejected=False).pairs[0].rejected is None


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="no usable row"):
        read_pairs(file)


@pytest.mark.parametrize("name", ["none.jsonl", "pairs.csv", "folder", "bad.parquet"])
def test_files_that_are_no_preference_data_are_refused(name: str, tmp_path: Path) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name != "none.jsonl":
        (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=name.split(".")[0]):
        read_pairs(tmp_path / name)


def test_stages_share_the_pairs_without_overlap(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": str(i)} for i in range(40)]
    pairs = read_pairs(_write(tmp_path, *rows)).pairs
    first, second = split_stages(pairs, 0.75, seed=1)
    assert (len(first), len(second)) == (30, 10)
    assert {pair.id for pair in first} | {pair.id for pair in second} == {str(i) for i in range(40)}
    assert split_stages(pairs, 0.75, seed=1) == (first, second)
    assert split_stages(pairs, 0.75, seed=2) != (first, second)


def test_references_are_the_row_s_own_or_the_chosen_answer(tmp_path: Path) -> None:
    rows = [{**GOOD, "images": [], "references": ["A cat.", "One cat."]}, {**GOOD, "images": []}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet")
    for name in ("pairs.jsonl", "pairs.parquet"):
        first, second = read_pairs(tmp_path / name).pairs
        assert first.references == ("A cat.", "One cat.")
        assert second.references == (second.chosen,)
