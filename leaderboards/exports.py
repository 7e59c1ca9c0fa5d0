"""The comparison as CSV, LaTeX and HTML; names are text in each, the same runs the same bytes.

Published figures are rows or tables of their own, marked as such and never ranked.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Sequence

from cwdpo_bench.leaderboards import published
from cwdpo_bench.leaderboards.comparison import Comparison, Difference, TaskComparison
from cwdpo_bench.leaderboards.display import (
    DASH,
    PROVENANCE_COLUMNS,
    caption,
    group_cell,
    interval,
    is_best,
    label,
    legend,
    metric_groups,
    overview,
    provenance_rows,
    scale,
    value_with_mark,
)
from cwdpo_bench.markup import plain

# --- CSV -----------------------------------------------------------------------------------------

CSV_COLUMNS = (
    *("task", "group", "system", "baseline", "metric", "value", "stderr", "low", "high"),
    *("seed_sd", "rank", "difference", "difference_low", "difference_high", "p", "p_holm"),
    *("test", "effect", "detectable", "verdict", "n", "source"),
)


def to_csv(comparison: Comparison, *, with_published: bool = False) -> str:
    """One line a value, on the metrics' own scale; the columns are `CSV_COLUMNS`.

    Text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for task in comparison.tasks:
        writer.writerows(_csv_rows(comparison, task))
    if with_published:
        writer.writerows(_published_csv_rows())
    return text.getvalue()


def _csv_rows(comparison: Comparison, task: TaskComparison) -> Iterator[dict[str, object]]:
    common = {"task": _cell(task.name), "baseline": _cell(comparison.baseline), "source": "run"}
    for system, row in task.scores.items():
        for metric, score in row.items():
            yield {
                **common,
                "system": _cell(system),
                "metric": _cell(metric),
                "value": score.value,
                "stderr": score.stderr,
                "low": score.ci95[0],
                "high": score.ci95[1],
                "seed_sd": score.seed_sd,
                "rank": task.ranks.get(metric, {}).get(system),
                "n": task.n,
                **_csv_difference(score.difference),
            }
    for group, rows in task.groups.items():
        for system, values in rows.items():
            for metric, value in values.items():
                tested = metric == task.group_metric
                found = task.group_differences.get(group, {}).get(system) if tested else None
                yield {
                    **common,
                    "group": _cell(group),
                    "system": _cell(system),
                    "metric": _cell(metric),
                    "value": value,
                    **_csv_difference(found),
                }


def _csv_difference(difference: Difference | None) -> dict[str, object]:
    if difference is None:
        return {}
    return {
        "difference": difference.value,
        "difference_low": difference.ci95[0],
        "difference_high": difference.ci95[1],
        "p": difference.p,
        "p_holm": difference.p_holm,
        "test": difference.test,
        "effect": difference.effect,
        "detectable": difference.detectable,
        "verdict": difference.verdict,
    }


def _published_csv_rows() -> Iterator[dict[str, object]]:
    for name, row in published.SYSTEMS.items():
        for (task, metric, group), value in zip(published.COLUMN_METRICS, row, strict=True):
            if value is not None:
                yield {
                    "task": task,
                    "group": group or "",
                    "system": f"{name} (published)",
                    "metric": metric,
                    "value": round(value / scale(metric), 6),
                    "source": "published",
                }


def _cell(text: str) -> str:
    shown = plain(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


# --- LaTeX ---------------------------------------------------------------------------------------

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "%": r"\%",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "`": r"\textasciigrave{}",
        "'": r"\textquotesingle{}",
        '"': r"\textquotedbl{}",
        "–": "--",
        "×": r"$\times$",
        "±": r"$\pm$",
        "≤": r"$\leq$",
        "≈": r"$\approx$",
        "▲": r"$\blacktriangle$",
        "▼": r"$\blacktriangledown$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "→": r"$\to$",
        "Δ": r"$\Delta$",
    }
)


def escape_latex(text: str) -> str:
    """`text` on one line with nothing that LaTeX would read as a sign."""
    return plain(text).translate(_LATEX)


def to_latex(comparison: Comparison, *, with_published: bool = False) -> str:
    """Tables in booktabs; the preamble they need stands in the first lines."""
    blocks = [
        "% Needs \\usepackage{booktabs}, \\usepackage{amssymb}, \\usepackage{textcomp} and\n"
        "% \\usepackage[T1]{fontenc}."
    ]
    columns = [column for part in overview(comparison).values() for column in part]
    rows = [
        [_name(comparison, system.name), *(_latex_value(t, m, system.name) for t, m in columns)]
        for system in comparison.systems
    ]
    headings = ["system", *(f"{task.name} {metric}" for task, metric in columns)]
    reading = " ".join(legend(comparison))
    blocks.append(_latex_table("Overview. " + reading, headings, rows))
    for task in comparison.tasks:
        for title, metrics in metric_groups(task).items():
            rows = [
                [_name(comparison, s.name), *(_latex_value(task, m, s.name) for m in metrics)]
                for s in comparison.systems
            ]
            headings = ["system", *(label(metric, task.metrics[metric]) for metric in metrics)]
            said = f"{task.name}, {title}: {caption(task)}."
            blocks.append(_latex_table(said, headings, rows))
    rows = [[escape_latex(cell) or "--" for cell in row] for row in provenance_rows(comparison)]
    blocks.append(_latex_table("What the runs state of themselves.", PROVENANCE_COLUMNS, rows))
    if with_published:
        rows = [
            [escape_latex(f"{name} (published)"), *("--" if v is None else f"{v:.1f}" for v in row)]
            for name, row in published.SYSTEMS.items()
        ]
        headings = ["published", *published.SYSTEM_COLUMNS]
        blocks.append(_latex_table(published.SOURCE, headings, rows))
    return "\n\n".join(blocks) + "\n"


