"""Remake the tables and the figures of docs/RESULTS.md from the committed records.

    python docs/results/remake.py                                  # tables and figures
    python docs/results/remake.py --take study/study.json          # a new record first

The records are what `cwdpo-bench study docs/study.yaml` and its siblings left in `study.json`,
without what no table reads, and what `stopping.py` and `costs.py` beside this file measured.
Intervals are of Student's t over the training seeds, of differences paired by seed; p is Holm's
over the rows of a table and column.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from cwdpo_bench.files import read_json, write_text
from cwdpo_bench.leaderboards.markdown import table
from cwdpo_bench.leaderboards.significance import holm

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "RESULTS.md"
README = FOLDER.parents[1] / "README.md"
Cells = dict[str, dict[int, dict[str, Any]]]
"""Row → seed → the cell's entry."""
Measure = Callable[[dict[str, Any]], float]

# --- records -------------------------------------------------------------------------------------


def take(file: Path) -> None:
    """Keep what the tables read of a study's record, beside the cells that it lacks."""
    record = read_json(file)
    name = f"{Path(record['study']).stem}.json"
    if (FOLDER / name).is_file():
        # A study that has got new rows or seeds need not train the others again.
        before = {cell["cell"]: cell for cell in read_json(FOLDER / name)["cells"]}
        record["cells"] = [*(before | {cell["cell"]: cell for cell in record["cells"]}).values()]
        record["seeds"] = sorted({cell["seed"] for cell in record["cells"]})
    kept = {
        key: record[key]
        for key in ("study", "model", "seeds", "chosen", "cells", "warnings", "failed")
    } | {"libraries": record["comparison"]["systems"][0]["provenance"]["libraries"]}
    kept["tries"] = [
        {key: attempt[key] for key in ("system", "settings", "scores")}
        for attempt in record["tries"]
    ]
    # A cell a line: a record that changes can be read as a difference.
    cells = ",\n".join(json.dumps(cell, allow_nan=False) for cell in kept.pop("cells"))
    head = json.dumps(kept, allow_nan=False)[:-1]
    write_text(FOLDER / name, f'{head}, "cells": [\n{cells}\n]}}\n')


def read(name: str) -> Cells:
    """A committed record by row and seed."""
    found: Cells = {}
    for cell in read_json(FOLDER / f"{name}.json")["cells"]:
        found.setdefault(cell["row"], {})[cell["seed"]] = cell
    return found


# --- measures ------------------------------------------------------------------------------------


def score(name: str, scale: float = 100) -> Measure:
    """A benchmark's metric, as in `coco/CIDEr`."""
    return lambda cell: float(cell["scores"][name]) * scale


def end(column: str, scale: float = 1) -> Measure:
    """The last measurement of the learning dynamics."""
    return lambda cell: float(cell["curves"][column][-1]) * scale


def ratio(column: str) -> Measure:
    """The last measurement over the first."""
    return lambda cell: float(cell["curves"][column][-1]) / float(cell["curves"][column][0])


def mean(column: str) -> Measure:
    """The mean over the measurements after the first step; a stage may have none of it."""
    return lambda cell: float(np.mean([x for x in cell["curves"][column][1:] if x is not None]))


def steps(cell: dict[str, Any]) -> float:
    """Update steps that were taken."""
    return float(cell["training"]["steps"])


def stage1(key: str, scale: float = 1) -> Measure:
    """A figure of the first stage's record."""
    return lambda cell: float(cell["training"]["stages"]["stage1"][key]) * scale


def steps_to(level: float) -> Measure:
    """Update steps until the held-out chosen answers reach a mean log p; infinite where never."""

    def measure(cell: dict[str, Any]) -> float:
        curve = zip(cell["curves"]["total_step"], cell["curves"]["chosen_mean_logp"], strict=True)
        return next((step for step, value in curve if step and value >= level), float("inf"))

    return measure


def spent(level: float, costs: dict[str, dict[str, float]], unit: str) -> Measure:
    """Tokens or seconds until then, from what a step of each stage costs."""

    def measure(cell: dict[str, Any]) -> float:
        left, total = steps_to(level)(cell), 0.0
        if np.isinf(left):
            return left
        for name, stage in cell["training"]["stages"].items():
            taken = min(left, stage["steps"])
            if taken:
                total += taken * costs[name][unit]
            left -= taken
        return total

    return measure


