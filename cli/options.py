"""What the commands' modules share: options, loading, how they end and show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cwdpo_bench.demo import model_path
from cwdpo_bench.errors import UserError

if TYPE_CHECKING:
    from cwdpo_bench.leaderboards import Comparison
    from cwdpo_bench.vlm import VLM

MODEL_HELP = "Hub id, local folder, adapter folder, or `demo`, the bundled model."
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="trl, rlhf-v, rlaif-v, mmpr, povid, vlfeedback, mdpo, sugarcrepe; auto tells by a "
        "row's fields.",
    ),
]
ImageRootOption = Annotated[
    Path | None,
    typer.Option(help="What image paths are relative to, and may not leave; else the file's."),
]
BaseUrlOption = Annotated[
    str | None, typer.Option(help="openai: the server, http://…/v1; --model is its name there.")
]
KeyVariableOption = Annotated[
    str, typer.Option(help="openai: the environment variable that holds the key.")
]
ConcurrencyOption = Annotated[int, typer.Option(help="openai: requests at a time.")]
TimeoutOption = Annotated[float, typer.Option(help="openai: seconds for a request.")]
RetriesOption = Annotated[
    int, typer.Option(help="openai: repetitions of a request that failed (429, 5xx, …).")
]
MaxRequestsOption = Annotated[
    int | None, typer.Option(help="openai: stop before more requests than that.")
]
MaxTotalTokensOption = Annotated[
    int | None, typer.Option(help="openai: stop after so many tokens, prompts included.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def layout_of(name: str | None) -> str:
    """The layout that `--format` names; by default told by each row's fields."""
    from cwdpo_bench.train.layouts import AUTO, checked_layout

    return checked_layout(name or AUTO, "--format")


def load_model(name: str, *, trust_remote_code: bool = False, dtype: str | None = None) -> VLM:
    """The model, called in results as the user called it."""
    from dataclasses import replace

    import torch

    from cwdpo_bench.vlm import load_vlm

    precision = None if dtype is None else getattr(torch, dtype)
    vlm = load_vlm(model_path(name), trust_remote_code=trust_remote_code, dtype=precision)
    return replace(vlm, name=name)


def whole_number(option: str, text: str) -> int:
    """The number that an option holds where it is not a word.

    Raises:
        UserError: it is neither.
    """
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{option}: {text!r} is neither auto nor a whole number") from error


def fail(message: str, status: int = 2) -> NoReturn:
    """Leave with one line on standard error."""
    print(f"cwdpo-bench: error: {message}", file=sys.stderr)
    sys.exit(status)


def show(comparison: Comparison) -> None:
    """A comparison as a table in the terminal."""
    from rich.console import Console

    from cwdpo_bench.leaderboards import render

    Console().print(render(comparison))
