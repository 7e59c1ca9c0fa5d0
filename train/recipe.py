"""Recipes: YAML in, typed and validated out; unknown keys are refused with the nearest known one.

Every key under `trainer:` is a field of `transformers.TrainingArguments` by its own name, for the
kind `grpo` of `trl.GRPOConfig`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, Field, SecretStr, ValidationError, model_validator

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.train.sections import (
    GRPO,
    Data,
    Dynamics,
    Lora,
    Model,
    Objective,
    Section,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

HUB_SWITCHES = (
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
)
"""Fields of `TrainingArguments` that `train/hub.py` follows in the Trainer's place."""
_TOLD = {*HUB_SWITCHES, "report_to", "run_name"}
"""What of `trainer` says whom a run is shown to, not how it is made: another run in nothing."""


class Recipe(Section):
    """A whole recipe: one `objective`, or `stage1` and `stage2`, of which one may be left out.

    `init` is a checkpoint to start from instead of the model's own weights.
    """

    name: str
    init: str | None = None
    data: Data = Data()
    model: Model = Model()
    lora: Lora = Lora()
    objective: Objective | None = None
    stage1: Objective | None = None
    stage2: Objective | None = None
    dynamics: Dynamics = Dynamics()
    trainer: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_or_two_stages(self) -> Recipe:
        staged = self.stage1 is not None or self.stage2 is not None
        if staged == (self.objective is not None):
            raise ValueError("write either objective, or stage1 and stage2 (one may be left out)")
        return self

    @model_validator(mode="after")
    def _four_bits_carry_adapters(self) -> Recipe:
        if self.model.load_in_4bit and not self.lora.enabled:
            raise ValueError(
                "model.load_in_4bit: weights in 4 bits are not trained, adapters on them are; set "
                "lora.enabled=true, or remove the key for full fine-tuning"
            )
        return self

    def stages(self) -> dict[str, Objective]:
        """The stages in order, by the name of their folder."""
        stages = {"stage1": self.objective or self.stage1, "stage2": self.stage2}
        return {name: objective for name, objective in stages.items() if objective is not None}

    def key_of(self, stage: str) -> str:
        """The key under which a stage stands in the recipe."""
        return stage if self.objective is None else "objective"

    def trainer_arguments(self, stage: Objective) -> dict[str, Any]:
        """The stage's `trainer:` on top of the recipe's."""
        return {**self.trainer, **stage.trainer}

    def to_yaml(self) -> str:
        """The recipe as it ran, every default written out; not whom it was shown to."""
        stages = ("objective", "stage1", "stage2")
        left_out: Any = {"trainer": _TOLD, **{stage: {"trainer": _TOLD} for stage in stages}}
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=left_out)
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = package_files("cwdpo_bench.train") / "recipes"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a YAML file by path, and apply `key.sub=value` overrides.

    A recipe that `extends` another holds that one's keys but for those that it writes itself.

    Raises:
        UserError: no such recipe, not YAML, an unknown key (the nearest is named), a bad value.
    """
    source, values = _read(name, Path())
    for override in overrides or []:
        _apply(values, override)
    return parse_recipe(values, source)


def _read(name: str, folder: Path, heirs: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
    """What a recipe is called in messages, and its keys with those that it inherits.

    Args:
        name: a shipped recipe, or a file relative to `folder`.
        folder: where the heir lies.
        heirs: the recipes that extend this one.
    """
    file = folder / name
    if name in shipped_recipes():
        source, file = f"recipe {name}", Path(name)
        text = (package_files("cwdpo_bench.train") / "recipes" / f"{name}.yaml").read_text("utf-8")
    elif file.is_file():
        source, text = str(file), file.read_text(encoding="utf-8")
    else:
        place = f"{heirs[-1]}: extends: " if heirs else ""
        raise UserError(
            f"{place}no recipe and no file {name!r}; {nearest(name, shipped_recipes())}"
        )
    try:
        values = copy.deepcopy(_from_yaml(text))
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys, see `cwdpo-bench train --help`")
    parent = values.pop("extends", None)
    if parent is None:
        return source, values
    if source in heirs:
        raise UserError(f"{source}: extends itself ({' → '.join((*heirs, source))})")
    if not isinstance(parent, str) or "name" not in values:
        raise UserError(f"{source}: extends: name one recipe, and give this one a name of its own")
    return source, _merged(_read(parent, file.parent, (*heirs, source))[1], values)


@cache
def _from_yaml(text: str) -> Any:
    """What a text says, read once: a study's cells read the same recipes hundreds of times."""
    return yaml.safe_load(text)


