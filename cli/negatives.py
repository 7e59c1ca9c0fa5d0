"""`cwdpo-bench negatives`: rejected answers made, judged, filtered and mixed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cwdpo_bench.cli.options import (
    BaseUrlOption,
    ConcurrencyOption,
    FormatOption,
    ImageRootOption,
    JsonOption,
    KeyVariableOption,
    MaxRequestsOption,
    MaxTotalTokensOption,
    ModelOption,
    RetriesOption,
    TimeoutOption,
    layout_of,
    load_model,
)
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
    data_format: FormatOption = None,
    engine: Annotated[
        Literal["rules", "openai"],
        typer.Option(help="By rule, or a language model behind an OpenAI-compatible server."),
    ] = "rules",
    base_url: BaseUrlOption = None,
    model: Annotated[str | None, typer.Option(help="openai: its name at the server.")] = None,
    tries: Annotated[int, typer.Option(help="openai: replies to a caption looked at.")] = 3,
    verify: Annotated[
        bool, typer.Option(help="openai: ask whether both captions mean the same.")
    ] = True,
    temperature: Annotated[float, typer.Option(help="openai: divides the logits.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="openai: of a reply.", min=1)] = 512,
    key_variable: KeyVariableOption = "OPENAI_API_KEY",
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 120,
    retries: RetriesOption = 5,
    max_requests: MaxRequestsOption = None,
    max_total_tokens: MaxTotalTokensOption = None,
    prices: Annotated[
        str | None,
        typer.Option(help="openai: PROMPT,COMPLETION for a million tokens, to count the cost."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Change one thing in every chosen caption: by rule, or written by a language model.

    With openai the same command goes on where an earlier one stopped.
    """
    from cwdpo_bench.train.preferences.perturb import KINDS

    shares = dict.fromkeys(KINDS, 1.0) if kinds is None else dict(_shares(kinds, "--kinds"))
    layout = layout_of(data_format)
    if engine == "rules":
        if base_url is not None or model is not None:
            raise UserError("--base-url and --model go with --engine openai")
        from cwdpo_bench.train.preferences.files import perturb_file

        _tell(perturb_file(data, output, shares, seed=seed, layout=layout), output, as_json)
        return
    if base_url is None or model is None:
        raise UserError("--engine openai: name --base-url http://…/v1 and --model")
    quiet_libraries()
    from cwdpo_bench.evaluate.server import Server
    from cwdpo_bench.progress import progress_bar
    from cwdpo_bench.train.preferences.rewrite import rewrite_file
    from cwdpo_bench.train.preferences.writer import Writing

    server = Server(
        base_url, key_variable, concurrency, timeout, retries, max_requests, max_total_tokens
    )
    writing = Writing(model, tries, verify, temperature, max_new_tokens)
    with progress_bar() as display:
        bar = display.add_task("captions", total=None, note="")
        record = rewrite_file(
            data,
            output,
            shares,
            server,
            writing,
            seed=seed,
            layout=layout,
            prices=None if prices is None else _prices(prices),
            progress=lambda total: display.update(bar, total=total, advance=1),
        )
    _tell(record, output, as_json)


@app.command()
def sample(
    data: DataArgument,
    model: ModelOption,
    output: OutputOption,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut off.", min=1)] = 64,
    seed: SeedOption = 0,
    data_format: FormatOption = None,
    image_root: ImageRootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a rejected answer a row from a model, kept where it is worse than the chosen one."""
    from cwdpo_bench.train.preferences.files import sample_file
    from cwdpo_bench.train.sections import Sampling

    if not 0 < temperature < float("inf"):
        raise UserError(f"--temperature: {temperature} is not above 0")
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
    reading: dict[str, Any] = {"image_root": image_root, "layout": layout_of(data_format)}
    record = sample_file(data, output, _load(model), sampling, seed=seed, **reading)
    _tell(record, output, as_json)


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
    data_format: FormatOption = None,
    image_root: ImageRootOption = None,
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
        image_root=image_root,
        layout=layout_of(data_format),
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
    data_format: FormatOption = None,
    image_root: ImageRootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how easy a file's rejected answers are for a model, before any training."""
    from cwdpo_bench.train.preferences.easiness import easiness_table, judge_file

    found = judge_file(
        data,
        _load(model),
        output=output,
        with_images=not without_images,
        batch_size=batch_size,
        image_root=image_root,
        layout=layout_of(data_format),
    )
    if as_json:
        print(json.dumps(found.record(), indent=2))
        return
    from rich.console import Console

    Console().print(easiness_table(found, f"{data.name} under {model}"))


@app.command()
def check(
    data: DataArgument,
    without_images: Annotated[bool, typer.Option(help="Do not look at image files.")] = False,
    without_rejected: Annotated[bool, typer.Option(help="Rows need no rejected answer.")] = False,
    data_format: FormatOption = None,
    image_root: ImageRootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a file as train would, row by row, and tell every kind of bad row: exit 2 if any."""
    from cwdpo_bench.train.preferences.check import check_file

    record = check_file(
        data,
        with_images=not without_images,
        need_rejected=not without_rejected,
        image_root=image_root,
        layout=layout_of(data_format),
    )
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        print(f"{data}: {record['good']} of {record['rows']} rows are good")
        print(f"taken for {_counts(record['layouts'])}")
        for reason, count in record["dropped"].items():
            print(f"{count} x {reason}, the first: {record['first'][reason]}")
    if record["dropped"]:
        raise typer.Exit(2)


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


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


def _prices(text: str) -> tuple[float, float]:
    try:
        prompt, completion = map(float, text.split(","))
        if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
            raise ValueError
    except ValueError as error:
        raise UserError(f"--prices: {text!r} is not two prices, as in 2.5,10") from error
    return prompt, completion


def _tell(record: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, indent=2))
        return
    print(f"{output}: {record['written']} of {record['rows']} rows")
    if "layouts" in record:
        print(f"taken for {_counts(record['layouts'])}")
    for title in ("kinds", "edit_size", "from", "refused", "usage", "usage_in_all"):
        if record.get(title):
            print(f"{title.replace('_', ' ')}: {_counts(record[title])}")
    for failure in record.get("failures", ()):
        print(f"cwdpo-bench: no reply: {failure}", file=sys.stderr)
    for reason, count in record.get("dropped", {}).items():
        print(f"cwdpo-bench: dropped: {count}: {reason}", file=sys.stderr)
