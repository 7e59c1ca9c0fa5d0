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
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cwdpo_bench import __version__
from cwdpo_bench.cli import compare, evaluate, negatives, train
from cwdpo_bench.cli.options import JsonOption, fail
from cwdpo_bench.errors import UserError
from cwdpo_bench.quiet import quiet_libraries

app = typer.Typer(
    name="cwdpo-bench",
    help="Train vision-language models with CW-DPO and prove whether a checkpoint is better.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help: rich would double the time that --help takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; a user's mistake gets one line and no traceback."""
    try:
        app()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        fail(f"{error.filename or 'output'}: {error.strerror}; free space or mend the rights")


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
            fail(str(interrupted), status=128 + interrupted.signal)
    elif as_commands:
        for command in studies.commands(file, output):
            print(shlex.join(command))
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


# In the order of --help.
app.command()(demo)
app.command()(train.train)
app.command()(train.export)
app.command()(train.machines)
app.command()(train.diagnose)
app.command()(evaluate.run)
app.command()(evaluate.score)
app.command()(compare.compare)
app.command(cls=compare.GateCommand)(compare.gate)
app.command()(compare.leaderboard)
app.command()(compare.report)
app.command()(evaluate.doctor)
app.command()(study)
app.add_typer(negatives.app)
