"""Recipes: YAML in, typed and validated out; unknown keys are refused with the nearest known one.

Every key under `trainer:` is a field of `transformers.TrainingArguments` by its own name.
"""

from __future__ import annotations

import dataclasses
import re
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cwdpo_bench.errors import UserError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cooling(_Section):
    """The weight w_c of the loser's term; `memory` is that of `auto-track`, in pairs."""

    floor: float | Literal["auto", "auto-track"] = "auto"
    tau: Annotated[float, Field(gt=0)] | Literal["auto", "auto-track"] = "auto"
    detach: bool = True
    memory: Annotated[int, Field(gt=0)] = 256


class SFT(_Section):
    """Plain supervised fine-tuning on the chosen answers."""

    kind: Literal["sft"]
    nll: Literal["mean", "sum"] = "mean"
    trainer: dict[str, Any] = {}


class SFTC(_Section):
    """Constrained smooth SFT; `lambda` and `threshold` are λ and C."""

    kind: Literal["sft-c"]
    nll: Literal["mean", "sum"] = "mean"
    weight: Annotated[float, Field(ge=0, alias="lambda")] = 0.1
    threshold: float = 1.0
    trainer: dict[str, Any] = {}


class DPO(_Section):
    """Direct preference optimization."""

    kind: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    trainer: dict[str, Any] = {}


class CWDPO(_Section):
    """The cooled preference loss."""

    kind: Literal["cw-dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    cooling: Cooling = Cooling()
    trainer: dict[str, Any] = {}


Objective = Annotated[SFT | SFTC | DPO | CWDPO, Field(discriminator="kind")]


class Data(_Section):
    """How the preference rows are read and shared among the stages."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    stage1_share: Annotated[float, Field(gt=0, lt=1)] = 0.75


class Model(_Section):
    """How the model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False


class Lora(_Section):
    """Low-rank adapters (peft); off means full fine-tuning."""

    enabled: bool = False
    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[int, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = (
        r".*(language_model|text_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )


class Dynamics(_Section):
    """The probe: how often, on how many held-out pairs."""

    every: Annotated[int, Field(gt=0)] = 50
    pairs: Annotated[int, Field(gt=0)] = 64


class Recipe(_Section):
    """A whole recipe: one `objective`, or `stage1` and `stage2`."""

    name: str
    data: Data = Data()
    model: Model = Model()
    lora: Lora = Lora()
    objective: Objective | None = None
    stage1: Objective | None = None
    stage2: Objective | None = None
    dynamics: Dynamics = Dynamics()
    trainer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_or_two_stages(self) -> Recipe:
        both = self.stage1 is not None and self.stage2 is not None
        none = self.stage1 is None and self.stage2 is None
        if not ((self.objective is not None and none) or (self.objective is None and both)):
            raise ValueError("write either objective, or both stage1 and stage2")
        return self

    def stages(self) -> dict[str, Objective]:
        """The stages in order, by the name of their folder."""
        if self.objective is not None:
            return {"stage1": self.objective}
        assert self.stage1 is not None
        assert self.stage2 is not None
        return {"stage1": self.stage1, "stage2": self.stage2}

    def trainer_arguments(self, stage: Objective) -> dict[str, Any]:
        """The stage's `trainer:` on top of the recipe's."""
        return {**self.trainer, **stage.trainer}

    def to_yaml(self) -> str:
        """The recipe as it ran, every default written out."""
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True)
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

    Raises:
        UserError: no such recipe, not YAML, an unknown key (the nearest is named), a bad value.
    """
    if name in shipped_recipes():
        source = f"recipe {name}"
        text = (package_files("cwdpo_bench.train") / "recipes" / f"{name}.yaml").read_text("utf-8")
    elif Path(name).is_file():
        source, text = name, Path(name).read_text(encoding="utf-8")
    else:
        raise UserError(f"no recipe and no file {name!r}; {nearest(name, shipped_recipes())}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys, see `cwdpo-bench train --help`")
    for override in overrides or []:
        _apply(values, override)
    return parse_recipe(values, source)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write key.sub=value")
    try:
        value = yaml.safe_load(text)
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


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe's mapping; `source` is what errors call it."""
    try:
        recipe = Recipe.model_validate(_number(values))
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from error
    for stage in [recipe, *recipe.stages().values()]:
        _check_trainer(stage.trainer, source)
    return recipe


def _explain(error: Any) -> str:
    # A discriminated union puts its tag between the key and the field: users did not write it.
    tags = {"sft", "sft-c", "dpo", "cw-dpo", "float", "constrained-float"}
    path = [str(part) for part in error["loc"] if str(part) not in tags]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(path[-1], _known_keys(error['loc']))}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that may stand where an unknown one was found."""
    sections: dict[str, type[BaseModel]] = {
        "sft": SFT,
        "sft-c": SFTC,
        "dpo": DPO,
        "cw-dpo": CWDPO,
        "cooling": Cooling,
        "data": Data,
        "model": Model,
        "lora": Lora,
        "dynamics": Dynamics,
    }
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        section = sections.get(str(part), section)
    return [field.alias or name for name, field in section.model_fields.items()]


def _check_trainer(trainer: dict[str, Any], source: str) -> None:
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    reserved = {"output_dir": "--output", "resume_from_checkpoint": "--resume"}
    for key in trainer:
        if key in reserved:
            raise UserError(f"{source}: trainer.{key} is set by {reserved[key]}; remove the key")
        if key not in known:
            raise UserError(
                f"{source}: unknown key 'trainer.{key}'; {nearest(key, known - set(reserved))}"
            )
