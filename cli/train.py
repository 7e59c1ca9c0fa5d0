"""The commands that train: train, export, machines, diagnose."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cwdpo_bench.cli.options import (
    FormatOption,
    ImageRootOption,
    JsonOption,
    ModelOption,
    fail,
    layout_of,
    load_model,
)
from cwdpo_bench.demo import model_path
from cwdpo_bench.quiet import quiet_libraries


def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (sft, dpo, cw-dpo, …) or a file.")
    ],
    model: ModelOption,
    data: Annotated[
        Path,
        typer.Option(help="Pairs: .jsonl, .parquet, datasets folder or Hub id (OWNER/SET:SPLIT)."),
    ],
    output: Annotated[Path, typer.Option(help="A new folder for the checkpoint.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value … (trainer.* as TrainingArguments).")
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="Held-out pairs for the dynamics.")] = None,
    data_format: FormatOption = None,
    image_root: ImageRootOption = None,
    resume: Annotated[bool, typer.Option(help="Go on with the interrupted run there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on preference pairs with a recipe."""
    quiet_libraries()
    from cwdpo_bench.train.interruption import Interrupted
    from cwdpo_bench.train.panel import TrainPanel
    from cwdpo_bench.train.recipe import load_recipe
    from cwdpo_bench.train.run import train as run_training

    named = {"data.format": data_format, "data.image_root": image_root}
    options = [f"{key}={json.dumps(str(v))}" for key, v in named.items() if v is not None]
    loaded = load_recipe(recipe, [*(overrides or []), *options])
    # Trackers keep the command line, and a token is nothing to keep.
    sys.argv[1:] = [re.sub(r"(\bhub_token=).*", r"\1***", word) for word in sys.argv[1:]]
    # Of several processes (accelerate launch) the first one speaks.
    leads = os.environ.get("RANK", "0") == "0"
    try:
        with TrainPanel(loaded.name) as panel:
            record = run_training(
                loaded,
                model=model_path(model),
                model_name=_model_name(model),
                data=data,
                output=output,
                probe=probe,
                resume=resume,
                report=panel.step if leads else None,
                measured=panel.measured if leads else None,
            )
    except Interrupted as interrupted:
        fail(str(interrupted), status=128 + interrupted.signal)
    if not leads:
        return
    for warning in record["warnings"]:
        print(f"cwdpo-bench: warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        seconds = sum(stage["seconds"] for stage in record["stages"].values())
        print(f"{output}: {loaded.name}, {len(record['stages'])} stage(s), {seconds:.0f} s")
        print(f"rows taken for {', '.join(record['data']['layouts'])}")
        print(record["verdict"]["sentence"])


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, full or an adapter.")],
    output: Annotated[Path, typer.Option(help="A new folder for the model.")],
    merge: Annotated[
        bool, typer.Option(help="Merge an adapter into its base: loads without peft, as in vLLM.")
    ] = False,
) -> None:
    """Write a checkpoint as a model folder of plain transformers."""
    quiet_libraries()
    from cwdpo_bench.train.export import export_checkpoint

    print(f"{output}: {export_checkpoint(checkpoint, output, merge=merge)}")


def machines(
    name: Annotated[str, typer.Argument(help="ddp, fsdp2 or zero3.")],
) -> None:
    """Print a configuration for several devices: accelerate launch --config_file FILE."""
    from cwdpo_bench.train.machines import configuration

    print(configuration(name), end="")


def diagnose(
    checkpoint: Annotated[
        str, typer.Argument(help="Hub id, local folder, adapter folder, or `demo`.")
    ],
    data: Annotated[Path, typer.Option(help="Held-out pairs, as for train's --probe.")],
    against: Annotated[
        str | None, typer.Option(help="What it came from; without it there is no verdict.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder for diagnose.json and diagnose.png.")
    ] = None,
    data_format: FormatOption = None,
    image_root: ImageRootOption = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model's own code.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint's dynamics on held-out pairs: squeezing, displacement or healthy."""
    quiet_libraries()
    from cwdpo_bench.train.diagnose import diagnose as run_diagnosis
    from cwdpo_bench.train.diagnose import table

    layout = layout_of(data_format)
    model = load_model(checkpoint, trust_remote_code=trust_remote_code)
    base = None if against is None else load_model(against, trust_remote_code=trust_remote_code)
    record = run_diagnosis(
        model, data, base=base, output=output, image_root=image_root, layout=layout
    )
    if as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(table(record))
    if record["verdict"] is not None:
        print(record["verdict"]["sentence"])


def _model_name(model: str) -> str:
    """What provenance calls the model: local folders by their whole path."""
    return str(Path(model).resolve()) if model != "demo" and Path(model).is_dir() else model
