"""POPE: the published lines, the reading of replies, the figures against the authors' own code."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.answers import parse_pope_choice
from cwdpo_bench.evaluate.choices import choice_rows
from cwdpo_bench.evaluate.pope import SETTINGS, load_pope
from cwdpo_bench.evaluate.results import summarize
from cwdpo_bench.evaluate.run import run_tasks

OPTIONS = {"A": "Yes", "B": "No"}


@pytest.fixture
def root(tmp_path):
    """A data root with two images and four questions a setting."""
    (tmp_path / "pope").mkdir()
    (tmp_path / "coco/val2014").mkdir(parents=True)
    names = ["COCO_val2014_000000310196.jpg", "COCO_val2014_000000210789.jpg"]
    for name, colour in zip(names, ("red", "blue"), strict=True):
        Image.new("RGB", (56, 56), colour).save(tmp_path / "coco/val2014" / name)
    for setting in SETTINGS:
        rows = [
            {
                "question_id": n + 1,
                "image": names[n // 2],
                "text": f"Is there a {setting} thing in the image?",
                "label": ("yes", "no")[n % 2],
            }
            for n in range(4)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"pope/coco_pope_{setting}.json").write_text(text)
    return tmp_path


def test_the_published_lines_become_questions(root):
    samples = load_pope(root)

    assert [s.groups for s in samples] == [(setting,) for setting in SETTINGS for _ in range(4)]
    assert samples[0].id == "random-1"
    assert samples[0].cluster == "COCO_val2014_000000310196.jpg"
    assert samples[0].prompt == (
        "Is there a random thing in the image?\nAnswer the question using a single word or phrase."
    )
    assert [s.gold for s in samples[:4]] == ["A", "B", "A", "B"]
    assert samples[0].option_replies == ("Yes", "No")
    assert str(samples[0].images[0]) == "coco/val2014/COCO_val2014_000000310196.jpg"


@pytest.mark.parametrize("folder", ["pope", "pope/val2014", "pope/images"])
def test_images_may_lie_beside_the_questions(root, folder):
    (root / folder).mkdir(exist_ok=True)
    name = "COCO_val2014_000000310196.jpg"
    (root / "coco/val2014" / name).rename(root / folder / name)

    assert str(load_pope(root)[0].images[0]) == f"{folder}/{name}"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        ('{"question_id": 1, "image": "a", "text": "b", "label": "maybe"}', "'label' must be yes"),
        ('{"question_id": 1, "image": "a", "label": "no"}', "line 2: 'text' must be"),
        ('{"image": "a", "text": "b", "label": "no"}', "'question_id' must be"),
    ],
)
def test_a_line_of_another_form_is_named(root, line, match):
    path = root / "pope/coco_pope_popular.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))

    with pytest.raises(UserError, match=match):
        load_pope(root)


def test_one_file_alone_is_refused(root):
    (root / "pope/coco_pope_random.json").unlink()

    with pytest.raises(UserError, match=r"needs coco_pope_random\.json"):
        load_pope(root)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("Yes", "A"),
        ("yes.", "A"),
        ("Yes, there is a dog.", "A"),
        ("No", "B"),
        ("NO!", "B"),
        ("There is not a dog. Yes", "B"),
        ("Yes. There is no cat.", "A"),
        ("Yes, but no cat", "B"),
        ("a dog", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_replies_are_read_as_the_authors_do_but_for_what_says_neither(reply, letter):
    assert parse_pope_choice(reply, OPTIONS) == letter


def authors_rule(text):
    """evaluate.py of AoiDragon/POPE: what it makes of a reply."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def test_what_says_yes_or_no_plainly_is_read_as_by_the_authors():
    rng = random.Random(0)
    words = ["Yes", "No", "no", "not", "yes", "there", "is", "a", "dog", ",", "."]
    for _ in range(500):
        reply = " ".join(rng.choices(words, k=rng.randint(1, 8)))
        read = parse_pope_choice(reply, OPTIONS)
        if read is not None:
            assert OPTIONS[read].lower() == authors_rule(reply), reply


def test_figures_are_sklearns_on_random_replies(root):
    rng = np.random.default_rng(0)
    samples = load_pope(root) * 30
    replies = [rng.choice(["Yes", "No", "a dog"]) for _ in samples]
    rows = choice_rows(samples, replies, rules="pope")
    metrics = {name: m["value"] for name, m in summarize(rows)["metrics"].items()}
    gold = ["yes" if s.gold == "A" else "no" for s in samples]
    said = [{"Yes": "yes", "No": "no"}.get(reply, "neither") for reply in replies]
    precision, recall, f1, _ = precision_recall_fscore_support(
        [g == "yes" for g in gold], [s == "yes" for s in said], average="binary"
    )

    assert metrics["accuracy"] == pytest.approx(accuracy_score(gold, said))
    assert metrics["precision"] == pytest.approx(precision)
    assert metrics["recall"] == pytest.approx(recall)
    assert metrics["f1"] == pytest.approx(f1)
    assert metrics["yes_share"] == pytest.approx(said.count("yes") / len(said))
    assert metrics["parse_failures"] == pytest.approx(said.count("neither") / len(said))


def test_precision_of_a_model_that_never_says_yes_is_left_out(root):
    samples = load_pope(root)
    metrics = summarize(choice_rows(samples, ["No"] * len(samples), rules="pope"))["metrics"]

    assert "precision" not in metrics
    assert metrics["recall"]["value"] == 0.0
    assert metrics["yes_share"]["value"] == 0.0


def test_by_the_official_rule_what_says_neither_is_a_yes(root):
    samples = load_pope(root)
    rows = choice_rows(samples, ["a dog"] * len(samples), rules="pope", parse_failures="official")
    metrics = summarize(rows)["metrics"]

    assert metrics["accuracy"]["value"] == metrics["precision"]["value"] == 0.5
    assert metrics["yes_share"]["value"] == metrics["parse_failures"]["value"] == 1.0


def test_a_run_has_settings_yes_share_and_calibration(tiny_model_folder, root, tmp_path):
    folder = run_tasks(tiny_model_folder, tasks=["pope"], data_root=root, output=tmp_path / "run")

    task = folder.results["tasks"]["pope"]
    assert task["n"] == 12
    assert set(task["groups"]) == set(SETTINGS)
    assert {"accuracy", "yes_share", "ece", "brier", "accuracy_option"} <= task["metrics"].keys()
    rows = folder.samples("pope")
    assert rows["cluster"].nunique() == 2
    assert all(len(logps) == 2 for logps in rows["option_log_probabilities"])
