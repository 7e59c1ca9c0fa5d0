"""The run folder: `results.json` with corpus values and intervals, `samples/TASK.parquet` beneath.

Everything in `results.json` follows from the samples by `evaluate/metrics.py`; so a reader can
compare two runs sample by sample without the model and without scoring again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cwdpo_bench.calibration import (
    bootstrap_stderr,
    bootstrap_sums,
    cluster_sums,
    percentile_interval,
)
from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.metrics import METRICS, metric_names_for
from cwdpo_bench.files import read_json, write_json, write_with

SCHEMA = 1
RESULTS = "results.json"
SAMPLES = "samples"
_METRIC_KEYS = ("value", "stderr", "ci95", "higher_is_better")


@dataclass(frozen=True)
class TaskResult:
    """What one task leaves in a run folder.

    Attributes:
        samples: one row a sample, in the columns that `evaluate/metrics.py` names.
        signature: all that changes the task's scores; `signature_of` writes it.
        warnings: what a reader of the scores must know.
        failures: sample id → why it has no row; `results.json` lists them where there are any.
    """

    samples: pd.DataFrame
    signature: str
    warnings: Sequence[str] = field(default=())
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A run folder that `read_run` found whole.

    Attributes:
        path: the folder.
        results: the content of `results.json`.
    """

    path: Path
    results: dict[str, Any]

    def samples(self, task: str) -> pd.DataFrame:
        """The samples of a task, one row a sample.

        Raises:
            UserError: the run has no such task, or its file is broken.
        """
        if task not in self.results["tasks"]:
            raise UserError(
                f"{self.path}: no task {task!r}; {nearest(task, self.results['tasks'])}"
            )
        path = _samples_path(self.path, task)
        table = _read_parquet(path)
        _refuse_nan(table, path)
        samples: pd.DataFrame = table.to_pandas()
        return samples


def signature_of(parts: Mapping[str, object]) -> str:
    """`key:value|key:value|…`, as sacrebleu writes it; bars and breaks in values are escaped."""
    escapes = str.maketrans({"\\": "\\\\", "|": "\\|", "\n": "\\n"})
    return "|".join(f"{key}:{str(value).translate(escapes)}" for key, value in parts.items())


