"""One minimal change of a kind, and nothing else, passes the rule."""

import json
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdpo_bench.train.preferences import edits
from cwdpo_bench.train.preferences.edits import change_between, refusal
from cwdpo_bench.train.preferences.perturb import KINDS, perturb

REAL = Path(__file__).parents[4] / "shared" / "real"
CAPTION = "A small dog sits on a red sofa next to a man."


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("replace_obj", "A small cat sits on a red sofa next to a man."),
        ("replace_obj", "A small dog sits on a red sofa next to an old woman"),
        ("replace_att", "A large dog sits on a red sofa next to a man."),
        ("replace_att", "a small dog sits on an orange sofa next to a man"),
        ("replace_rel", "A small dog sits under a red sofa next to a man."),
        ("replace_rel", "A small dog jumps over a red sofa next to a man."),
        ("swap_obj", "A small man sits on a red sofa next to a dog."),
        ("swap_att", "A red dog sits on a small sofa next to a man."),
        ("swap_att", "A dog sits on a small red sofa next to a man."),
        ("add_obj", "A small dog and two cats are sitting on a red sofa next to a man."),
        ("add_obj", "A small dog sits on a red sofa next to a man with a hat."),
        ("add_att", "A small spotted dog sits on a red sofa next to a man."),
    ],
)
def test_one_minimal_change_passes(kind, text):
    assert refusal(CAPTION, text, kind) is None


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("replace_obj", "  ", edits.EMPTY),
        ("replace_obj", "a small dog  sits on a red sofa next to a man", edits.EQUAL),
        ("replace_obj", "A small dog is sitting on a red sofa next to a man.", edits.FORMS),
        ("replace_obj", "Small dogs sit on red sofas next to men.", edits.MORE),
        ("replace_obj", "A small cat sits on a blue sofa next to a man.", edits.MORE),
        ("replace_obj", "On a red sofa next to a man there is a small dog.", edits.MORE),
        ("replace_obj", "A small dog sits on a red couch next to a man.", edits.SAME),
        ("replace_obj", "A small animal sits on a red sofa next to a man.", edits.SAME),
        ("replace_obj", "A small dog sits on a blue sofa next to a man.", edits.OTHER_KIND),
        ("replace_obj", "A small dog sits under a red sofa next to a man.", edits.OTHER_KIND),
        ("replace_att", "A small cat sits on a red sofa next to a man.", edits.OTHER_KIND),
        ("replace_rel", "A small cat sits on a red sofa next to a man.", edits.OTHER_KIND),
        ("replace_rel", "A small dog sits on a red sofa beside a man.", edits.SAME),
        ("replace_att", "A little dog sits on a red sofa next to a man.", edits.SAME),
        (
            "replace_obj",
            "A small dog and a cat sit on a red sofa next to a man.",
            edits.NOT_REPLACED,
        ),
        ("replace_obj", "Nothing here resembles that at all, really.", edits.NEGATED),
        ("replace_obj", "Something else entirely", edits.LARGE),
        ("swap_obj", "A small cat sits on a red sofa next to a man.", edits.NOT_SWAPPED),
        ("swap_obj", "A red dog sits on a small sofa next to a man.", edits.OTHER_KIND),
        ("swap_att", "A small man sits on a red sofa next to a dog.", edits.OTHER_KIND),
        ("add_obj", "A small cat sits on a red sofa next to a man.", edits.NOT_ADDED),
        ("add_obj", "A picture of a small dog sits on a red sofa next to a man.", edits.SAME),
        ("add_obj", "A small white dog sits on a red sofa next to a man.", edits.OTHER_KIND),
        (
            "add_obj",
            "A small dog sits on a red sofa next to a man who wears a hat and holds one long rod.",
            edits.LARGE,
        ),
        ("add_att", "A small dog and a cat sit on a red sofa next to a man.", edits.OTHER_KIND),
        ("add_att", "A small dog sits not on a red sofa next to a man.", edits.NEGATED),
        ("add_att", "There is no small dog that sits on a red sofa.", edits.NEGATED),
    ],
)
def test_anything_else_is_refused_with_its_reason(kind, text, reason):
    assert refusal(CAPTION, text, kind) == reason


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("A cat and a dog.", "A dog and a cat."),
        ("A black and white cat sleeps.", "A white and black cat sleeps."),
        ("A wooden red table.", "A red wooden table."),
    ],
)
def test_what_says_the_same_the_other_way_round_is_no_swap(caption, text):
    for kind in ("swap_obj", "swap_att"):
        assert refusal(caption, text, kind) == edits.SAME


@pytest.mark.parametrize(
    ("caption", "text", "told"),
    [
        ("A dog runs.", "A cat runs.", "dog -> cat"),
        ("A man lost his hat.", "A woman lost her hat.", "man -> woman"),
        ("Two dogs run", "Two dogs and a cat are running.", " -> and a cat"),
        ("a b", "a b", " -> "),
    ],
)
def test_the_change_is_what_both_do_not_begin_and_end_with(caption, text, told):
    assert change_between(caption, text).told() == told


@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from(KINDS))
def test_any_text_gets_an_answer(caption, text, kind):
    reason = refusal(caption, text, kind)
    assert reason is None or reason
    assert refusal(caption, caption, kind) in (edits.EMPTY, edits.EQUAL)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real captions are not here")
def test_on_real_captions():
    """SugarCrepe's negatives, checked by people, pass as their own kind; paraphrases do not."""
    least = {"swap_obj": 0.65, "swap_att": 0.65, "add_obj": 0.65}
    for kind in KINDS:
        file = REAL / "sugarcrepe" / f"{kind}.json"
        rows = json.loads(file.read_text()).values()
        passed = [refusal(r["caption"], r["negative_caption"], kind) is None for r in rows]
        assert sum(passed) / len(passed) > least.get(kind, 0.75), kind
    captions = [r["caption"] for r in rows]
    ours = perturb(captions, dict.fromkeys(KINDS, 1.0))
    made = [(c, x) for c, x in zip(captions, ours.changes, strict=True) if x is not None]
    judged = [refusal(caption, x.text, x.kind) is None for caption, x in made]
    assert sum(judged) / len(judged) > 0.95
    # Five captions of an image, by five people.
    of_image = {}
    for row in json.loads((REAL / "flickr8k" / "references.json").read_text())["annotations"]:
        of_image.setdefault(row["image_id"], []).append(row["caption"])
    pairs = [pair for same in of_image.values() for pair in permutations(same, 2)]
    taken = sum(any(refusal(*pair, kind) is None for kind in KINDS) for pair in pairs)
    assert taken / len(pairs) < 0.03
