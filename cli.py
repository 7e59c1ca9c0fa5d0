"""The command line: thin, with lazy imports, so that `--help` answers before torch could load.

Exit statuses: 0 done, 1 a fault of ours (with a traceback), 2 a mistake that the user can mend,
130 interrupted; a training that is told to stop (SIGINT, SIGTERM) saves first, then leaves with 128
plus the signal's number. `run` ends with 3 where it is done without some samples, which failed and
were allowed to (`--max-failures`). `gate` answers by its own: 0 pass, 1 regression, 2 inconclusive,
3 could not judge; every mistake and every fault there is a 3, so that none is read as a verdict.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
import typer.core

from cwdpo_bench import __version__, cli_negatives
from cwdpo_bench.cli_options import (
    MODEL_HELP,
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
    load_model,
    model_path,
    whole_number,
)
from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.quiet import quiet_libraries

if TYPE_CHECKING:
    from cwdpo_bench.leaderboards import Comparison

app = typer.Typer(
    name="cwdpo-bench",
    help="Train vision-language models with CW-DPO and prove whether a checkpoint is better.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help: rich would double the time that --help takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_negatives.app)

COULD_NOT_JUDGE = 3
SAMPLES_FAILED = 3


def main() -> None:
    """Run the command line; a user's mistake gets one line and no traceback."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        _fail(f"{error.filename or 'output'}: {error.strerror}; free space or mend the rights")


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"cwdpo-bench: error: {message}", file=sys.stderr)
    sys.exit(status)


def _version(asked: bool) -> None:
    if asked:
        print(f"cwdpo-bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Every command has its own --help."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("cwdpo-demo"),
    seed: Annotated[int, typer.Option(help="Of the training; the same seed, the same table.")] = 0,
    smoke: Annotated[bool, typer.Option(help="Fewer of everything, under two minutes.")] = False,
    every_system: Annotated[
        bool, typer.Option("--all", help="The extended table: every recipe and ablation.")
    ] = False,
) -> None:
    """Train the systems on a tiny model, score them on five benchmarks, compare; offline."""
    quiet_libraries()
    from cwdpo_bench.demo.command import run_demo

    run_demo(output, seed=seed, smoke=smoke, every_system=every_system)


@app.command()
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
        _fail(str(interrupted), status=128 + interrupted.signal)
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


@app.command()
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


@app.command()
def machines(
    name: Annotated[str, typer.Argument(help="ddp, fsdp2 or zero3.")],
) -> None:
    """Print a configuration for several devices: accelerate launch --config_file FILE."""
    from cwdpo_bench.train.machines import configuration

    print(configuration(name), end="")


@app.command()
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
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model's own code.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint's dynamics on held-out pairs: squeezing, displacement or healthy."""
    quiet_libraries()
    from cwdpo_bench.train.diagnose import diagnose as run_diagnosis
    from cwdpo_bench.train.diagnose import table

    model = load_model(checkpoint, trust_remote_code=trust_remote_code)
    base = None if against is None else load_model(against, trust_remote_code=trust_remote_code)
    record = run_diagnosis(model, data, base=base, output=output)
    if as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(table(record))
    if record["verdict"] is not None:
        print(record["verdict"]["sentence"])


@app.command()
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

    root = data_root or (Path(named) if (named := os.environ.get("CWDPO_BENCH_DATA")) else None)
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
    print("lmms:NAME, any task or group of lmms-eval\n    pip install cwdpo-bench[lmms]")


@app.command()
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


RunsArgument = Annotated[
    list[str],
    typer.Argument(help="Run folders, the baseline first; seeds as NAME=FOLDER,FOLDER."),
]
OnMismatchOption = Annotated[
    Literal["stop", "intersect"],
    typer.Option(help="Other samples in the runs: stop, or compare what all of them hold."),
]
OnSignatureOption = Annotated[
    Literal["stop", "warn"],
    typer.Option(help="Another split, prompt or scorer: stop, or compare and say so."),
]


@app.command()
def compare(
    runs: RunsArgument,
    baseline: Annotated[Path | None, typer.Option(help="Another of them as the baseline.")] = None,
    on_mismatch: OnMismatchOption = "stop",
    on_signature: OnSignatureOption = "stop",
    test: Annotated[
        Literal["bootstrap", "randomization"], typer.Option(help="Where p comes from.")
    ] = "bootstrap",
    as_csv: Annotated[bool, typer.Option("--csv", help="One line a value.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare runs pairwise: difference, interval, p."""
    from cwdpo_bench.leaderboards import compare_runs, parse_systems, to_csv, to_json

    if as_csv and as_json:
        raise UserError("--csv and --json: choose one")
    comparison = compare_runs(
        parse_systems(runs),
        baseline=baseline,
        on_mismatch=on_mismatch,
        on_signature=on_signature,
        test=test,
    )
    if as_json:
        print(json.dumps(to_json(comparison), indent=2, ensure_ascii=False))
    elif as_csv:
        print(to_csv(comparison), end="")
    else:
        _show(comparison)


