"""`cwdpo-bench negatives`: rejected answers made, judged, filtered and mixed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cwdpo_bench.cli_options import JsonOption, ModelOption, load_model
from cwdpo_bench.errors import UserError
from cwdpo_bench.quiet import quiet_libraries

if TYPE_CHECKING:
    from cwdpo_bench.vlm import VLM

app = typer.Typer(
    name="negatives",
    help="Make rejected answers, and judge, filter and mix those of a preference file.",
    no_args_is_help=True,
)

DataArgument = Annotated[Path, typer.Argument(help="Rows as for train's --data.")]
OutputOption = Annotated[Path, typer.Option(help="The .jsonl to write, beside the images.")]
SeedOption = Annotated[int, typer.Option(help="Of everything drawn.")]
WithoutImages = Annotated[
    bool, typer.Option(help="Score the texts alone, where the images are not at hand.")
]
BatchOption = Annotated[int, typer.Option(help="Pairs a forward.", min=1)]


@app.command()
def perturb(
    data: DataArgument,
    output: OutputOption,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="kind=share,…: replace_obj, replace_att, replace_rel, swap_obj, swap_att, "
            "add_obj, add_att; equal shares of all by default."
        ),
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Change one thing in every chosen caption, by rule; needs no model."""
    from cwdpo_bench.train.preferences.files import perturb_file
    from cwdpo_bench.train.preferences.perturb import KINDS

    shares = dict.fromkeys(KINDS, 1.0) if kinds is None else dict(_shares(kinds, "--kinds"))
    _tell(perturb_file(data, output, shares, seed=seed), output, as_json)


@app.command()
def sample(
    data: DataArgument,
    model: ModelOption,
    output: OutputOption,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut off.", min=1)] = 64,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw a rejected answer a row from a model, kept where it is worse than the chosen one."""
    from cwdpo_bench.train.preferences.files import sample_file
    from cwdpo_bench.train.sections import Sampling

    if not 0 < temperature < float("inf"):
        raise UserError(f"--temperature: {temperature} is not above 0")
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
    _tell(sample_file(data, output, _load(model), sampling, seed=seed), output, as_json)


@app.command("filter")
def filter_(
    data: DataArgument,
    model: ModelOption,
    output: OutputOption,
    quantile: Annotated[
        float | None, typer.Option(help="Drop this share, the easiest rejected answers.")
    ] = None,
    below: Annotated[
        float | None, typer.Option(help="Drop rejected answers under this log p a token (nats).")
    ] = None,
    without_images: WithoutImages = False,
    batch_size: BatchOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Leave out rows whose rejected answer is empty, equal, or extremely easy for a model."""
    from cwdpo_bench.train.preferences.files import filter_file
    from cwdpo_bench.train.sections import Filter

    if quantile is not None and not 0 <= quantile < 1:
        raise UserError(f"--quantile: {quantile} is not in [0, 1)")
    rule = Filter(quantile=quantile, below=below)
    record = filter_file(
        data,
        output,
        _load(model),
        rule,
        with_images=not without_images,
        batch_size=batch_size,
    )
    _tell(record, output, as_json)


@app.command()
def mix(
    parts: Annotated[list[str], typer.Argument(help="FILE=SHARE …; the first one's rows.")],
    output: OutputOption,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Take each row's rejected answer from one of several files, in stated shares."""
    from cwdpo_bench.train.preferences.files import mix_files

    named = [pair for part in parts for pair in _shares(part, "mix")]
    _tell(mix_files([(Path(f), share) for f, share in named], output, seed=seed), output, as_json)


@app.command()
def stats(
    data: DataArgument,
    model: ModelOption,
    output: Annotated[
        Path | None, typer.Option(help="A folder for easiness.json and easiness.png.")
    ] = None,
    without_images: WithoutImages = False,
    batch_size: BatchOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Say how easy a file's rejected answers are for a model, before any training."""
    from cwdpo_bench.train.preferences.easiness import easiness_table, judge_file

    found = judge_file(
        data, _load(model), output=output, with_images=not without_images, batch_size=batch_size
    )
    if as_json:
        print(json.dumps(found.record(), indent=2))
        return
    from rich.console import Console

    Console().print(easiness_table(found, f"{data.name} under {model}"))


def _load(model: str) -> VLM:
    quiet_libraries()
    return load_model(model)


def _shares(text: str, option: str) -> list[tuple[str, float]]:
    shares = []
    for part in text.split(","):
        name, _, share = part.rpartition("=")
        try:
            shares.append((name.strip(), float(share)))
        except ValueError as error:
            raise UserError(
                f"{option}: {part!r} is not name=share, as in replace_obj=0.5"
            ) from error
    return shares


def _tell(record: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, indent=2))
        return
    print(f"{output}: {record['written']} of {record['rows']} rows")
    for title in ("kinds", "edit_size", "from"):
        if title in record:
            told = ", ".join(f"{name}: {count}" for name, count in record[title].items())
            print(f"{title.replace('_', ' ')}: {told}")
    for reason, count in record.get("dropped", {}).items():
        print(f"cwdpo-bench: dropped: {count}: {reason}", file=sys.stderr)