# --- statistics ----------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval over seeds; of one value no width is known."""
    middle = float(np.mean(values))
    if len(values) < 2:
        return middle, float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return middle, float(stats.t.ppf(0.975, len(values) - 1)) * error


def said(values: Sequence[float], digits: int) -> str:
    """`mean ± half-width`."""
    middle, width = interval(values)
    text = f"{middle:.{digits}f}"
    return text if np.isnan(width) else f"{text} ± {width:.{digits}f}"


def paired(cells: Cells, first: str, second: str, measure: Measure) -> list[float]:
    """First − second, seed by seed."""
    seeds = sorted(set(cells[first]) & set(cells[second]))
    return [measure(cells[first][seed]) - measure(cells[second][seed]) for seed in seeds]


def p_value(differences: Sequence[float]) -> float:
    """Two-sided, of the paired t test; 1 where there is no difference or one seed alone."""
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    return float(stats.ttest_1samp(differences, 0).pvalue)


Column = tuple[str, Measure, int]
"""Heading, what it measures, decimals."""


def values_table(cells: Cells, rows: Sequence[str], columns: Sequence[Column]) -> str:
    """Means over seeds with their intervals."""
    lines = [
        [row, str(len(cells[row]))]
        + [
            said([measure(c) for c in cells[row].values()], digits)
            for _, measure, digits in columns
        ]
        for row in rows
        if row in cells
    ]
    return table(["system", "seeds", *(heading for heading, *_ in columns)], lines)


def differences_table(
    cells: Cells, pairs: Sequence[tuple[str, str]], columns: Sequence[Column]
) -> str:
    """First − second, with intervals; `*` where Holm's p is at most 0.05."""
    return table(
        ["difference", *(heading for heading, *_ in columns)], _differences(cells, pairs, columns)
    )


def _differences(
    cells: Cells, pairs: Sequence[tuple[str, str]], columns: Sequence[Column]
) -> list[list[str]]:
    """The lines of the table; pairs of which a row is missing are left out."""
    pairs = [pair for pair in pairs if all(row in cells for row in pair)]
    lines = [[f"{first} − {second}"] for first, second in pairs]
    for _, measure, digits in columns:
        found = [paired(cells, *pair, measure) for pair in pairs]
        adjusted = holm([p_value(values) for values in found])
        for line, values, p in zip(lines, found, adjusted, strict=True):
            middle, width = interval(values)
            line.append(
                f"{middle:+.{digits}f} ± {width:.{digits}f}" + (" \\*" if p <= 0.05 else "")
            )
    return lines


def side_by_side(
    studies: dict[str, Cells], pairs: Sequence[tuple[str, str]], columns: Sequence[Column]
) -> str:
    """The same differences in several studies, study beside study in each column.

    Holm's family are a study's rows, those of `pairs` alone.
    """
    for cells in studies.values():
        pairs = [pair for pair in pairs if all(row in cells for row in pair)]
    found = [_differences(cells, pairs, columns) for cells in studies.values()]
    lines = [
        [blocks[0][0], *chain(*zip(*(block[1:] for block in blocks), strict=True))]
        for blocks in zip(*found, strict=True)
    ]
    return table(
        ["difference", *(f"{heading}, {name}" for heading, *_ in columns for name in studies)],
        lines,
    )


def marked_table(
    cells: Cells,
    rows: Sequence[str],
    columns: Sequence[Column],
    against: str,
    family: Sequence[str] = (),
) -> str:
    """Means over seeds; ▲ and ▼ where Holm's p of the difference to `against` is at most 0.05.

    ▲ is better: higher, but for calibration errors and CHAIR. Holm's family are the rows and those
    of `family` that have the score, so that a table of some rows marks what the table of all does.
    """
    rows = [row for row in rows if row in cells]
    tested = [row for row in dict.fromkeys((*rows, *family)) if row in cells and row != against]
    lines = [[f"**{row}**" if row == against else row] for row in rows]
    for heading, measure, digits in columns:
        found = {
            row: paired(cells, row, against, measure)
            for row in tested
            if row in rows or _is_measured(cells[row], measure)
        }
        adjusted = dict(zip(found, holm([p_value(x) for x in found.values()]), strict=True))
        lower_is_better = "ECE" in heading or "CHAIR" in heading
        for line, row in zip(lines, rows, strict=True):
            text = f"{np.mean([measure(cell) for cell in cells[row].values()]):.{digits}f}"
            if row != against and adjusted[row] <= 0.05:
                text += " ▲" if (np.mean(found[row]) < 0) == lower_is_better else " ▼"
            line.append(text)
    return table(["system", *(heading for heading, *_ in columns)], lines)


