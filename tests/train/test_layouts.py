"""Rows of public preference sets, each in the form that its set has, read as pairs."""

import json

import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import read_pairs

RATED = [
    {"response": response, "annotations": {"Helpfulness": {"Rating": h}, "Faith": {"Rating": f}}}
    for response, h, f in (("a dog", "3", "4"), ("a cat", "5", "4"), ("a cow", "1", "1"))
]
ROWS = {
    "trl": {"image": "a.png", "prompt": "What?", "chosen": "a cat", "rejected": "a cow"},
    "rlaif-v": {"image": "a.png", "question": "What?", "chosen": "a cat", "rejected": "a cow"},
    "rlhf-v": {
        "image": "a.png",
        "idx": 7,
        "text": json.dumps({"question": "What?", "chosen": "a cat", "rejected": "a cow"}),
    },
    "povid": {
        "id": "7",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "a cat"},
        ],
        "rejected_conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "a cow"},
        ],
    },
    "vlfeedback": {"img_path": "a.png", "prompt": "What?", "completions": RATED},
    "vlfeedback, columns": {
        "img_path": "a.png",
        "prompt": "What?",
        "completions": {name: [row[name] for row in RATED] for name in RATED[0]},
    },
    "mdpo": {"img_path": "a.png", "prompt": "What?", "chosen": "a cat", "rejected": "a cow"},
}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_gives_the_same_pair(name, folder):
    (folder / "pairs.jsonl").write_text(json.dumps(ROWS[name]))
    data = read_pairs(folder / "pairs.jsonl")
    (pair,) = data.pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("What?", "a cat", "a cow")
    assert pair.images == (folder / "a.png",)
    expected = {"mdpo": "trl"}.get(name, name.split(",")[0])
    assert data.layouts == {expected: 1}


def test_sugarcrepe_is_one_object_of_rows(folder):
    row = {"filename": "a.png", "caption": "a cat", "negative_caption": "a cow"}
    (folder / "swap.json").write_text(json.dumps({"0": row, "1": row}, indent=2))
    data = read_pairs(folder / "swap.json")
    assert [pair.id for pair in data.pairs] == ["0", "1"]
    assert {(pair.chosen, pair.rejected) for pair in data.pairs} == {("a cat", "a cow")}
    assert data.layouts == {"sugarcrepe": 2}


def test_a_json_list_is_read_and_a_row_named(folder):
    rows = [ROWS["rlaif-v"] | {"id": 1}, "no row"]
    (folder / "list.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="row 2: the row is no JSON object"):
        read_pairs(folder / "list.json")
    assert len(read_pairs(folder / "list.json", on_bad_row="skip").pairs) == 1


def test_without_images_none_need_be_there(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROWS["trl"]))
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "pairs.jsonl")
    assert read_pairs(tmp_path / "pairs.jsonl", with_images=False).pairs[0].images == ()


POVID = ROWS["povid"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a.png", "text": "not json"}, "field text"),
        ({"image": "a.png", "text": json.dumps({"question": "What?"})}, "field text"),
        ({**POVID, "conversations": POVID["conversations"][:1]}, "not one question"),
        ({**POVID, "conversations": POVID["conversations"][::-1]}, "the turns are"),
        (
            {
                **POVID,
                "rejected_conversations": [
                    {"from": "human", "value": "Who?"},
                    *POVID["conversations"][1:],
                ],
            },
            "another question",
        ),
        ({**ROWS["vlfeedback"], "completions": []}, "completions: empty"),
        ({**ROWS["vlfeedback"], "completions": RATED[:1]}, "all are rated alike"),
        ({**ROWS["vlfeedback"], "completions": [{"response": "x"}]}, "rated annotations"),
        (
            {**ROWS["vlfeedback"], "completions": [{"response": "x", "annotations": {}}]},
            "rated annotations",
        ),
    ],
)
def test_a_broken_row_of_a_layout_is_named(row, said, folder):
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"line 1: .*{said}"):
        read_pairs(folder / "pairs.jsonl")
