"""Rows of public preference sets, each in the form that its set has, read as pairs."""

import json

import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.layouts import checked_layout
from cwdpo_bench.train.recipe import load_recipe

RATED = [
    {"response": response, "annotations": {"Helpfulness": {"Rating": h}, "Faith": {"Rating": f}}}
    for response, h, f in (("a dog", "3", "4"), ("a cat", "5", "4"), ("a cow", "1", "1"))
]
ROWS = {
    "trl": {"image": "a.png", "prompt": "What?", "chosen": "a cat", "rejected": "a cow"},
    "rlaif-v": {
        "image": "a.png",
        "idx": 7,
        "question": "What?",
        "chosen": "a cat",
        "rejected": "a cow",
    },
    "mmpr": {
        "image": "a.png",
        "question": "<image>\nWhat?",
        "chosen": "a cat",
        "rejected": "a cow",
    },
    "trl, implicit prompt": {
        "image": "a.png",
        "chosen": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "a cat"},
        ],
        "rejected": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cow"}]},
        ],
    },
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
    assert data.layouts == {name.split(",")[0]: 1}


@pytest.mark.parametrize("name", ROWS)
def test_a_named_layout_is_taken_and_no_other(name, folder):
    (folder / "pairs.jsonl").write_text(json.dumps(ROWS[name]))
    layout = name.split(",")[0]
    assert read_pairs(folder / "pairs.jsonl", layout=layout).layouts == {layout: 1}
    other = "sugarcrepe" if layout == "povid" else "povid"
    with pytest.raises(UserError, match=f"field .*: missing; a row of {other} has"):
        read_pairs(folder / "pairs.jsonl", layout=other)


def test_an_unknown_layout_is_named_with_the_nearest():
    with pytest.raises(UserError, match="--format: unknown layout 'rlhfv'; did you mean 'rlhf-v'"):
        checked_layout("rlhfv", "--format")
    with pytest.raises(UserError, match=r"data\.format: unknown layout 'sugar'"):
        load_recipe("dpo", ["data.format=sugar"])


def test_answers_that_begin_with_other_questions_are_refused(folder):
    row = json.loads(json.dumps(ROWS["trl, implicit prompt"]))
    row["rejected"][0]["content"][1]["text"] = "Who?"
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="begin with another user's turn"):
        read_pairs(folder / "pairs.jsonl")


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