def summarize(samples: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """`n`, `metrics` and `groups` of a task, as they stand in `results.json`.

    The interval is the 95 % percentile interval of 1,000 resamples of the clusters, the standard
    error the standard deviation over them. Within a group only its own clusters are drawn. CIDEr's
    document frequencies are those of the whole task in the groups too, as NoCaps reports it.
    """
    names = {name: None for groups in samples["groups"] for name in groups}
    member = {name: [name in groups for groups in samples["groups"]] for name in names}
    groups = {name: _summary(samples[member[name]], seed) for name in names}
    return {**_summary(samples, seed), "groups": groups}


def _summary(samples: pd.DataFrame, seed: int) -> dict[str, Any]:
    metrics = [METRICS[name] for name in metric_names_for(samples)]
    statistics = [metric.statistics(samples) for metric in metrics]
    sums, _ = cluster_sums(np.concatenate(statistics, axis=1), samples["cluster"])
    ends = np.cumsum([block.shape[1] for block in statistics])[:-1]
    totals = np.split(sums.sum(axis=0), ends)
    resampled = np.split(bootstrap_sums(sums, seed=seed), ends, axis=1)
    values = [np.asarray(m.value(r)) for m, r in zip(metrics, resampled, strict=True)]
    whole = [float(m.value(t)) for m, t in zip(metrics, totals, strict=True)]
    return {
        "n": sample_count(samples),
        "metrics": {
            metric.name: {
                "value": value,
                "stderr": bootstrap_stderr(drawn),
                "ci95": list(percentile_interval(drawn)),
                "higher_is_better": metric.higher_is_better,
            }
            for metric, value, drawn in zip(metrics, whole, values, strict=True)
            # Undefined on these samples, as AUROC is where every answer is right.
            if np.isfinite(value)
        },
    }


def sample_count(samples: pd.DataFrame) -> int:
    """The number of samples; the circular orders of one question are one."""
    return int((samples["shift"] == 0).sum()) if "shift" in samples else len(samples)


def refuse_other_run(
    path: Path, model: Mapping[str, Any], signature: str, tasks: Mapping[str, str]
) -> None:
    """Refuse a folder that holds another run, so that no run is overwritten by mistake.

    Args:
        path: the output folder.
        model: the model's entry of `results.json`.
        signature: the run's.
        tasks: the signature of every task to be written.

    Raises:
        UserError: its model, its signature or that of a task in common differs.
    """
    if (path / RESULTS).exists():
        refuse_difference(path / RESULTS, read_run(path).results, model, signature, tasks)


def refuse_difference(
    where: Path,
    there: Mapping[str, Any],
    model: Mapping[str, Any],
    signature: str,
    tasks: Mapping[str, str],
) -> None:
    """Refuse what another run left.

    Args:
        where: the file that holds it.
        there: its `model`, `signature` and `tasks`, as in `results.json`.
        model, signature, tasks: the own, as above.

    Raises:
        UserError: they differ; names how.
    """
    differences = []
    if there["model"] != model:
        differences.append(f"model {there['model']['name']!r}, not {model['name']!r}")
    if there["signature"] != signature:
        differences.append(f"signature {there['signature']!r}, not {signature!r}")
    for name, own in tasks.items():
        if name in there["tasks"] and there["tasks"][name]["signature"] != own:
            differences.append(f"{name} as {there['tasks'][name]['signature']!r}, not {own!r}")
    if differences:
        raise UserError(
            f"{where}: holds another run ({'; '.join(differences)}); choose another output folder"
        )


def write_run(
    path: Path,
    model: dict[str, Any],
    tasks: Mapping[str, TaskResult],
    provenance: dict[str, Any],
    signature: str,
) -> dict[str, Any]:
    """Write a run folder, samples first and `results.json` last; return the latter's content.

    A folder of the same run is continued: tasks of it that are not written now stay.

    Args:
        path: the folder; made where it is missing.
        model: `name` and whatever else tells this model from another.
        tasks: what to write, by task name.
        provenance: versions, seeds, times.
        signature: what all tasks share.

    Raises:
        UserError: the folder holds another run, a number is NaN or infinite, ids are doubled, a
            task has no samples, or the disk refuses.
    """
    refuse_other_run(path, model, signature, {name: t.signature for name, t in tasks.items()})
    kept = read_run(path).results["tasks"] if (path / RESULTS).exists() else {}
    written = {name: _write_task(path, name, task) for name, task in tasks.items()}
    results = {
        "schema": SCHEMA,
        "signature": signature,
        "model": model,
        "tasks": {**kept, **written},
        "provenance": provenance,
    }
    write_json(path / RESULTS, results)
    return results


def _write_task(path: Path, name: str, task: TaskResult) -> dict[str, Any]:
    target = _samples_path(path, name)
    if len(task.samples) == 0:
        raise UserError(f"{target}: task {name!r} has no samples; nothing to write")
    for column in task.samples.select_dtypes("float"):
        # pyarrow would write it as a null, and the row would silently not count.
        if task.samples[column].isna().any():
            raise UserError(f"{target}: not written, column {column!r} holds a NaN")
    table = pa.Table.from_pandas(task.samples, preserve_index=False)
    _refuse_nan(table, target)
    _refuse_doubled_ids(table, target)
    summary = summarize(task.samples)
    write_with(target, lambda temporary: pq.write_table(table, temporary, compression="zstd"))
    failures = {"failures": dict(task.failures)} if task.failures else {}
    return {"signature": task.signature, **summary, "warnings": list(task.warnings), **failures}


def read_run(path: Path) -> RunFolder:
    """Read a run folder and check that it is whole.

    Raises:
        UserError: missing or broken file, other schema, a NaN, a missing key, doubled ids, or
            samples that are not those of the results.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    where = path / RESULTS
    results = read_json(where)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise UserError(f"{where}: 'schema' must be {SCHEMA}; the file is not of this version")
    _need(results, "signature", str, where, "")
    _need(results, "provenance", dict, where, "")
    _need(_need(results, "model", dict, where, ""), "name", str, where, "model.")
    tasks = _need(results, "tasks", dict, where, "")
    for name in tasks:
        task = _need(tasks, name, dict, where, "tasks.")
        _check_task(task, where, f"tasks.{name}.")
        _check_samples(_samples_path(path, name), task["n"])
    return RunFolder(path, results)


def _need(parent: dict[str, Any], key: str, kind: type, where: Path, prefix: str) -> Any:
    value = parent.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {prefix}{key} must be {_WORDS[kind]}, not {value!r}")
    return value


_WORDS = {str: "text", dict: "an object", int: "a whole number", list: "a list"}


def _check_task(task: dict[str, Any], where: Path, prefix: str) -> None:
    _need(task, "signature", str, where, prefix)
    _need(task, "warnings", list, where, prefix)
    _check_summary(task, where, prefix)
    groups = _need(task, "groups", dict, where, prefix)
    for name in groups:
        group = _need(groups, name, dict, where, f"{prefix}groups.")
        _check_summary(group, where, f"{prefix}groups.{name}.")


def _check_summary(summary: dict[str, Any], where: Path, prefix: str) -> None:
    _need(summary, "n", int, where, prefix)
    metrics = _need(summary, "metrics", dict, where, prefix)
    for name in metrics:
        metric = _need(metrics, name, dict, where, f"{prefix}metrics.")
        place = f"{where}: {prefix}metrics.{name}"
        missing = [key for key in _METRIC_KEYS if key not in metric]
        if missing:
            raise UserError(f"{place}: no {', '.join(missing)}")
        interval = metric["ci95"] if isinstance(metric["ci95"], list) else [None]
        if len(interval) != 2 or not all(map(_is_finite, interval)):
            raise UserError(f"{place}.ci95 must be two finite numbers, not {metric['ci95']!r}")
        for key in ("value", "stderr"):
            if not _is_finite(metric[key]):
                raise UserError(f"{place}.{key} must be a finite number, not {metric[key]!r}")
        if metric["higher_is_better"] not in (True, False, None):
            raise UserError(f"{place}.higher_is_better must be true, false or null")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_samples(path: Path, count: int) -> None:
    table = _read_parquet(path, ["id", "cluster", "groups", "shift"])
    missing = [name for name in ("id", "cluster", "groups") if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}")
    _refuse_doubled_ids(table, path)
    found = sample_count(table.to_pandas())
    if found != count:
        raise UserError(f"{path}: {found} samples, {RESULTS} says {count}; score the run again")


def _refuse_doubled_ids(table: pa.Table, path: Path) -> None:
    ids = table["id"].to_pandas()
    if ids.duplicated().any():
        raise UserError(f"{path}: id {ids[ids.duplicated()].iloc[0]!r} is doubled")


def _samples_path(path: Path, task: str) -> Path:
    # A colon is no part of a file's name on every system.
    return path / SAMPLES / f"{task.replace(':', '-')}.parquet"


def _read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the run is not whole, score it again")
    try:
        with pq.ParquetFile(path) as file:
            known = file.schema_arrow.names
            return file.read(None if columns is None else [c for c in columns if c in known])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); score again") from error


def _refuse_nan(table: pa.Table, path: Path) -> None:
    """Numbers must be finite; one that does not exist is null."""
    for name in table.column_names:
        values, in_list = table[name], pa.types.is_list(table[name].type)
        if in_list:
            values = pc.list_flatten(values)
        if not pa.types.is_floating(values.type):
            continue
        # pandas writes a NaN within a list as a null there.
        if pc.any(pc.invert(pc.is_finite(values))).as_py() or (in_list and values.null_count):
            raise UserError(f"{path}: column {name!r} holds a NaN or an infinity")