def _is_measured(seeds: dict[int, dict[str, Any]], measure: Measure) -> bool:
    try:
        return bool([measure(cell) for cell in seeds.values()])
    except KeyError:
        return False


def verdicts(cells: Cells, row: str) -> str:
    """How many seeds had which verdict."""
    names = [cell["training"]["verdict"] for cell in cells[row].values()]
    return ", ".join(f"{name} {names.count(name)}/{len(names)}" for name in sorted(set(names)))


def verdicts_table(studies: dict[str, Cells], rows: Sequence[str]) -> str:
    """The verdicts of the same rows in several studies."""
    return table(
        ["system", *studies],
        [[row, *(verdicts(cells, row) for cells in studies.values())] for row in rows],
    )


# --- the tables ----------------------------------------------------------------------------------

SHARES = ("dpo-easy-0", "dpo", "dpo-easy-1")
COOLED = ("cooled-easy-0", "cooled", "cooled-easy-1")
CONTROLS = ("fixed-0.25", "fixed-0.5", "undetached", "auto-track", "dpo-slow", "dpo-beta-0.5")
STAGES = ("sft-c+dpo", "cw-dpo", "sft")
STOPPED = ("dpo", "dpo-stop-squeezing", "dpo-stop-delta", "sft")
SYSTEMS = ("sft", "sft-c", "dpo", "sft-c+dpo", "cw-dpo", "v-dpo", "opa-dpo", "ppo", "grpo")
FAST = ("sft-c+dpo-fast", "cw-dpo-fast", "on-policy")
AFTER = ("after-sft", "after-dpo", "after-cooled", "after-v-dpo", "after-opa-dpo", "after-ppo")
ABLATIONS = (
    *("no-smooth-sft", "no-negative-sampling", "hard-constraint"),
    *("no-cw-dpo", "no-cooling", "no-filter"),
)
PUBLISHED = {
    "no-smooth-sft": -5.0,
    "no-negative-sampling": -3.7,
    "hard-constraint": -3.4,
    "no-cw-dpo": -1.9,
    "no-cooling": -1.1,
    "no-filter": -5.2,
}
"""COCO CIDEr less that of the full system, as the paper's table of ablations has them."""

