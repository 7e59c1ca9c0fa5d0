"""What the commands' modules share: options by the same name, and what a model's name means."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_HELP = "Hub id, local folder, adapter folder, or `demo`, the bundled model."
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def model_path(model: str) -> str:
    """Where the model is loaded from."""
    if model == "demo":
        from cwdpo_bench.demo import base_path

        return str(base_path())
    return model
