"""The commands that score: run, score, and doctor for what they need."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cwdpo_bench.cli.options import (
    MODEL_HELP,
    BaseUrlOption,
    ConcurrencyOption,
    JsonOption,
    KeyVariableOption,
    MaxRequestsOption,
    MaxTotalTokensOption,
    RetriesOption,
    TimeoutOption,
    load_model,
    show,
    whole_number,
)
from cwdpo_bench.demo import model_path
from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.quiet import quiet_libraries

SAMPLES_FAILED = 3


def run(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="coco,flickr30k,nocaps,mmmu,mmbench (else those there), pope, mmmu-test, "
            "mmbench-test, lmms:NAME, module:NAME; list: what each needs."
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the benchmarks; else $CWDPO_BENCH_DATA.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples a task.")] = None,
    batch_size: Annotated[
        str, typer.Option(help="Prompts a forward; auto: as many as the memory holds, at most 64.")
    ] = "auto",
    reference_model: Annotated[
        str | None, typer.Option(help="Measure TV and JS against this checkpoint.")
    ] = None,
    diversity: Annotated[
        int, typer.Option(help="Also sample so many captions an image: how diverse are they?")
    ] = 0,
    parse_failures: Annotated[
        Literal["wrong", "official"],
        typer.Option(help="Replies without an answer: wrong, or as the benchmark's own code."),
    ] = "wrong",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of YAML tasks of yours, for lmms:NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and how long; write nothing.")
    ] = False,
    max_failures: Annotated[
        int, typer.Option(help="So many samples may fail; they are left out, and the exit is 3.")
    ] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model's own code.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="The weights' precision; auto: bfloat16, on a CPU float32."),
    ] = "auto",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile first: minutes of work. Slower on a CPU."),
    ] = False,
    engine: Annotated[
        Literal["hf", "openai"],
        typer.Option(help="Load the model here, or ask an OpenAI-compatible server for it."),
    ] = "hf",
    base_url: BaseUrlOption = None,
    key_variable: KeyVariableOption = "OPENAI_API_KEY",
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 120,
    retries: RetriesOption = 5,
    max_requests: MaxRequestsOption = None,
    max_total_tokens: MaxTotalTokensOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a checkpoint on the benchmarks, with calibration.

    The same command goes on where an earlier one stopped. Exit status 3: done, but without some
    samples, which failed.
    """
    if tasks == "list":
        _list_tasks(data_root, as_json)
        return
    if model is None or output is None:
        raise UserError("run: name the model with --model and the run folder with --output")
    quiet_libraries()
    from cwdpo_bench.evaluate.processes import join
    from cwdpo_bench.evaluate.run import run_tasks
    from cwdpo_bench.evaluate.server import Server

    if (engine == "openai") != (base_url is not None):
        raise UserError("--engine openai and --base-url http://…/v1 go together")
    server = None
    if base_url is not None:
        server = Server(
            base_url, key_variable, concurrency, timeout, retries, max_requests, max_total_tokens
        )
    rows = None if batch_size == "auto" else whole_number("--batch-size", batch_size)
    precision = None if dtype == "auto" else dtype
    processes = join()
    reference = None
    if reference_model is not None:
        reference = load_model(
            reference_model, trust_remote_code=trust_remote_code, dtype=precision
        )
    asked: dict[str, Any] = {
        "model": model if server is not None else model_path(model),
        "model_name": model,
        "tasks": None if tasks is None else [task.strip() for task in tasks.split(",")],
        "data_root": _data_root(model, data_root, named=tasks is not None),
        "output": output,
        "limit": limit,
        "batch_size": rows,
        "reference_model": reference,
        "diversity": diversity,
        "include_path": include_path,
        "max_failures": max_failures,
        "trust_remote_code": trust_remote_code,
        "dtype": precision,
        "compiled": compiled,
        "server": server,
    }
    if dry_run:
        from cwdpo_bench.evaluate import dry_run as body

        estimates = body.dry_run(**asked)
        lines = [e._asdict() for e in estimates]
        print(json.dumps(lines, indent=2) if as_json else body.told(estimates, output))
        return
    folder = run_tasks(**asked, parse_failures=parse_failures, processes=processes)
    _show_run(folder.results, output, as_json)
    if any("failures" in task for task in folder.results["tasks"].values()):
        raise typer.Exit(SAMPLES_FAILED)