DYNAMICS: tuple[Column, ...] = (
    ("chosen ℓ̄", end("chosen_mean_logp"), 2),
    ("rejected ℓ̄", end("rejected_mean_logp"), 2),
    ("argmax ℓ̄", end("argmax_mean_logp"), 2),
    ("top-1", end("top1_probability"), 3),
    ("token ECE", end("token_ece"), 3),
    ("TV", end("tv"), 3),
    ("JS", end("js"), 3),
    ("COCO CIDEr", score("coco/CIDEr"), 0),
)
PULL: tuple[Column, ...] = (
    ("P(chosen over rejected)", end("preference_probability"), 2),
    ("loss of the easy half, %", end("easy_loss_share", 100), 0),
    ("loser's residual of the easy half, %", end("easy_residual_share", 100), 0),
    ("loser's share of the gradient", end("loser_gradient_share"), 2),
)
INFLUENCE: tuple[Column, ...] = (
    ("‖A‖, end / start", ratio("influence_belief"), 2),
    ("‖K‖, end / start", ratio("influence_kernel"), 2),
    ("‖G‖, end / start", ratio("influence_residual"), 2),
    ("predicted against realised, r", end("influence_correlation"), 4),
)
CIDER = DYNAMICS[-1]
STEPS: Column = ("update steps", steps, 0)
SCORES: tuple[Column, ...] = (
    ("COCO CIDEr", score("coco/CIDEr"), 0),
    ("NoCaps CIDEr", score("nocaps/CIDEr"), 0),
    ("MMMU", score("mmmu/accuracy"), 1),
    ("MMBench", score("mmbench/accuracy"), 1),
    ("CHAIR-i", score("coco/CHAIR-i"), 1),
    ("COCO token ECE", score("coco/token_ece"), 1),
    ("MMMU ECE", score("mmmu/ece"), 1),
    ("chosen ℓ̄", end("chosen_mean_logp"), 3),
)
CAPTIONS: tuple[Column, ...] = (
    ("Flickr30k CIDEr", score("flickr30k/CIDEr"), 0),
    ("Flickr30k token ECE", score("flickr30k/token_ece"), 1),
    ("distinct-1", score("flickr30k/distinct-1"), 1),
    ("distinct-2", score("flickr30k/distinct-2"), 1),
    ("self-CIDEr", score("flickr30k/self-CIDEr"), 1),
    ("Vendi", score("flickr30k/vendi", 1), 2),
)
CONSTRAINTS = ("lambda-1", "C-6", "lambda-1,C-6")
SETTINGS = ("split-0.25", "split-0.5", "split-0.9", *CONSTRAINTS)
SIZED = ("sft", "cw-dpo")
NUMBERS = ("", "-375", "-94")
"""Of pairs, as the rows' names end; all of them have no ending."""
PENALTY: tuple[Column, ...] = (
    ("C", stage1("threshold"), 2),
    ("penalty acted, % of steps", stage1("penalty_active", 100), 0),
    ("rejected ℓ̄", end("rejected_mean_logp"), 2),
)
WEIGHTS: tuple[Column, ...] = (
    ("mean w_c", mean("cooling_weight"), 2),
    *(DYNAMICS[k] for k in (0, 1, 4, 5, 7)),
)


def tables() -> dict[str, str]:
    """Every table of the page by the name in its marker."""
    squeezing, systems = read("study-squeezing"), read("study")
    squeezing["start"] = start(squeezing)
    pairs = [
        ("dpo-easy-0", "dpo-easy-1"),
        *zip(COOLED, SHARES, strict=True),
        *(("cooled", other) for other in (*CONTROLS, "sft")),
        ("cw-dpo", "sft-c+dpo"),
        ("cw-dpo", "sft"),
    ]
    to_cw_dpo = [(row, "cw-dpo") for row in (*SYSTEMS, *FAST) if row != "cw-dpo"]
    return {
        "squeezing": values_table(
            squeezing, ("start", *SHARES, *COOLED, *CONTROLS, *STAGES), DYNAMICS
        ),
        "verdicts": table(
            ["system", "verdicts over seeds", "mean w_c"],
            [
                [row, verdicts(squeezing, row), weight(squeezing, row)]
                for row in (*SHARES, *COOLED, *CONTROLS, *STAGES)
                if row in squeezing
            ],
        ),
        "squeezing-differences": differences_table(
            squeezing, pairs, [DYNAMICS[k] for k in (0, 3, 4, 5, 7)]
        ),
        # Their last measurement is of where they stopped, not of the weights that were kept.
        "stopping": values_table(squeezing, STOPPED, (STEPS, CIDER)),
        "pull": values_table(squeezing, (*SHARES, *COOLED), PULL),
        "influence": values_table(squeezing, (*SHARES, "cooled", "sft-c+dpo", "cw-dpo"), INFLUENCE),
        "systems": values_table(systems, (*SYSTEMS, *FAST), SCORES),
        "systems-differences": differences_table(systems, to_cw_dpo, SCORES),
        "starts": values_table(systems, ("sft-c-180", *AFTER), SCORES),
        "starts-differences": differences_table(
            systems, [(row, "after-cooled") for row in AFTER if row != "after-cooled"], SCORES
        ),
        "ablations": ablations(systems),
        "speed": speed(systems),
        "regret": regret(read("stopping")),
        **captions(),
        **architectures(),
        **llava_systems(systems),
        **widths(squeezing),
        **sensitivity(squeezing, systems),
    }


