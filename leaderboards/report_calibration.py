"""Reliability before and after temperature, and risk-coverage, from the samples of runs.

The figures are those of the metrics `ece`, `ece_scaled`, `token_ece` and `aurc`: the same
confidences, the same bins, the same held-out temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cwdpo_bench.calibration import (
    apply_temperature,
    ece,
    reliability,
    risk_coverage,
)
from cwdpo_bench.calibration.binned import ReliabilityBins
from cwdpo_bench.calibration.selective import RiskCoverage
from cwdpo_bench.calibration.temperature import pad_options


@dataclass(frozen=True)
class Diagram:
    """One reliability diagram.

    Attributes:
        title: what was done to the probabilities.
        bins: of all answers or tokens.
        error: ECE of them.
        unit: "answers" or "tokens".
    """

    title: str
    bins: ReliabilityBins
    error: float
    unit: str


@dataclass(frozen=True)
class Calibration:
    """What a system's probabilities are worth on one task.

    Attributes:
        diagrams: before and, where the run holds temperatures, after; none without probabilities.
        risk: the risk-coverage curve of choices; None for captions and without probabilities.
        temperature: mean of the held-out temperatures; None without any.
    """

    diagrams: tuple[Diagram, ...] = ()
    risk: RiskCoverage | None = None
    temperature: float | None = None


def calibration_of(runs: Sequence[pd.DataFrame]) -> Calibration:
    """The calibration of a system on one task.

    Args:
        runs: the samples of its runs, one a seed; several are pooled.
    """
    if all("option_log_probabilities" in samples for samples in runs):
        return _of_choices(pd.concat(list(runs), ignore_index=True))
    if all("token_confidences" in samples for samples in runs):
        return _of_tokens(pd.concat(list(runs), ignore_index=True))
    return Calibration()


def option_probabilities(
    samples: pd.DataFrame, *, scaled: bool = False
) -> list[list[float] | None]:
    """Of each row the probabilities of its options, renormalised over them; None where unknown.

    Args:
        samples: with `option_log_probabilities`, and `temperature` where `scaled`.
        scaled: after the row's held-out temperature.
    """
    rows = samples["option_log_probabilities"].notna().to_numpy()
    found: list[list[float] | None] = [None] * len(samples)
    lists = list(samples["option_log_probabilities"][rows])
    if not lists:
        return found
    temperature = samples["temperature"][rows].to_numpy(dtype=np.float64) if scaled else 1.0
    probabilities = apply_temperature(pad_options(lists), temperature)
    for place, row, values in zip(np.flatnonzero(rows), probabilities, lists, strict=True):
        found[int(place)] = row[: len(values)].tolist()
    return found


def _of_choices(samples: pd.DataFrame) -> Calibration:
    known = samples[samples["option_log_probabilities"].notna()]
    if known.empty:
        return Calibration()
    right = known["option_correct"].to_numpy(dtype=bool)
    before = _confidences(known, scaled=False)
    diagrams = [_diagram("as the model gives them", before, right, known["cluster"], "answers")]
    temperature = None
    if "temperature" in known and known["temperature"].notna().all():
        temperature = float(known["temperature"].astype(float).mean())
        title = f"after temperature {temperature:.2f}"
        after = _confidences(known, scaled=True)
        diagrams.append(_diagram(title, after, right, known["cluster"], "answers"))
    return Calibration(tuple(diagrams), risk_coverage(before, right), temperature)


def _of_tokens(samples: pd.DataFrame) -> Calibration:
    known = samples[samples["token_confidences"].notna()]
    lengths = [len(tokens) for tokens in known["token_confidences"]]
    if not sum(lengths):
        return Calibration()
    confidence = np.concatenate([np.asarray(x, np.float64) for x in known["token_confidences"]])
    right = np.concatenate([np.asarray(x, dtype=bool) for x in known["token_correct"]])
    clusters = np.repeat(known["cluster"].to_numpy(), lengths)
    title = "reference tokens"
    return Calibration((_diagram(title, confidence, right, clusters, "tokens"),))


def _confidences(samples: pd.DataFrame, *, scaled: bool) -> np.ndarray:
    rows = option_probabilities(samples, scaled=scaled)
    return np.clip([max(row) for row in rows if row is not None], 0.0, 1.0)


def _diagram(
    title: str, confidence: np.ndarray, right: np.ndarray, clusters: object, unit: str
) -> Diagram:
    bins = reliability(confidence, right, clusters=np.asarray(clusters))
    return Diagram(title, bins, ece(confidence, right), unit)