class _GateCommand(typer.core.TyperCommand):
    """A misspelled option is no verdict: it ends with 3, not with the parser's 2."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        try:
            return super().make_context(*arguments, **settings)
        except Exception as error:
            if getattr(error, "exit_code", None) == 2:
                error.exit_code = COULD_NOT_JUDGE  # type: ignore[attr-defined]
            raise


@app.command(cls=_GateCommand)
def gate(
    candidate: Annotated[Path, typer.Option(help="The run folder to judge.")],
    baseline: Annotated[
        str | None,
        typer.Option(help="A run folder, a file of --write-baseline, or published:CW-DPO."),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Rules (YAML); else our own.")] = None,
    inconclusive: Annotated[
        Literal["fail", "pass"] | None, typer.Option(help="In place of the policy's.")
    ] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(help="Write the candidate as a baseline file, judge nothing.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML there.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Write a markdown summary there.")] = None,
    github: Annotated[
        bool, typer.Option(help="Annotations, step summary and output `verdict` for GitHub.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Judge a run for CI: exit 0 pass, 1 regression, 2 inconclusive, 3 could not judge."""
    try:
        if write_baseline is not None:
            _write_baseline(candidate, baseline, write_baseline)
            return
        if baseline is None:
            raise UserError("gate: name what to compare with: --baseline (or --write-baseline)")
        status = _gate(candidate, baseline, policy, inconclusive, junit, summary, github, as_json)
    except (UserError, OSError) as error:
        _fail(str(error), COULD_NOT_JUDGE)
    except Exception:
        # Python would end with 1, which here means a regression.
        traceback.print_exc()
        sys.exit(COULD_NOT_JUDGE)
    raise typer.Exit(status)


def _write_baseline(candidate: Path, baseline: str | None, target: Path) -> None:
    from cwdpo_bench.evaluate.results import read_run
    from cwdpo_bench.leaderboards.baseline_file import write_baseline

    if baseline is not None:
        raise UserError("gate: --write-baseline judges nothing; leave --baseline out")
    write_baseline(read_run(candidate), target)
    print(f"{target}: {target.stat().st_size:,} bytes")


def _gate(
    candidate: Path,
    baseline: str,
    policy: Path | None,
    inconclusive: Literal["fail", "pass"] | None,
    junit: Path | None,
    summary: Path | None,
    github: bool,
    as_json: bool,
) -> int:
    from cwdpo_bench.files import write_text
    from cwdpo_bench.leaderboards import gate_reports
    from cwdpo_bench.leaderboards.gate import run_gate, to_json

    result = run_gate(candidate, baseline, policy, inconclusive=inconclusive)
    print(json.dumps(to_json(result), indent=2) if as_json else gate_reports.to_text(result))
    if junit is not None:
        write_text(junit, gate_reports.to_junit(result))
    if summary is not None:
        write_text(summary, gate_reports.to_summary(result))
    if github:
        print(gate_reports.to_annotations(result), end="")
        for variable, text in (
            ("GITHUB_STEP_SUMMARY", gate_reports.to_summary(result)),
            ("GITHUB_OUTPUT", f"verdict={result.verdict}\n"),
        ):
            if os.environ.get(variable):
                with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
                    file.write(text)
    return result.exit_status


FORMATS = ("markdown", "csv", "latex", "html", "model-index")


@app.command()
def leaderboard(
    runs: RunsArgument,
    output: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
    output_format: Annotated[str, typer.Option("--format", help=", ".join(FORMATS))] = "markdown",
    published: Annotated[
        bool, typer.Option(help="Add the paper's published rows, apart and unranked.")
    ] = False,
    update: Annotated[
        Path | None,
        typer.Option(help="A file of yours: rewrite the table between its cwdpo-bench markers."),
    ] = None,
    on_mismatch: OnMismatchOption = "stop",
    on_signature: OnSignatureOption = "stop",
) -> None:
    """Export a comparison as a table."""
    from cwdpo_bench import leaderboards
    from cwdpo_bench.files import write_text

    if output_format not in FORMATS:
        raise UserError(f"--format {output_format!r}: {nearest(output_format, FORMATS)}")
    if (output is None) == (update is None):
        raise UserError("name one of --output and --update")
    if update is not None and output_format != "markdown":
        raise UserError("--update writes markdown; leave --format out")
    comparison = leaderboards.compare_runs(
        leaderboards.parse_systems(runs), on_mismatch=on_mismatch, on_signature=on_signature
    )
    if update is not None:
        block = leaderboards.to_markdown(comparison, brief=True)
        leaderboards.update_between_markers(update, block)
    elif output is not None and output_format == "model-index":
        write_text(output, leaderboards.to_model_index(comparison))
    elif output is not None:
        write = {
            "markdown": leaderboards.to_markdown,
            "csv": leaderboards.to_csv,
            "latex": leaderboards.to_latex,
            "html": leaderboards.to_html,
        }[output_format]
        write_text(output, write(comparison, with_published=published))
    print(output or update)