def _merged(base: dict[str, Any], heir: dict[str, Any]) -> dict[str, Any]:
    """The base's keys under the heir's; a section of another `kind` replaces the base's whole."""
    merged = dict(base)
    for key, value in heir.items():
        inherited = base.get(key)
        if (
            isinstance(value, dict)
            and isinstance(inherited, dict)
            and value.get("kind", inherited.get("kind")) == inherited.get("kind")
        ):
            value = _merged(inherited, value)
        merged[key] = value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write key.sub=value")
    try:
        value = copy.deepcopy(_from_yaml(text))
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML") from error
    *parents, last = key.split(".")
    here = values
    for parent in parents:
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise UserError(f"override {override!r}: {parent!r} holds a value, not keys")
    here[last] = _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `3e-4` as text; everyone who types it means a number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return value


def step_settings(recipe: Recipe, steps: int) -> list[str]:
    """Overrides that give a recipe so many update steps; two stages share them as their pairs."""
    if len(recipe.stages()) == 1:
        return [f"trainer.max_steps={steps}"]
    first = min(max(round(recipe.data.stage1_share * steps), 1), steps - 1)
    return [f"stage1.trainer.max_steps={first}", f"stage2.trainer.max_steps={steps - first}"]


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe's mapping; `source` is what errors call it."""
    try:
        recipe = Recipe.model_validate(_number(values))
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from error
    for stage in recipe.stages().values():
        _check_trainer(recipe.trainer_arguments(stage), arguments_class(stage), source)
    for keys in (recipe.trainer, *(stage.trainer for stage in recipe.stages().values())):
        if (token := keys.get("hub_token")) is not None:
            # From here on nothing that prints or stores a recipe shows it.
            keys["hub_token"] = SecretStr(str(token))
    return recipe


def _explain(error: Any) -> str:
    section, path = _walk(error["loc"])
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = [*_fields(section), *(["extends"] if section is Recipe else [])]
        return f"unknown key {key!r}; {nearest(path[-1], known)}"
    if error["type"] == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        kinds = set(re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])) - {"custom"}
        return f"{key}.kind: unknown {tag!r}; {nearest(tag, kinds)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    """Annotations by the keys that may stand in a section."""
    return {f.alias or name: f.annotation for name, f in section.model_fields.items()}


def _walk(location: tuple[Any, ...]) -> tuple[type[BaseModel], list[str]]:
    """The section in which an error lies, and the path of its key as users write it.

    Pydantic puts the tags of unions between the keys; users did not write those.
    """
    section: type[BaseModel] = Recipe
    path: list[str] = []
    tagged: dict[str, type[BaseModel]] = {}
    for part in map(str, location):
        if part in tagged:
            section, tagged = tagged[part], {}
            continue
        path.append(part)
        if part.isdigit():
            # The place in a list, whose items are what the list's key says.
            continue
        nested = _sections_in(_fields(section).get(part))
        if not nested:
            break
        if len(nested) == 1:
            section = nested[0]
        else:
            tagged = {_kind_of(choice): choice for choice in nested}
    return section, path


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _kind_of(section: type[BaseModel]) -> str:
    kinds = get_args(section.model_fields["kind"].annotation)
    return str(kinds[0]) if kinds else "custom"


def arguments_class(objective: Objective) -> type[TrainingArguments]:
    """The class whose fields stand under `trainer` for this objective.

    Raises:
        UserError: it is TRL's, and TRL is not installed.
    """
    if isinstance(objective, GRPO):
        from cwdpo_bench.train.grpo import GRPOArguments

        return GRPOArguments
    from transformers import TrainingArguments

    return TrainingArguments


def _check_trainer(
    trainer: dict[str, Any], arguments: type[TrainingArguments], source: str
) -> None:
    known = {field.name for field in dataclasses.fields(arguments) if field.init}
    reserved = {"output_dir": "--output", "resume_from_checkpoint": "--resume"}
    for key in trainer:
        if key == "logging_dir" and key not in known:
            raise UserError(
                f"{source}: trainer.logging_dir: transformers 5 has no such key; set the "
                "environment variable TENSORBOARD_LOGGING_DIR"
            )
        if key in reserved:
            raise UserError(f"{source}: trainer.{key} is set by {reserved[key]}; remove the key")
        if key not in known:
            raise UserError(
                f"{source}: unknown key 'trainer.{key}'; {nearest(key, known - set(reserved))}"
            )
