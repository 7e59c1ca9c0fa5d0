"""Preference files in, preference files out: rejected answers made, filtered, mixed.

Every row keeps its own fields; what is written is JSON lines that `read_pairs` reads, and a row
whose rejected answer was made says how under `negative`. Nothing is dropped without being counted.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import write_text
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.layouts import AUTO
from cwdpo_bench.train.negatives import Kept, filter_pairs, judge_sampled, sample_answers
from cwdpo_bench.train.preferences.perturb import edit_size, perturb
from cwdpo_bench.train.rewards import RewardFunction, build_reward
from cwdpo_bench.train.sections import CiderDTerm, Filter, Sampling
from cwdpo_bench.train.trainer import reference_scores
from cwdpo_bench.vlm import VLM

Row = dict[str, Any]


def perturb_file(
    data: Path, output: Path, shares: Mapping[str, float], *, seed: int = 0, layout: str = AUTO
) -> dict[str, Any]:
    """Give every row a rejected answer that is the chosen one with one change.

    Args:
        data: rows with `chosen`; a rejected answer that stands there is replaced.
        output: the file to write.
        shares: kind → share, see `perturb.perturb`.
        seed: of everything drawn.
        layout: of the rows, see `read_pairs`.

    Returns:
        `rows`, `written`, `dropped` by reason, `layouts` that rows were taken for, `kinds` written,
        `edit_size`: words touched → rows.

    Raises:
        UserError: bad data, unknown kinds, no row can be changed, or the images would lie outside
            the output's folder.
    """
    check_output(output)
    found = read_pairs(data, need_rejected=False, with_images=False, keep_rows=True, layout=layout)
    pairs, rows = found.pairs, found.rows
    changes, dropped = perturb([pair.chosen for pair in pairs], shares, seed=seed)
    written, sizes, kinds = [], Counter[int](), Counter[str]()
    for pair, row, change in zip(pairs, rows, changes, strict=True):
        if change is None:
            continue
        negative = {"source": "perturb", "kind": change.kind, "edit": change.edit}
        written.append(with_rejected(row, pair.id, change.text, negative))
        sizes[edit_size(pair.chosen, change.text)] += 1
        kinds[change.kind] += 1
    write_rows(written, data, output)
    return {
        "rows": len(pairs),
        "written": len(written),
        "dropped": dropped,
        "layouts": found.layouts,
        "kinds": dict(kinds.most_common()),
        "edit_size": {str(size): sizes[size] for size in sorted(sizes)},
    }


def sample_file(
    data: Path,
    output: Path,
    vlm: VLM,
    sampling: Sampling,
    *,
    seed: int = 0,
    image_root: Path | None = None,
    layout: str = AUTO,
) -> dict[str, Any]:
    """Give every row a rejected answer drawn from a policy, where it is worse than the chosen one.

    Worse is what CIDEr-D against the row's references says, as in training.

    Returns:
        `rows`, `written`, `dropped` by reason, `layouts`.

    Raises:
        UserError: as `perturb_file`.
    """
    check_output(output)
    found = read_pairs(
        data, need_rejected=False, keep_rows=True, image_root=image_root, layout=layout
    )
    pairs, rows = found.pairs, found.rows
    reward: RewardFunction = build_reward([CiderDTerm(kind="cider-d")], pairs)
    answers = sample_answers(vlm, pairs, sampling, seed=seed)
    reasons = judge_sampled(pairs, answers, reward)
    negative = {"source": "sample", "model": vlm.name, "temperature": sampling.temperature}
    written = [
        with_rejected(row, pair.id, answer.text, negative)
        for pair, row, answer, reason in zip(pairs, rows, answers, reasons, strict=True)
        if reason is None
    ]
    write_rows(written, data, output, moved=image_root is None)
    dropped = Counter(reason for reason in reasons if reason is not None)
    return {
        "rows": len(pairs),
        "written": len(written),
        "dropped": dict(dropped),
        "layouts": found.layouts,
    }


def filter_file(
    data: Path,
    output: Path,
    vlm: VLM,
    rule: Filter,
    *,
    with_images: bool = True,
    batch_size: int = 16,
    image_root: Path | None = None,
    layout: str = AUTO,
) -> dict[str, Any]:
    """Leave out the rows whose rejected answer is extremely easy for a model (SPEC 1).

    Args:
        data: rows with chosen and rejected answers.
        output: the file to write.
        vlm: the model, as a rule that from which training would start.
        rule: which are too easy.
        with_images: without, the texts alone are scored.
        batch_size: pairs a forward.
        image_root: what image paths are relative to; they are written as they are.
        layout: of the rows, see `read_pairs`.

    Returns:
        `rows`, `written`, `dropped` by reason, `layouts`, `easy_below`: ℓ̄_ref under which rows
        went.

    Raises:
        UserError: bad data, or no row is left.
    """
    check_output(output)
    found = read_pairs(
        data, with_images=with_images, keep_rows=True, image_root=image_root, layout=layout
    )
    pairs, rows = found.pairs, found.rows
    confidence = reference_scores(vlm, pairs, batch_size, ("rejected",))["rejected"].mean_logp
    kept: Kept = filter_pairs(pairs, confidence, rule)
    write_rows([rows[place] for place in kept.places], data, output, moved=image_root is None)
    return {
        "rows": len(pairs),
        "written": len(kept.places),
        "dropped": kept.dropped,
        "layouts": found.layouts,
        "easy_below": kept.easy_below,
    }


def mix_files(
    parts: Sequence[tuple[Path, float]], output: Path, *, seed: int = 0
) -> dict[str, Any]:
    """Take each row's rejected answer from one of several files, in stated shares.

    Rows go together by `id` and `chosen`. The shares are those of the rows that all files hold; a
    row that some files lack takes its answer from the others in their shares.

    Args:
        parts: file and share; the rows of the first are written, and their images.
        output: the file to write.
        seed: of the draw.

    Returns:
        `rows`, `written`, `from`: file → rows.

    Raises:
        UserError: bad data, shares that are not above 0, or a file that shares no row with the
            first.
    """
    if not all(0 < share < float("inf") for _, share in parts):
        raise UserError("mix: every file needs a share above 0, as in negatives.jsonl=0.3")
    check_output(output)
    files = [read_pairs(path, with_images=False, keep_rows=True) for path, _ in parts]
    answers = [{(pair.id, pair.chosen): pair.rejected for pair in file.pairs} for file in files]
    for (path, _), found in zip(parts, answers, strict=True):
        if not found.keys() & answers[0].keys():
            raise UserError(f"{path}: no row with id and chosen of a row in {parts[0][0]}")
    taken = Counter[str]()
    written = []
    for pair, row in zip(files[0].pairs, files[0].rows, strict=True):
        key = (pair.id, pair.chosen)
        there = [place for place, found in enumerate(answers) if key in found]
        rng = random.Random(f"{seed} {pair.id}")
        place = rng.choices(there, [parts[i][1] for i in there])[0]
        source = parts[place][0]
        taken[str(source)] += 1
        rejected = answers[place][key]
        assert rejected is not None
        mixed = {"source": "mix", "file": source.name}
        negative = row.get("negative", mixed) if place == 0 else mixed
        written.append(with_rejected(row, pair.id, rejected, negative))
    write_rows(written, parts[0][0], output)
    return {"rows": len(files[0].pairs), "written": len(written), "from": dict(taken)}


def with_rejected(row: Row, identity: str, rejected: str, negative: Mapping[str, Any]) -> Row:
    """The row with another rejected answer, and how it was made under `negative`."""
    # What belonged to the old rejected answer goes with it.
    kept = {k: v for k, v in row.items() if k not in ("rejected_images", "corrected")}
    return {**kept, "id": identity, "rejected": rejected, "negative": dict(negative)}


def check_output(output: Path) -> None:
    """Refuse a name that is not of JSON lines.

    Raises:
        UserError: it is not.
    """
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: preference files are written as JSON lines; name it .jsonl")


def write_rows(rows: Sequence[Row], data: Path, output: Path, *, moved: bool = True) -> None:
    """Write rows of a file as JSON lines, their image paths relative to the output if `moved`.

    Raises:
        UserError: no rows, another ending, or images outside the output's folder.
    """
    if not rows:
        raise UserError(f"{data}: no row is left to write")
    check_output(output)
    folder = data if data.is_dir() else data.parent
    lines = [
        json.dumps(
            _without_nan(_moved(row, folder, output) if moved else row),
            ensure_ascii=False,
            allow_nan=False,
            default=_plain,
        )
        for row in rows
    ]
    write_text(output, "\n".join(lines) + "\n")


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        raise UserError("a field holds bytes, which JSON cannot")
    return str(value)


def _without_nan(value: Any) -> Any:
    """Tables have no other word for a number that is missing."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list) else value


def _moved(row: Row, folder: Path, output: Path) -> Row:
    """The row with its image paths relative to the output's folder."""

    def moved(image: object) -> object:
        if not isinstance(image, str) or image.startswith("data:"):
            return image
        path = os.path.relpath(folder / image, output.parent)
        if path.startswith(os.pardir):
            raise UserError(
                f"{output}: the image {image} of {folder} would lie outside its folder; write it "
                f"into {folder}"
            )
        return path

    fields = {name: row[name] for name in ("images", "image") if row.get(name) is not None}
    return row | {
        name: [moved(image) for image in value] if isinstance(value, list) else moved(value)
        for name, value in fields.items()
    }