def _list_tasks(data_root: Path | None, as_json: bool) -> None:
    """Every benchmark, where its data come from, and whether a data root holds it."""
    from cwdpo_bench.evaluate.tasks import TASKS

    root = _named_data_root(data_root)
    there = {name: None if root is None else bool(t.files(root)) for name, t in TASKS.items()}
    if as_json:
        lines = [
            {"task": name, "split": task.split, "needs": task.source, "there": there[name]}
            for name, task in TASKS.items()
        ]
        print(json.dumps(lines, indent=2))
        return
    words = {None: "", True: f" (under {root})", False: f" (not under {root})"}
    for name, task in TASKS.items():
        print(f"{name}, {task.split}{words[there[name]]}\n    {task.source}")
    print("lmms:NAME, any task or group of lmms-eval\n    pip install 'cwdpo-bench[lmms]'")


def score(
    task: Annotated[str, typer.Option(help="coco, flickr30k, nocaps or mmmu.")],
    predictions: Annotated[Path, typer.Option(help="COCO result file, or MMMU output folder.")],
    output: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    references: Annotated[Path | None, typer.Option(help="COCO annotation file.")] = None,
    per_sample: Annotated[
        Path | None,
        typer.Option(help="Instead of a run folder: a file with every caption's own values."),
    ] = None,
    parse_failures: Annotated[
        Literal["wrong", "random"],
        typer.Option(help="MMMU replies without an answer: wrong, or random (official)."),
    ] = "wrong",
    as_json: JsonOption = False,
) -> None:
    """Score finished predictions; needs no model."""
    from cwdpo_bench.evaluate.score import (
        CAPTION_TASKS,
        score_candidates_file,
        score_captions_files,
        score_mmmu_folder,
    )

    if task not in (*CAPTION_TASKS, "mmmu"):
        raise UserError(f"--task: unknown task {task!r}; {nearest(task, (*CAPTION_TASKS, 'mmmu'))}")
    if (output is None) == (per_sample is None):
        raise UserError("name a run folder with --output, or a file with --per-sample")
    if task != "mmmu" and references is None:
        raise UserError(f"--task {task}: name the references with --references")
    if per_sample is not None:
        if references is None:
            raise UserError("--per-sample: values of single captions, for caption tasks alone")
        lines = score_candidates_file(task, predictions, references, per_sample)
        print(json.dumps(lines, ensure_ascii=False) if as_json else per_sample)
        return
    assert output is not None
    if references is None:
        results = score_mmmu_folder(predictions, output, parse_failures)
    else:
        results = score_captions_files(task, predictions, references, output)
    _show_run(results, output, as_json)


def doctor(
    data_root: Annotated[
        Path | None, typer.Option(help="Also look for the benchmarks there; $CWDPO_BENCH_DATA.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Also say which path training takes for it, and why.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for what a run needs, with the mend: exit 0 all there, 2 something needed is not."""
    from cwdpo_bench.evaluate.doctor import examine

    if model is not None:
        quiet_libraries()
    checks = examine(_named_data_root(data_root), None if model is None else model_path(model))
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        for check in checks:
            mend = f"; {check.mend}" if check.mend else ""
            print(f"{check.state:>6}  {check.name}: {check.found}{mend}")
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(2)


def _show_run(results: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    from cwdpo_bench.leaderboards import compare_runs

    show(compare_runs([output]))


def _comes_from_demo(model: str) -> bool:
    if model == "demo":
        return True
    try:
        record = json.loads((Path(model) / "provenance.json").read_text(encoding="utf-8"))
        parent = str(record["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return parent != model and _comes_from_demo(parent)


def _named_data_root(data_root: Path | None) -> Path | None:
    """The option, else the variable where it is set and not empty."""
    if data_root is None and (variable := os.environ.get("CWDPO_BENCH_DATA")):
        return Path(variable)
    return data_root


def _data_root(model: str, data_root: Path | None, *, named: bool = False) -> Path:
    if (root := _named_data_root(data_root)) is not None:
        return root
    if _comes_from_demo(model):
        from cwdpo_bench.demo import data_root as demo_data_root

        return demo_data_root()
    if named:
        # Named tasks that lie nowhere are read from lmms-eval's data sets.
        return Path()
    raise UserError("no benchmark data: name their folder with --data-root or $CWDPO_BENCH_DATA")
