"""What the commands' modules share: options by the same name, and what a model's name means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cwdpo_bench.errors import UserError

if TYPE_CHECKING:
    from cwdpo_bench.vlm import VLM

MODEL_HELP = "Hub id, local folder, adapter folder, or `demo`, the bundled model."
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def model_path(model: str) -> str:
    """Where the model is loaded from."""
    if model == "demo":
        from cwdpo_bench.demo import base_path

        return str(base_path())
    return model


def load_model(name: str, *, trust_remote_code: bool = False) -> VLM:
    """The model, called in results as the user called it."""
    from dataclasses import replace

    from cwdpo_bench.vlm import load_vlm

    return replace(load_vlm(model_path(name), trust_remote_code=trust_remote_code), name=name)


def whole_number(option: str, text: str) -> int:
    """The number that an option holds where it is not a word.

    Raises:
        UserError: it is neither.
    """
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{option}: {text!r} is neither auto nor a whole number") from error