def captions() -> dict[str, str]:
    """What study.yaml does not score: Flickr30k, and the diversity of sampled captions."""
    cells = read("study-captions")
    pairs = [(row, "cw-dpo") for row in SYSTEMS if row != "cw-dpo"]
    return {
        "captions": values_table(cells, ("base", *SYSTEMS), CAPTIONS),
        "captions-differences": differences_table(cells, pairs, CAPTIONS),
    }


def architectures() -> dict[str, str]:
    """The tables of the second architecture, beside the first where both were measured."""
    qwen, llava = read("study-squeezing"), read("study-llava")
    llava["start"] = start(llava)
    rows = ("dpo-easy-0", "dpo", "cooled", "fixed-0.25", *STAGES)
    pairs = [
        *(("dpo-easy-0", "dpo"), ("cooled", "dpo"), ("cooled", "fixed-0.25"), ("cooled", "sft")),
        *(("cw-dpo", "sft-c+dpo"), ("cw-dpo", "sft")),
    ]
    both = {"Qwen2.5-VL": qwen, "LLaVA-1.5": llava}
    return {
        "llava": values_table(llava, ("start", *rows), DYNAMICS),
        "llava-verdicts": verdicts_table(both, rows),
        "llava-differences": side_by_side(both, pairs, [DYNAMICS[k] for k in (0, 4, 7)]),
        "llava-influence": values_table(llava, rows, INFLUENCE),
    }


def llava_systems(qwen: Cells) -> dict[str, str]:
    """The systems at rates of their own, and the ablations, on the second architecture."""
    llava = read("study-llava-systems")
    rows = ("sft", "sft-c", "dpo", "sft-c+dpo", "cw-dpo")
    pairs = [(row, "cw-dpo") for row in rows if row != "cw-dpo"]
    both = {"Qwen2.5-VL": qwen, "LLaVA-1.5": {**llava, **read("study-llava-ablations")}}
    return {
        "llava-tries": tries("study-llava-systems", "coco/CIDEr"),
        "llava-systems": values_table(llava, ("base", *rows), SCORES[:-1]),
        "llava-systems-differences": side_by_side(both, pairs, [SCORES[k] for k in (0, 1, 5)]),
        "llava-ablations": side_by_side(
            both, [(row, "cw-dpo") for row in ABLATIONS], [SCORES[k] for k in (0, 5)]
        ),
    }


def tries(name: str, metric: str) -> str:
    """All tries of a study on validation data, the chosen one bold."""
    record = read_json(FOLDER / f"{name}.json")
    key, chosen = record["chosen"]["key"], record["chosen"]["values"]
    found: dict[str, dict[float, float]] = {}
    for attempt in record["tries"]:
        value = float(attempt["settings"][key])
        found.setdefault(attempt["system"], {})[value] = attempt["scores"][metric]
    values = sorted({value for scores in found.values() for value in scores})
    lines = [
        [
            row,
            *(
                f"**{100 * scores[value]:.0f}**"
                if value == float(chosen[row])
                else f"{100 * scores[value]:.0f}"
                for value in values
            ),
        ]
        for row, scores in found.items()
    ]
    return table(["system", *(f"{value:g}" for value in values)], lines)


def widths(bundled: Cells) -> dict[str, str]:
    """The main rows of study-squeezing.yaml on three widths of the model."""
    grown = read("study-width")
    rows = ("dpo", "cooled", "fixed-0.25", "cw-dpo", "sft")
    studies = {
        f"width {size}": bundled
        if size == 128
        else {row: grown[f"{row}-{size}"] for row in ("base", *rows)}
        for size in (64, 128, 192)
    }
    every: Cells = {}
    for row in ("start", *rows):
        for name, cells in studies.items():
            every[f"{row}, {name}"] = start(cells) if row == "start" else cells[row]
    pairs = [
        *(("cooled", "dpo"), ("cw-dpo", "dpo"), ("cooled", "fixed-0.25")),
        *(("cooled", "sft"), ("cw-dpo", "sft")),
    ]
    return {
        "widths": values_table(every, list(every), [DYNAMICS[k] for k in (0, 1, 3, 4, 5, 7)]),
        "widths-verdicts": verdicts_table(studies, rows),
        "widths-differences": side_by_side(studies, pairs, [DYNAMICS[k] for k in (0, 4, 7)]),
    }


