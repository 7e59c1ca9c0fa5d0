"""A baseline in one small file that can be committed: statistics per sample, no text, no image.

A zip of arrays (NumPy's .npz) with a JSON header. Truth is kept as fingerprints, so that a
candidate that was given other references is still found out. Columns of zeros are left out and
whole numbers are kept in as few bytes as hold them: COCO's 5,000 images take less than 1 MB.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.evaluate.results import RunFolder
from cwdpo_bench.files import write_with
from cwdpo_bench.leaderboards.statistics import Floats, TaskStatistics, read_statistics

KIND = "cwdpo-bench baseline"
SCHEMA = 1

Arrays = dict[str, np.ndarray]


def write_baseline(run: RunFolder, path: Path) -> None:
    """Write the statistics of all tasks of a run; the same run gives the same bytes.

    Raises:
        UserError: the samples are broken, or the file cannot be written.
    """
    arrays: Arrays = {}
    tasks = {}
    for name, result in run.results["tasks"].items():
        statistics = read_statistics(run, name)
        tasks[name] = {"signature": result["signature"], **_pack(name, statistics, arrays)}
    header = {
        "kind": KIND,
        "schema": SCHEMA,
        "model": run.results["model"]["name"],
        "signature": run.results["signature"],
        "tasks": tasks,
    }
    arrays["header"] = _text(header)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]

    write_with(path, save)


def read_baseline(path: Path) -> tuple[dict[str, Any], dict[str, TaskStatistics]]:
    """The header, and the statistics by task.

    Raises:
        UserError: the file is missing, cut off or of another kind, or holds a NaN.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays["header"].tobytes())
        if (header["kind"], header["schema"]) != (KIND, SCHEMA):
            raise UserError(f"{path}: schema {header['schema']!r} is not of this version")
        return header, {name: _unpack(name, t, arrays) for name, t in header["tasks"].items()}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such baseline file") from error
    except (OSError, KeyError, IndexError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: no whole baseline file ({error}); write it again with gate --write-baseline"
        ) from error


def _pack(task: str, statistics: TaskStatistics, arrays: Arrays) -> dict[str, Any]:
    """Put a task's arrays beside the others; return its part of the header."""
    parts = {}
    blocks = {id(block): block for block in statistics.blocks.values()}
    places = {key: place for place, key in enumerate(blocks)}
    for key, block in blocks.items():
        parts[places[key]] = _pack_block(f"{task}/{places[key]}", block, arrays)
    arrays[f"{task}/ids"] = _text(statistics.ids.tolist())
    if not np.array_equal(statistics.ids, statistics.clusters):
        arrays[f"{task}/clusters"] = _text(statistics.clusters.tolist())
    arrays[f"{task}/groups"] = _text([list(groups) for groups in statistics.groups])
    arrays[f"{task}/asked"] = statistics.asked
    for column, prints in statistics.truth.items():
        arrays[f"{task}/truth/{column}"] = prints
    return {
        "metrics": {name: places[id(block)] for name, block in statistics.blocks.items()},
        "widths": [parts[place] for place in sorted(parts)],
        "truth": list(statistics.truth),
    }


def _pack_block(name: str, block: Floats, arrays: Arrays) -> int:
    used = np.flatnonzero(block.any(axis=0))
    whole = (block == np.rint(block)).all(axis=0)
    integers, fractions = used[whole[used]], used[~whole[used]]
    # Column by column: neighbours are alike there, which is what compression lives on.
    least = np.min_scalar_type(int(np.abs(block[:, integers]).max(initial=0)) * -1)
    arrays[f"{name}/integers"] = np.ascontiguousarray(block[:, integers].T.astype(least))
    arrays[f"{name}/fractions"] = np.ascontiguousarray(block[:, fractions].T)
    arrays[f"{name}/integers_at"], arrays[f"{name}/fractions_at"] = integers, fractions
    return int(block.shape[1])


def _unpack(task: str, header: dict[str, Any], arrays: Arrays) -> TaskStatistics:
    ids = np.array(json.loads(arrays[f"{task}/ids"].tobytes()), dtype=str)
    clusters = f"{task}/clusters"
    blocks = [
        _unpack_block(f"{task}/{place}", (len(ids), width), arrays)
        for place, width in enumerate(header["widths"])
    ]
    return TaskStatistics(
        ids=ids,
        clusters=(
            np.array(json.loads(arrays[clusters].tobytes()), dtype=str)
            if clusters in arrays
            else ids
        ),
        groups=tuple(tuple(groups) for groups in json.loads(arrays[f"{task}/groups"].tobytes())),
        asked=arrays[f"{task}/asked"],
        truth={column: arrays[f"{task}/truth/{column}"] for column in header["truth"]},
        # A metric that this version does not know cannot be judged by it.
        blocks={
            name: blocks[place] for name, place in header["metrics"].items() if name in METRICS
        },
    )


def _unpack_block(name: str, shape: tuple[int, int], arrays: Arrays) -> Floats:
    block = np.zeros(shape)
    for kind in ("integers", "fractions"):
        block[:, arrays[f"{name}/{kind}_at"]] = arrays[f"{name}/{kind}"].T
    if not np.isfinite(block).all():
        raise ValueError("a number is NaN or infinite")
    return block


def _text(value: Any) -> np.ndarray:
    """JSON as bytes: an array of text would need four bytes a letter."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
