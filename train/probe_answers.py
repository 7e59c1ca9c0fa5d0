"""What the probe asks of the policy besides chosen and rejected: the answers and the images.

The text probes follow Ren and Sutherland (ICLR 2025), the image probes are ours (SPEC 2). All of an
answer's probes stand in the context of its pair: same image, same prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from cwdpo_bench.train.data import Pair
from cwdpo_bench.vlm import Prompt

TEXT_PROBES = ("paraphrase", "other_meaning", "train_chosen", "held_out_chosen", "shuffled")
IMAGE_PROBES = ("blank_image", "other_image")
_GREY = (128, 128, 128)


class ProbeAnswers(NamedTuple):
    """The probes of one pair.

    Attributes:
        texts: answers by kind; a kind that the pair does not have is absent.
        prompts: contexts by kind in which the chosen answer is scored again.
    """

    texts: dict[str, str]
    prompts: dict[str, Prompt]


def probe_answers(
    pairs: Sequence[Pair], train_pairs: Sequence[Pair], number: int, seed: int
) -> list[ProbeAnswers]:
    """The probes of the first `number` held-out pairs; the same seed, the same probes.

    - `paraphrase`: the row's own field of that name. No rule writes one: a sentence turned around
      by rule is no sentence of the data, and would measure the rule. Without the field: absent.
    - `other_meaning`: the row's own field; else the chosen answer of the held-out pair that shares
      the form most and the words least: the same prompt where there is one, then the nearest number
      of words, then the fewest words in common.
    - `train_chosen`, `held_out_chosen`: the chosen answer of another pair, drawn by `seed`.
    - `shuffled`: the chosen answer's words in another order, drawn by `seed`.
    - `blank_image`: the chosen answer under images of the same sizes in one mid grey.
    - `other_image`: the chosen answer under the images of the next held-out pair that has as many.

    Args:
        pairs: held-out pairs.
        train_pairs: the training pairs; without them `train_chosen` is absent.
        number: at most this many of `pairs` get probes.
        seed: of the draws.
    """
    rng = random.Random(f"{seed}:probe")
    probes = []
    for index, pair in enumerate(pairs[:number]):
        others = [other for other in pairs if other.chosen != pair.chosen]
        trained = [other for other in train_pairs if other.chosen != pair.chosen]
        texts = {
            "paraphrase": pair.paraphrase,
            "other_meaning": pair.other_meaning or _other_meaning(pair, others),
            "train_chosen": rng.choice(trained).chosen if trained else None,
            "held_out_chosen": rng.choice(others).chosen if others else None,
            "shuffled": shuffled(pair.chosen, rng),
        }
        probes.append(
            ProbeAnswers(
                {kind: text for kind, text in texts.items() if text is not None},
                _image_prompts(index, pairs),
            )
        )
    return probes


def shuffled(text: str, rng: random.Random) -> str | None:
    """The words in another order, a full stop kept at the end; None where no other order is."""
    stop = "." if text.endswith(".") else ""
    words = text.removesuffix(".").split()
    if len(set(words)) < 2:
        return None
    while (changed := rng.sample(words, len(words))) == words:
        pass
    return " ".join(changed) + stop


def _other_meaning(pair: Pair, others: Sequence[Pair]) -> str | None:
    words = pair.chosen.lower().split()

    def distance(other: Pair) -> tuple[bool, int, int]:
        theirs = other.chosen.lower().split()
        shared = len(set(words) & set(theirs))
        return other.prompt != pair.prompt, abs(len(theirs) - len(words)), shared

    return min(others, key=distance).chosen if others else None


def _image_prompts(index: int, pairs: Sequence[Pair]) -> dict[str, Prompt]:
    pair = pairs[index]
    if not pair.images:
        return {}
    sizes = [image.size for image in pair.open().images]
    blank = tuple(Image.new("RGB", size, _GREY) for size in sizes)
    prompts = {"blank_image": Prompt(pair.prompt, blank)}
    for other in [*pairs[index + 1 :], *pairs[:index]]:
        if len(other.images) == len(pair.images) and other.images != pair.images:
            prompts["other_image"] = Prompt(pair.prompt, other.open().images)
            break
    return prompts