def start(cells: Cells) -> dict[int, dict[str, Any]]:
    """The base as a row: every training's first measurement, and the base's own scores."""
    curves = next(iter(cells["dpo"].values()))["curves"]
    first = {column: values[:1] for column, values in curves.items()}
    return {0: {"curves": first, "scores": next(iter(cells["base"].values()))["scores"]}}


def front() -> dict[str, str]:
    """README's table: every system at its own rate, and what a rate ten times as high does."""
    columns = [SCORES[0], CAPTIONS[0], *(SCORES[k] for k in (1, 2, 3, 5, 6))]
    # The same trainings, scored on another benchmark.
    systems, flickr = read("study"), read("study-captions")
    for row in SYSTEMS:
        for seed, cell in systems[row].items():
            cell["scores"] |= flickr[row][seed]["scores"]
    squeezing = read("study-squeezing")
    harsh = ("sft", "dpo", "sft-c+dpo", "cw-dpo", "fixed-0.25")
    return {
        "systems": marked_table(systems, SYSTEMS, columns, "cw-dpo", FAST),
        "high-rate": marked_table(squeezing, harsh, (DYNAMICS[0], DYNAMICS[4], CIDER), "cw-dpo"),
    }


def weight(cells: Cells, row: str) -> str:
    """Mean w_c over training, where there is one."""
    found = [
        mean("cooling_weight")(cell)
        for cell in cells[row].values()
        if any(x is not None for x in cell["curves"].get("cooling_weight", []))
    ]
    return said(found, 2) if found else "–"


def ablations(cells: Cells) -> str:
    """Each ablation less the full system, beside the paper's order."""
    rows = [row for row in ABLATIONS if row in cells]
    measure = score("coco/CIDEr")
    found = {row: paired(cells, row, "cw-dpo", measure) for row in rows}
    adjusted = dict(zip(rows, holm([p_value(found[row]) for row in rows]), strict=True))
    lines = []
    for row in sorted(rows, key=lambda row: float(np.mean(found[row]))):
        middle, width = interval(found[row])
        mark = " \\*" if adjusted[row] <= 0.05 else ""
        place = 1 + sum(PUBLISHED[other] < PUBLISHED[row] for other in PUBLISHED)
        lines.append(
            [row, f"{middle:+.1f} ± {width:.1f}{mark}", f"{PUBLISHED[row]:+.1f}", str(place)]
        )
    headings = ["ablation − cw-dpo", "COCO CIDEr here", "paper's (72B, COCO)", "place in the paper"]
    return table(headings, lines)


def sensitivity(squeezing: Cells, systems: Cells) -> dict[str, str]:
    """Shares of the stages, λ and C, and fewer pairs beside study.yaml; w_c beside `cooled`."""
    cells = {**systems, **read("study-sensitivity")}
    cooling = {**squeezing, **read("study-cooling"), "fixed-0.38": cells["fixed-0.38"]}
    grid = sorted(row for row in cooling if row.startswith("grid@"))
    weights = ("fixed-0.25", "fixed-0.38", "fixed-0.5", *grid)
    columns = [SCORES[k] for k in (0, 5, 7)]
    return {
        "settings": values_table(cells, ("cw-dpo", *SETTINGS), columns),
        "settings-differences": differences_table(
            cells, [(row, "cw-dpo") for row in SETTINGS], columns
        ),
        "penalty": values_table(cells, ("cw-dpo", *CONSTRAINTS), PENALTY),
        "weights": values_table(cooling, ("cooled", *weights), WEIGHTS),
        "weights-differences": differences_table(
            cooling, [(row, "cooled") for row in weights], WEIGHTS[1:]
        ),
        "sizes": values_table(
            cells,
            [f"{row}{size}" for size in NUMBERS for row in SIZED],
            columns,
        ),
        "sizes-differences": differences_table(
            cells,
            [
                *((f"cw-dpo{size}", f"sft{size}") for size in NUMBERS),
                *((f"{row}-94", row) for row in SIZED),
            ],
            columns,
        ),
    }


