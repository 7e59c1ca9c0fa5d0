"""What runs say of their settings: what makes them another task, and what is only told.

A signature is `key:value|key:value|…`, as `evaluate.results.signature_of` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import RunFolder

FEW_SAMPLES = 30
"""Below it, a percentile interval is narrower than it says."""

MUST_AGREE = ("task", "split", "prompt", "scorer", "parse_failures")
"""Parts of a task's signature that make it another task; parts beyond these are told in a note."""

NOT_STATED = "not stated"


def signature_parts(signature: str) -> dict[str, str]:
    """The `key:value` parts of a signature, as `evaluate.results.signature_of` joins them."""
    parts = re.findall(r"(?:\\.|[^|\\])+", signature, re.DOTALL)
    return {key: value for key, _, value in (part.partition(":") for part in parts)}


def _differing(one: str, other: str) -> dict[str, tuple[str, str]]:
    first, second = signature_parts(one), signature_parts(other)
    return {
        key: (first.get(key, NOT_STATED), second.get(key, NOT_STATED))
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    }


def check_signature(task: str, run: RunFolder, anchor: RunFolder) -> None:
    """Refuse a run that did another task than `anchor` under the same name.

    Raises:
        UserError: a part of the signature in `MUST_AGREE` is stated by both and differs; it is
            named with both values.
    """
    own, other = (r.results["tasks"][task]["signature"] for r in (run, anchor))
    if told := grave_difference(own, other):
        raise UserError(
            f"{task}: {run.path} and {anchor.path} did not do the same task ({told}); "
            "run both with the same settings, or say --on-signature warn"
        )


def signature_note(task: str, run: RunFolder, anchor: RunFolder) -> str:
    """What `check_signature` would refuse, as a note; empty where it would not."""
    own, other = (r.results["tasks"][task]["signature"] for r in (run, anchor))
    told = grave_difference(own, other)
    return told and (
        f"{task}: {run.path} and {anchor.path} did not do the same task ({told}); "
        "compared nevertheless, as asked"
    )


def grave_difference(own: str, other: str) -> str:
    """The parts of `MUST_AGREE` that differ between two signatures of a task, told; or nothing.

    Finished predictions (`score`) state neither split nor prompt: that is told in the notes, not
    here; the samples themselves are compared in any case.
    """
    return "; ".join(
        f"{key}: {a!r} against {b!r}"
        for key, (a, b) in _differing(own, other).items()
        if key in MUST_AGREE and NOT_STATED not in (a, b)
    )


def notes_on(runs: Mapping[str, RunFolder], base: str, tasks: Iterable[str]) -> list[str]:
    """What a reader of the comparison must know: missing tasks, other settings, warnings."""
    notes = []
    for task in tasks:
        without = [name for name, run in runs.items() if task not in run.results["tasks"]]
        if without:
            notes.append(f"{task}: not run by {', '.join(without)}")
        if base in without:
            notes.append(f"{task}: no differences, the baseline lacks it")
    for name, run in runs.items():
        notes += _setting_notes(name, run, base, runs[base])
    return notes + _warning_notes(runs)


def _warning_notes(runs: Mapping[str, RunFolder]) -> list[str]:
    """Each warning once, with the tasks and, unless all of a task's runs share it, the systems."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for task in dict.fromkeys(task for run in runs.values() for task in run.results["tasks"]):
        results = {
            n: r.results["tasks"][task] for n, r in runs.items() if task in r.results["tasks"]
        }
        warned: dict[str, list[str]] = {}
        for name, result in results.items():
            rough = f"{result['n']} samples; intervals are rough"
            few = [rough] if result["n"] < FEW_SAMPLES else []
            for warning in (*result["warnings"], *few):
                warned.setdefault(warning, []).append(name)
        for warning, names in warned.items():
            systems = () if len(names) == len(results) else tuple(names)
            found.setdefault((warning, systems), []).append(task)
    return [
        f"{', '.join(tasks)}: {warning}" + (f" ({', '.join(systems)})" if systems else "")
        for (warning, systems), tasks in found.items()
    ]


def _setting_notes(name: str, run: RunFolder, base: str, anchor: RunFolder) -> list[str]:
    own, other = run.results, anchor.results
    pairs = [("", own["signature"], other["signature"])]
    for task in own["tasks"]:
        if task in other["tasks"]:
            signatures = (r["tasks"][task]["signature"] for r in (own, other))
            pairs.append((f"{task}: ", *signatures))
    return [
        f"{place}{name} has {key} {a!r}, {base} has {b!r}"
        for place, one, two in pairs
        for key, (a, b) in _differing(one, two).items()
    ]