@app.command()
def report(
    runs: RunsArgument,
    output: Annotated[Path | None, typer.Option(help="The HTML file to write.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Another of them as the baseline.")] = None,
    policy: Annotated[Path | None, typer.Option(help="The gate's rules (YAML); else ours.")] = None,
    pictures: Annotated[bool, typer.Option(help="Show the samples' pictures, small.")] = True,
    data_root: Annotated[
        Path | None, typer.Option(help="Where the benchmarks lie, if not where the runs say.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="SYSTEM=FOLDER: where its checkpoint lies, if not where its run says."),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "cwdpo-bench report",
    on_mismatch: OnMismatchOption = "stop",
    on_signature: OnSignatureOption = "stop",
    serve: Annotated[
        bool, typer.Option("--serve", help="Open it in a browser here (127.0.0.1 only).")
    ] = False,
) -> None:
    """Write one HTML file to look at: verdict, differences, curves, every answer."""
    quiet_libraries()
    from cwdpo_bench.evaluate import thumbnails
    from cwdpo_bench.files import write_text
    from cwdpo_bench.leaderboards import build_report, parse_systems, serve_report

    if output is None and not serve:
        raise UserError("name a file with --output, or open the report with --serve")
    page = build_report(
        parse_systems(runs),
        baseline,
        title=title,
        policy=policy,
        pictures=thumbnails if pictures else None,
        data_root=data_root,
        checkpoints=dict(_named_folder(text) for text in checkpoint or ()),
        on_mismatch=on_mismatch,
        on_signature=on_signature,
    )
    if output is not None:
        write_text(output, page)
        print(f"{output}: {len(page.encode()):,} bytes")
    if serve:
        serve_report(page)


@app.command()
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

    if data_root is None and os.environ.get("CWDPO_BENCH_DATA"):
        data_root = Path(os.environ["CWDPO_BENCH_DATA"])
    if model is not None:
        quiet_libraries()
    checks = examine(data_root, None if model is None else model_path(model))
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        for check in checks:
            mend = f"; {check.mend}" if check.mend else ""
            print(f"{check.state:>6}  {check.name}: {check.found}{mend}")
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(2)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="The study's YAML, as docs/study.yaml.")],
    output: Annotated[Path, typer.Option(help="Its folder, new or of an earlier call.")],
    jobs: Annotated[int, typer.Option(help="Cells at a time, one thread each.", min=1)] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells, their state and the time; run none.")
    ] = False,
    as_commands: Annotated[
        bool, typer.Option("--commands", help="Print a command a cell, for any scheduler.")
    ] = False,
    cell: Annotated[
        str | None, typer.Option(help="Run this cell alone, as in cells/dpo/seed-0.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train and score systems × sweeps × seeds, and compare; finished cells are kept."""
    quiet_libraries()
    from cwdpo_bench import study as studies

    if sum((dry_run, as_commands, cell is not None)) > 1:
        raise UserError("--dry-run, --commands and --cell: choose one")
    if cell is not None:
        from cwdpo_bench.train.interruption import Interrupted

        try:
            studies.run_one(file, output, cell)
        except Interrupted as interrupted:
            _fail(str(interrupted), status=128 + interrupted.signal)
    elif as_commands:
        print("\n".join(map(shlex.join, studies.commands(file, output))))
    elif dry_run:
        plan = studies.plan(file, output)
        print(json.dumps(plan, indent=2) if as_json else studies.plan_text(plan, jobs))
    else:
        record = studies.run_study(
            file, output, jobs=jobs, say=lambda line: print(f"cwdpo-bench: {line}", file=sys.stderr)
        )
        if as_json:
            print(json.dumps(record, indent=2, ensure_ascii=False))
        else:
            print(output / "RESULTS.md")


def _named_folder(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise UserError(f"--checkpoint {text}: must read SYSTEM=FOLDER")
    return name, Path(folder)


def _show(comparison: Comparison) -> None:
    from rich.console import Console

    from cwdpo_bench.leaderboards import render

    Console().print(render(comparison))


def _show_run(results: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    from cwdpo_bench.leaderboards import compare_runs

    _show(compare_runs([output]))


def _model_name(model: str) -> str:
    """What provenance calls the model: local folders by their whole path."""
    return str(Path(model).resolve()) if model != "demo" and Path(model).is_dir() else model


def _comes_from_demo(model: str) -> bool:
    if model == "demo":
        return True
    try:
        record = json.loads((Path(model) / "provenance.json").read_text(encoding="utf-8"))
        parent = str(record["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return parent != model and _comes_from_demo(parent)


def _data_root(model: str, data_root: Path | None, *, named: bool = False) -> Path:
    if data_root is not None:
        return data_root
    if os.environ.get("CWDPO_BENCH_DATA"):
        return Path(os.environ["CWDPO_BENCH_DATA"])
    if _comes_from_demo(model):
        from cwdpo_bench.demo import data_root as demo_data_root

        return demo_data_root()
    if named:
        # Named tasks that lie nowhere are read from lmms-eval's data sets.
        return Path()
    raise UserError("no benchmark data: name their folder with --data-root or $CWDPO_BENCH_DATA")