def regret(cells: Cells) -> str:
    """CIDEr that is lost against the best checkpoint of the same training, by rule."""
    lines = []
    for row, seeds in cells.items():
        entries = list(seeds.values())
        best = [max(entry["cider"]) for entry in entries]
        line = [row, str(len(entries)), said([100 * value for value in best], 0)]
        line.append(
            said([100 * (b - e["cider"][-1]) for b, e in zip(best, entries, strict=True)], 0)
        )
        for rule in ("squeezing", "delta_logp"):
            stops = [entry["rules"][rule] for entry in entries]
            lost = [
                100 * (b - entry["cider"][entry["steps"].index(kept)])
                for b, entry, (_, kept) in zip(best, entries, stops, strict=True)
            ]
            early = sum(
                stopped < e["steps"][-1] for e, (stopped, _) in zip(entries, stops, strict=True)
            )
            line += [f"{early}/{len(entries)}", said(lost, 0)]
        lines.append(line)
    return table(
        [
            *("system", "seeds", "CIDEr of the best checkpoint", "lost at the end"),
            *("squeezing stopped", "squeezing lost", "delta_logp stopped", "delta_logp lost"),
        ],
        lines,
    )


def speed(cells: Cells) -> str:
    """Steps, tokens, seconds until the held-out chosen answers are as likely as SFT-C + DPO's."""
    level = float(np.mean([end("chosen_mean_logp")(c) for c in cells["sft-c+dpo"].values()]))
    costs = {row: seeds[0]["stages"] for row, seeds in read("costs").items()}
    lines = []
    for row in (*SYSTEMS, *FAST):
        if row not in cells:
            continue
        reached = [steps_to(level)(cell) for cell in cells[row].values()]
        line = [row, f"{sum(np.isfinite(reached))}/{len(reached)}"]
        middle = float(np.median(reached))
        if np.isinf(middle):
            lines.append([*line, "never", "–", "–"])
            continue
        cost = costs[next(iter(cells[row].values()))["recipe"]]
        tokens, seconds = (
            float(np.median([spent(level, cost, unit)(cell) for cell in cells[row].values()]))
            for unit in ("tokens", "seconds")
        )
        lines.append([*line, f"{middle:.0f}", f"{tokens / 1000:.0f}", f"{seconds:.1f}"])
    return table(
        [
            *("system", f"seeds that reach ℓ̄ = {level:.3f}", "steps (median)"),
            *("thousand tokens", "seconds of one core"),
        ],
        lines,
    )


# --- the page ------------------------------------------------------------------------------------


def fill(page: str, made: dict[str, str]) -> str:
    """The page with every marked table in its place; unknown and missing marks are errors."""
    marks = re.findall(r"<!-- table: ([\w-]+) -->", page)
    assert sorted(marks) == sorted(made), set(marks) ^ set(made)
    for name, text in made.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.DOTALL)
    return page


def draw(file: Path) -> None:
    """Held-out curves, means over seeds."""
    cells = read("study-squeezing")
    rows = [
        row for row in (*SHARES, "cooled-easy-0", "cooled", "fixed-0.25", "sft") if row in cells
    ]
    with mpl.rc_context({"svg.hashsalt": "results", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, column, heading in zip(
            axes,
            ("chosen_mean_logp", "top1_probability", "token_ece"),
            ("chosen answers, nats a token", "top-1 probability", "token ECE"),
            strict=True,
        ):
            for number, row in enumerate(rows):
                entries = list(cells[row].values())
                curve = np.mean([entry["curves"][column] for entry in entries], axis=0)
                axis.plot(entries[0]["curves"]["total_step"], curve, color=f"C{number}", label=row)
            axis.set_title(heading)
            axis.set_xlabel("update steps")
        axes[0].legend(fontsize=8)
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Remake everything, after taking in new records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--take", type=Path, action="append", default=[], metavar="STUDY.JSON")
    for file in parser.parse_args().take:
        take(file)
    for page, made in ((PAGE, tables()), (README, front())):
        write_text(page, fill(page.read_text(encoding="utf-8"), made))
    draw(FOLDER / "squeezing.svg")


if __name__ == "__main__":
    main()
