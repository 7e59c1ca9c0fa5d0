"""Recipes: what is shipped is valid and commented, overrides apply, mistakes name their mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.recipe import load_recipe, parse_recipe, shipped_recipes
from cwdpo_bench.train.sections import CWDPO, SFTC

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_named_after_their_file(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_key_of_a_shipped_recipe_has_a_comment(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    # Keys that speak for themselves, or that share the comment of the key above.
    plain = {"name", "kind", "seed", "alpha", "model", "trainer", "data", "objective"}
    plain |= {"stage1", "stage2", "cooling", "gradient_accumulation_steps", "warmup_steps"}
    plain |= {"save_steps", "save_total_limit", "easiness", "extends", "own", "weight", "rewards"}
    for above, line in zip(["", *lines], lines, strict=False):
        key = line.split(":")[0].strip()
        if line.strip() and not line.lstrip().startswith("#") and key not in plain:
            assert above.lstrip().startswith("#"), f"{name}: {key} has no comment"


def test_overrides_reach_every_depth() -> None:
    recipe = load_recipe(
        "cw-dpo",
        ["stage2.cooling.tau=0.5", "stage2.beta=0.3", "trainer.learning_rate=3e-4", "lora.r=4"],
    )
    assert isinstance(recipe.stage2, CWDPO)
    assert recipe.stage2.cooling.tau == 0.5
    assert recipe.stage2.beta == 0.3
    assert recipe.trainer["learning_rate"] == 3e-4
    assert recipe.lora.r == 4


def test_a_stage_overrides_the_trainer_of_the_recipe() -> None:
    recipe = load_recipe("cw-dpo", ["stage2.trainer.learning_rate=1e-7"])
    stages = recipe.stages()
    assert recipe.trainer_arguments(stages["stage1"])["learning_rate"] == 5e-6
    assert recipe.trainer_arguments(stages["stage2"])["learning_rate"] == 1e-7


def test_the_defaults_are_the_stated_ones() -> None:
    recipe = load_recipe("cw-dpo")
    assert isinstance(recipe.stage1, SFTC)
    assert isinstance(recipe.stage2, CWDPO)
    assert recipe.stage2.beta == 0.1
    assert recipe.stage2.cooling.detach
    assert recipe.stage2.cooling.floor == "auto"
    assert recipe.data.stage1_share == 0.75
    assert recipe.stage1.threshold == "auto"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_as_run_can_be_run_again(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["trainer.seed=7"])
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(file)) == recipe


@pytest.mark.parametrize(
    ("recipe", "override", "words"),
    [
        ("cw-dpo", "stage2.cooling.tua=1", ["stage2.cooling.tua", "'tau'"]),
        ("cw-dpo", "stage2.cooling.tau=0", ["stage2.cooling.tau", "greater than 0"]),
        ("cw-dpo", "stage2.cooling.tau=.nan", ["stage2.cooling.tau"]),
        ("cw-dpo", "stage1.lamda=1", ["stage1.lamda", "'lambda'"]),
        ("dpo", "objective.betta=1", ["objective.betta", "'beta'"]),
        ("dpo", "objective.beta=-1", ["objective.beta"]),
        ("dpo", "trainer.learning_rat=1", ["trainer.learning_rat", "'learning_rate'"]),
        ("dpo", "trainer.output_dir=x", ["trainer.output_dir", "--output"]),
        ("dpo", "dta.on_bad_row=skip", ["'dta'", "'data'"]),
        ("dpo", "lora.rank=3", ["lora.rank"]),
        ("dpo", "model.load_in_4bit=true", ["model.load_in_4bit", "lora.enabled=true"]),
        ("dpo", "model.load_in_4bits=true", ["'load_in_4bit'"]),
        ("cw-dpo", "stage2.filter.quantil=1", ["stage2.filter.quantil", "'quantile'"]),
        ("cw-dpo", "stage2.on_policy.evry=1", ["stage2.on_policy.evry", "'every'"]),
        ("v-dpo", "objective.gama=2", ["objective.gama", "'gamma'"]),
        ("opa-dpo", "stage1.own.temprature=2", ["stage1.own.temprature", "'temperature'"]),
        ("opa-dpo", "stage2.mask_wight=2", ["stage2.mask_wight", "'mask_weight'"]),
        ("hard-constraint", "stage1.treshold=2", ["stage1.treshold", "'threshold'"]),
        ("dpo", "stage1.kind=sft", ["objective", "stage1"]),
        ("dpo", "objective.kind=ppoo", ["ppoo"]),
        ("dpo", "no-equals-sign", ["no-equals-sign", "key.sub=value"]),
        ("dpo", "name.sub=1", ["name"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_mend(
    recipe: str, override: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe, [override])
    for word in words:
        assert word in str(error.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cw-dpo'"):
        load_recipe("cwdpo")


def test_broken_yaml_names_the_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("name: x\n  data: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml.*line 2"):
        load_recipe(str(file))


def test_one_stage_and_two_stages_exclude_each_other() -> None:
    values = yaml.safe_load((RECIPES / "dpo.yaml").read_text(encoding="utf-8"))
    del values["objective"]
    with pytest.raises(UserError, match="either objective, or stage1 and stage2"):
        parse_recipe(values, "test")


ABLATIONS = {
    "no-smooth-sft": (None, "cw-dpo"),
    "no-negative-sampling": ("sft", "cw-dpo"),
    "hard-constraint": ("hard-constraint", "cw-dpo"),
    "no-cw-dpo": ("sft-c", None),
    "no-cooling": ("sft-c", "cw-dpo"),
    "no-filter": ("sft-c", "cw-dpo"),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_cw_dpo_but_for_what_it_takes_away(name: str) -> None:
    full, ablated = load_recipe("cw-dpo"), load_recipe(name)
    first, second = ABLATIONS[name]
    kinds = {stage: objective.kind for stage, objective in ablated.stages().items()}
    assert kinds == {k: v for k, v in (("stage1", first), ("stage2", second)) if v is not None}
    for key in ("data", "model", "lora", "dynamics", "trainer", "init"):
        assert getattr(ablated, key) == getattr(full, key), key
    if second is not None and name not in ("no-cooling", "no-filter"):
        assert ablated.stage2 == full.stage2
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line and not line.startswith("#")]) <= 10


def test_no_cooling_fixes_the_weight_and_nothing_else() -> None:
    full, ablated = load_recipe("cw-dpo").stage2, load_recipe("no-cooling").stage2
    assert isinstance(full, CWDPO)
    assert isinstance(ablated, CWDPO)
    fixed = ablated.cooling.fixed
    assert fixed == 0.5
    unfixed = ablated.cooling.model_copy(update={"fixed": None})
    assert ablated.model_copy(update={"cooling": unfixed}) == full


def test_no_filter_leaves_no_pair_out_and_changes_nothing_else() -> None:
    full, ablated = load_recipe("cw-dpo").stage2, load_recipe("no-filter").stage2
    assert isinstance(full, CWDPO)
    assert full.filter is not None
    assert full.filter.quantile == 0.1
    assert ablated == full.model_copy(update={"filter": None})


def test_on_policy_negatives_are_off_until_asked_for() -> None:
    full = load_recipe("cw-dpo").stage2
    assert isinstance(full, CWDPO)
    assert full.on_policy is None
    stage = load_recipe("cw-dpo", ["stage2.on_policy.share=0.5"]).stage2
    assert isinstance(stage, CWDPO)
    assert stage.on_policy is not None
    assert (stage.on_policy.every, stage.on_policy.rewards[0].kind) == (100, "cider-d")


def test_a_file_extends_a_shipped_recipe_or_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nextends: dpo\nobjective: {beta: 0.3}\n")
    child = tmp_path / "child.yaml"
    child.write_text("name: child\nextends: mine.yaml\ntrainer: {learning_rate: 3e-4}\n")
    recipe, dpo = load_recipe(str(child), ["lora.r=2"]), load_recipe("dpo")
    assert (recipe.name, recipe.lora.r) == ("child", 2)
    assert recipe.objective == dpo.objective.model_copy(update={"beta": 0.3})  # type: ignore[union-attr]
    assert recipe.trainer == {**dpo.trainer, "learning_rate": 3e-4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nextends: cwdpo", ["extends", "did you mean 'cw-dpo'"]),
        ("extends: dpo", ["a name of its own"]),
        ("name: x\nextends: [dpo, sft]", ["name one recipe"]),
        ("name: x\nextends: x.yaml", ["extends itself"]),
        ("name: x\nextend: dpo\nobjective: {kind: sft}", ["'extend'", "did you mean 'extends'"]),
    ],
)
def test_a_wrong_extends_is_named_with_its_mend(
    text: str, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    assert all(word in str(error.value) for word in words), error.value
