"""Terms by name, views under other images, functions of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import Masked, Pair
from cwdpo_bench.train.objectives import OBJECTIVES, dpo_loss
from cwdpo_bench.train.recipe import load_recipe, parse_recipe
from cwdpo_bench.train.sections import SFT, SFTC, Objective
from cwdpo_bench.train.terms import (
    SequenceScores,
    known_terms,
    loss_and_metrics,
    needed_views,
    needs_reference,
    needs_rejected,
)
from cwdpo_bench.train.views import by_image, has_image_contrast, under_image

OWN = """
import torch

def hinge(delta_chosen, logp_rejected, mean_logp_rejected, *, beta: float = 0.5, margin: float):
    return torch.relu(margin - beta * delta_chosen) + 0 * logp_rejected + mean_logp_rejected

def no_term(delta_chosn, *, beta=1.0):
    return delta_chosn
"""


def _scores(seed: int, *views: str) -> dict[str, SequenceScores]:
    generator = torch.Generator().manual_seed(seed)
    return {view: SequenceScores(*-torch.rand(2, 5, generator=generator)) for view in views}


def _pair(**fields: object) -> Pair:
    values = {"id": "a", "where": "line 1", "images": (Path("a.png"),), "prompt": "?"}
    return Pair(**{**values, "chosen": "c", "rejected": "r", "references": ("c",), **fields})  # type: ignore[arg-type]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_objectives.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def _own(function: str, **keys: object) -> Objective:
    section = {"kind": f"own_objectives:{function}", **keys}
    objective = parse_recipe({"name": "own", "objective": section}, "own.yaml").objective
    assert objective is not None
    return objective


def test_needs_follow_from_the_parameters() -> None:
    needs = {
        name: (needed_views(stage), needs_reference(stage), needs_rejected(stage))
        for name in ("sft", "sft-c", "dpo")
        if (stage := load_recipe(name).objective)
    }
    assert needs == {
        "sft": (["chosen"], False, False),
        "sft-c": (["chosen", "rejected"], False, True),
        "dpo": (["chosen", "rejected"], True, True),
    }


def test_every_built_in_objective_asks_for_known_terms_only() -> None:
    import inspect

    for function in OBJECTIVES.values():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is not parameter.KEYWORD_ONLY:
                assert parameter.name in known_terms()


def test_the_loss_is_the_function_of_the_terms() -> None:
    scores, reference = _scores(0, "chosen", "rejected"), _scores(1, "chosen", "rejected")
    objective = load_recipe("dpo", ["objective.beta=0.7"]).objective
    assert objective is not None
    loss, metrics = loss_and_metrics(objective, scores, reference, None)
    delta = [scores[view].logp - reference[view].logp for view in ("chosen", "rejected")]
    torch.testing.assert_close(loss, dpo_loss(*delta, beta=0.7).mean())
    torch.testing.assert_close(metrics["rewards/margins"], 0.7 * (delta[0] - delta[1]).mean())
    torch.testing.assert_close(metrics["logps/rejected"], scores["rejected"].logp.mean())


@pytest.mark.parametrize("nll", ["mean", "sum"])
def test_nll_is_in_the_unit_of_the_section(nll: str) -> None:
    scores = _scores(0, "chosen", "rejected")
    loss, _ = loss_and_metrics(SFT.model_validate({"kind": "sft", "nll": nll}), scores, None, None)
    values = scores["chosen"].mean_logp if nll == "mean" else scores["chosen"].logp
    torch.testing.assert_close(loss, -values.mean())
    keys = {"kind": "sft-c", "nll": nll, "threshold": 10.0}
    _, metrics = loss_and_metrics(SFTC.model_validate(keys), scores, None, None)
    assert metrics["penalty/active"] == 1


@pytest.mark.usefixtures("own_module")
def test_a_function_of_the_users_own_gets_its_terms_and_keys() -> None:
    objective = _own("hinge", margin=2)
    assert needed_views(objective) == ["chosen", "rejected"]
    assert needs_reference(objective)
    scores, reference = _scores(0, "chosen", "rejected"), _scores(1, "chosen", "rejected")
    loss, _ = loss_and_metrics(objective, scores, reference, None)
    delta = scores["chosen"].logp - reference["chosen"].logp
    expected = torch.relu(2 - 0.5 * delta) + scores["rejected"].mean_logp
    torch.testing.assert_close(loss, expected.mean())
    # As run, it can be read again.
    text = parse_recipe({"name": "own", "objective": objective.model_dump()}, "x").to_yaml()
    assert "own_objectives:hinge" in text
    assert "margin: 2" in text


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("function", "keys", "words"),
    [
        ("hinge", {"margn": 1, "margin": 1}, ["objective", "'margn'", "did you mean 'margin'"]),
        ("hinge", {}, ["margin", "no default"]),
        ("hnge", {}, ["'hnge'", "did you mean 'hinge'"]),
        ("no_term", {}, ["'delta_chosn'", "did you mean 'delta_chosen'"]),
    ],
)
def test_a_wrong_own_objective_is_said_with_its_mend(
    function: str, keys: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        _own(function, **keys)
    assert all(word in str(error.value) for word in words), error.value


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot import 'no_such'.*no_such\.py"):
        parse_recipe({"name": "x", "objective": {"kind": "no_such:loss"}}, "x.yaml")


def test_views_are_grouped_by_the_image_they_stand_under() -> None:
    views = ["chosen", "rejected", "corrected", "chosen_no_image", "corrected_masked"]
    assert by_image(views, contrast=False) == {
        "own": ["chosen", "rejected", "corrected"],
        "no_image": ["chosen_no_image"],
        "masked": ["corrected_masked"],
    }
    assert by_image(views[:2], contrast=True) == {"own": ["chosen"], "rejected_image": ["rejected"]}


def test_each_group_has_its_images() -> None:
    plain, contrast = _pair(), _pair(rejected_images=(Path("b.png"),))
    assert (has_image_contrast([plain]), has_image_contrast([plain, contrast])) == (False, True)
    assert under_image(plain, "own") is plain
    assert under_image(plain, "no_image").images == ()
    assert under_image(plain, "rejected_image").images == (Path("a.png"),)
    assert under_image(contrast, "rejected_image").images == (Path("b.png"),)
    (masked,) = under_image(plain, "masked").images
    assert masked == Masked(Path("a.png"), 0.3, "a")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mask_hides_its_share_of_the_pixels_behind_their_mean(
    share: float, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    masked = np.array(Masked(tmp_path / "a.png", share, "id").open("a"))
    mean = pixels.reshape(-1, 3).mean(0).round()
    hidden = (masked == mean).all(-1)
    assert hidden.mean() == pytest.approx(share, abs=0.03)
    assert (masked[~hidden] == pixels[~hidden]).all()
    again = np.array(Masked(tmp_path / "a.png", share, "id").open("a"))
    assert (again == masked).all()
    if 0 < share < 1:
        other = np.array(Masked(tmp_path / "a.png", share, "other").open("a"))
        assert (other != masked).any()
