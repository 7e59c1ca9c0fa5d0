"""Configurations for `accelerate launch --config_file`, to be adapted: docs/SCALING.md."""

from __future__ import annotations

from importlib.resources import files

from cwdpo_bench.errors import UserError, nearest

CONFIGURATIONS = ("ddp", "fsdp2", "zero3")


def configuration(name: str) -> str:
    """The text of one of them.

    Raises:
        UserError: there is none of that name.
    """
    if name not in CONFIGURATIONS:
        raise UserError(f"no configuration {name!r}; {nearest(name, CONFIGURATIONS)}")
    return (files("cwdpo_bench.train.machines") / f"{name}.yaml").read_text(encoding="utf-8")
