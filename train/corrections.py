"""OPA-DPO's data: the policy's own answers at the start of a stage, and their corrections.

A row that brings `corrected` brings the own answer that it corrects as `rejected` (the authors'
data: an annotator mended the model's answers). For every other row the answer is sampled from the
policy of now, and `corrected_answer` mends it by a rule, offline.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import read_json, write_json
from cwdpo_bench.train import processes
from cwdpo_bench.train.data import Pair, normalized
from cwdpo_bench.train.negatives import CUT_OFF, EMPTY, EQUAL
from cwdpo_bench.vlm import Sample

OWN_FILE = "own_answers.json"


def corrected_answer(own: str, reference: str) -> str:
    """The own answer with what contradicts the reference replaced and what it adds left out.

    The words are aligned (`difflib`); where the two differ, the reference's words stand for the own
    ones, and words that the reference has nothing for are dropped. What the own answer leaves out
    is no fault; where that is all it does, the reference is the correction.
    """
    ours, theirs = own.split(), reference.split()
    match = SequenceMatcher(None, [_key(w) for w in ours], [_key(w) for w in theirs], False)
    words: list[str] = []
    for kind, start, end, other_start, other_end in match.get_opcodes():
        if kind == "equal":
            words += ours[start:end]
        elif kind == "replace":
            words += theirs[other_start:other_end]
    corrected = " ".join(words)
    return reference if normalized(corrected) in (normalized(own), "") else corrected


def _key(word: str) -> str:
    return word.lower().strip(".,;:!?\"'()")


def with_own_answers(
    pairs: Sequence[Pair], folder: Path, draw: Callable[[Sequence[Pair]], list[Sample]]
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs with the policy's own answers as `rejected`, and with their corrections.

    Args:
        pairs: of the stage.
        folder: of the stage, where the answers are kept for a resumed run.
        draw: samples an answer of the policy of now to each of the given pairs.

    Returns:
        All pairs in their order; where the own answer is empty, cut off or the reference itself,
        the pair's correction is its reference and its `rejected` is None. And those by reason.
    """
    missing = [pair for pair in pairs if pair.corrected is None]
    file = folder / OWN_FILE
    if not processes.agreed(file.is_file()):
        answers = draw(missing) if missing else []
        rows = [
            {"id": pair.id, "text": answer.text, "ended": answer.ended}
            for pair, answer in zip(missing, answers, strict=True)
        ]
        with processes.first_writes() as writes:
            if writes:
                write_json(file, rows)
    own = {row["id"]: row for row in read_json(file)}
    reasons: Counter[str] = Counter()
    done = []
    for pair in pairs:
        if pair.corrected is not None:
            done.append(pair)
            continue
        text, ended = own[pair.id]["text"], own[pair.id]["ended"]
        reason = _unusable(pair, text, ended)
        if reason is None:
            corrected = corrected_answer(text, pair.chosen)
            done.append(dataclasses.replace(pair, rejected=text, corrected=corrected))
        else:
            reasons[reason] += 1
            done.append(dataclasses.replace(pair, rejected=None, corrected=pair.chosen))
    return done, dict(reasons)


def _unusable(pair: Pair, own: str, ended: bool) -> str | None:
    if not own.strip():
        return EMPTY
    if normalized(own) == normalized(pair.chosen):
        return EQUAL
    return None if ended else CUT_OFF


def usable_pairs(key: str, pairs: Sequence[Pair], dropped: dict[str, int]) -> list[Pair]:
    """Those that have an own answer to prefer something to.

    Raises:
        UserError: there is none.
    """
    usable = [pair for pair in pairs if pair.rejected is not None]
    if not usable:
        raise UserError(
            f"{key}.own: none of the policy's own answers can be learned from ({dropped}); raise "
            f"{key}.own.temperature or {key}.own.max_new_tokens"
        )
    return usable
