"""CHAIR: the authors' words and rules, counts on captions worked out by hand, COCO's layout."""

import json

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.captions import caption_rows
from cwdpo_bench.evaluate.chair import (
    SYNONYMS,
    objects_named,
    read_instances,
    unjudged_warnings,
    vocabulary_of,
)
from cwdpo_bench.evaluate.coco import load_coco
from cwdpo_bench.evaluate.results import summarize

COCO = tuple(
    line.split(", ")[0]
    for line in SYNONYMS.read_text().splitlines()
    if line and not line.startswith("#")
)


def test_the_list_holds_cocos_80_categories_and_the_vocabulary_lmms_evals_words():
    chair = pytest.importorskip("lmms_eval.tasks.coco_cap_chair.utils")
    vocabulary = vocabulary_of(COCO)

    assert len(COCO) == 80
    # A misplaced space and a capital keep three words of theirs from ever being found; ours are.
    known = {word.strip().lower(): c for word, c in chair.INVERSE_SYNONYM_DICT.items()}
    for word, category in known.items():
        assert vocabulary[word] == category
    for compound, word in chair.DOUBLE_WORD_DICT.items():
        expected = known.get(word, "")
        # The first two name no object either way; the third is a singular gone wrong.
        if compound not in ("home plate", "train track", "wine glas"):
            assert vocabulary[compound] == expected, compound


@pytest.mark.parametrize(
    ("caption", "categories"),
    [
        ("A man and two women ride bikes.", ["person", "person", "bicycle"]),
        ("Three policemen, a knife and two knives", ["person", "knife", "knife"]),
        ("puppies watch the geese and some mice", ["dog", "bird", "mouse"]),
        ("a hot dog on a dining table", ["hot dog", "dining table"]),
        ("it is hot, dogs sleep", ["dog"]),
        ("a baby elephant and a baby", ["elephant", "person"]),
        ("a passenger jet", ["airplane"]),
        ("a baby animal", []),
        ("a bow tie", ["tie"]),
        ("the seat of the toilet", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("a seat by the window", ["chair"]),
        ("two glasses of wine, two wine glasses", ["wine glass"]),
        ("children in buses eat sandwiches", ["person", "bus", "sandwich"]),
        ("traffic lights; a STOP SIGN", ["traffic light", "stop sign"]),
        ("a train on the train tracks", ["train"]),
        ("", []),
        ("nothing of the kind", []),
    ],
)
def test_objects_named_by_hand(caption, categories):
    assert objects_named(caption, vocabulary_of(COCO)).categories == categories


def test_a_category_beyond_cocos_is_named_by_its_own_name():
    assert objects_named("two crosses, a Ring", vocabulary_of(("cross", "ring"))).categories == [
        "cross",
        "ring",
    ]


def _write_instances(root, marks):
    names = {1: "dog", 2: "cat", 3: "person"}
    content = {
        "images": [{"id": image} for image in (101, 102)],
        "annotations": [{"image_id": i, "category_id": c} for i, c in marks],
        "categories": [{"id": c, "name": name} for c, name in names.items()],
    }
    path = root / "coco/annotations/instances_val2014.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _refer(root, texts):
    path = root / "coco/dataset_coco.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        if image["cocoid"] in texts:
            image["sentences"] = [{"raw": texts[image["cocoid"]]}]
    path.write_text(json.dumps(content))


def test_chair_counts_mentions_of_what_neither_instances_nor_references_show(data_root):
    _write_instances(data_root, [(101, 1), (101, 1), (102, 2)])
    _refer(data_root, {101: "a man walks a dog", 102: "a sleeping animal"})
    samples = load_coco(data_root)
    captions = {
        "101": "a man with two dogs and a cat, a cat",  # cat is not there: 2 of 4 mentions
        "102": "a red thing",  # names nothing
        "103": "a cat",  # not in the annotations
    }
    rows, warnings = caption_rows(samples, captions)
    summary = summarize(rows)["metrics"]

    assert [None if o is None else list(o) for o in rows["objects"]] == [
        ["dog", "person"],
        ["cat"],
        None,
    ]
    assert rows["hallucinated_objects"].iloc[0] == ["cat", "cat"]
    assert summary["CHAIR-i"]["value"] == pytest.approx(2 / 4)
    assert summary["CHAIR-s"]["value"] == pytest.approx(1 / 2)
    assert summary["object_recall"]["value"] == pytest.approx(2 / 3)
    assert any("leaves out 1 of 3 images" in warning for warning in warnings)


def test_without_annotations_there_is_no_chair(data_root):
    samples = load_coco(data_root)
    rows, _ = caption_rows(samples, {sample.id: "a dog" for sample in samples})

    assert "objects" not in rows
    assert "CHAIR-i" not in summarize(rows)["metrics"]
    assert unjudged_warnings(samples) == []


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "needs an object with a list 'categories'"),
        ('{"categories": [], "images": [{}], "annotations": []}', "'images' of objects with 'id'"),
        (
            '{"categories": [], "images": [{"id": 1}], '
            '"annotations": [{"image_id": 1, "category_id": 9}]}',
            r"annotations\[0\].*category_id 9 is not in the file",
        ),
    ],
)
def test_annotations_of_another_form_are_refused(data_root, content, match):
    _write_instances(data_root, []).write_text(content)

    with pytest.raises(UserError, match=match):
        read_instances(data_root)