def _latex_value(task: TaskComparison, metric: str, system: str) -> str:
    score = task.scores.get(system, {}).get(metric)
    if score is None:
        return "--"
    value = escape_latex(value_with_mark(metric, score))
    return rf"\textbf{{{value}}}" if is_best(task, metric, system) else value


def _latex_table(said: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(said)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
            r"\toprule",
            " & ".join(escape_latex(heading) for heading in headings) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _name(comparison: Comparison, name: str) -> str:
    return escape_latex(name) + comparison.baseline_mark(name)


# --- HTML ----------------------------------------------------------------------------------------

_STYLE = (
    ":root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}"
    "body{margin:2rem auto;max-width:75rem;padding:0 1rem}"
    "div{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0 1.5rem}"
    "th,td{padding:.25rem .7rem;text-align:right;white-space:nowrap;"
    "border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent)}"
    "th:first-child,td:first-child{text-align:left}"
    "caption{text-align:left;font-weight:600}small{display:block;opacity:.75}"
)


def to_html(
    comparison: Comparison, *, with_published: bool = False, title: str = "Leaderboard"
) -> str:
    """One self-contained page of tables, without scripts and without requests."""
    columns = [column for part in overview(comparison).values() for column in part]
    headings = ["system", *(f"{task.name} {metric}" for task, metric in columns)]
    rows = [
        [_html_name(comparison, s.name), *(_html_value(t, m, s.name, False) for t, m in columns)]
        for s in comparison.systems
    ]
    parts = [f"<h1>{html.escape(plain(title))}</h1>", _html_table("Overview", headings, rows)]
    for task in comparison.tasks:
        parts += [f"<h2>{_text(task.name)}</h2>", f"<p>{_text(caption(task))}.</p>"]
        for group_title, metrics in metric_groups(task).items():
            headings = ["system", *(label(metric, task.metrics[metric]) for metric in metrics)]
            rows = [
                [_html_name(comparison, s.name)]
                + [_html_value(task, m, s.name, True) for m in metrics]
                for s in comparison.systems
            ]
            parts.append(_html_table(group_title.capitalize(), headings, rows))
        if task.group_metric is not None and task.groups:
            names = [system.name for system in comparison.systems]
            rows = [
                [_text(group), *(_text(group_cell(task, group, name)) for name in names)]
                for group in task.groups
            ]
            parts.append(_html_table(f"{task.group_metric} by group", ["group", *names], rows))
    lines = [*legend(comparison), "Bold: significantly better than every other system."]
    parts.append("<h2>How to read this</h2>")
    parts += [f"<p>{_text(line)}</p>" for line in (*lines, *comparison.notes)]
    rows = [[_text(cell) or DASH for cell in row] for row in provenance_rows(comparison)]
    parts.append(_html_table("What the runs state of themselves", PROVENANCE_COLUMNS, rows))
    if with_published:
        rows = [
            [_text(f"{name} (published)"), *(DASH if v is None else f"{v:.1f}" for v in row)]
            for name, row in published.SYSTEMS.items()
        ]
        parts += ["<hr>", "<h2>Published figures</h2>", f"<p>{_text(published.SOURCE)}</p>"]
        parts.append(_html_table("Published", ["published", *published.SYSTEM_COLUMNS], rows))
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(plain(title))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def _text(value: str) -> str:
    return html.escape(plain(value))


def _html_name(comparison: Comparison, name: str) -> str:
    return _text(name) + comparison.baseline_mark(name)


def _html_value(task: TaskComparison, metric: str, system: str, with_interval: bool) -> str:
    score = task.scores.get(system, {}).get(metric)
    if score is None:
        return DASH
    value = _text(value_with_mark(metric, score))
    if is_best(task, metric, system):
        value = f"<strong>{value}</strong>"
    rank = task.ranks.get(metric, {}).get(system)
    small = interval(metric, score.ci95) if with_interval else ""
    if rank is not None:
        small = f"{small} rank {rank}".strip()
    return f"{value}<small>{small}</small>" if small else value


def _html_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f"<div><table>\n<caption>{_text(title)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
