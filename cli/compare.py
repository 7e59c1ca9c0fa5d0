"""The commands that compare runs: compare, gate, leaderboard, report."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from cwdpo_bench.cli.options import JsonOption, fail, show
from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.quiet import quiet_libraries

COULD_NOT_JUDGE = 3

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
        show(comparison)


class GateCommand(typer.core.TyperCommand):
    """A misspelled option is no verdict: it ends with 3, not with the parser's 2."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """As the parser's, which raises the mistake."""
        try:
            return super().make_context(*arguments, **settings)
        except Exception as error:
            if getattr(error, "exit_code", None) == 2:
                error.exit_code = COULD_NOT_JUDGE  # type: ignore[attr-defined]
            raise


def gate(
    candidate: Annotated[
        str, typer.Option(help="The run folder to judge, or NAME=FOLDER,FOLDER: a system's seeds.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option(help="The same, a file of --write-baseline, or published:CW-DPO."),
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
        fail(str(error), COULD_NOT_JUDGE)
    except Exception:
        # Python would end with 1, which here means a regression.
        traceback.print_exc()
        sys.exit(COULD_NOT_JUDGE)
    raise typer.Exit(status)


def _write_baseline(candidate: str, baseline: str | None, target: Path) -> None:
    from cwdpo_bench.evaluate.results import read_run
    from cwdpo_bench.leaderboards.baseline_file import write_baseline

    if baseline is not None:
        raise UserError("gate: --write-baseline judges nothing; leave --baseline out")
    write_baseline(read_run(Path(candidate)), target)
    print(f"{target}: {target.stat().st_size:,} bytes")


def _gate(
    candidate: str,
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


def _named_folder(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise UserError(f"--checkpoint {text}: must read SYSTEM=FOLDER")
    return name, Path(folder)
