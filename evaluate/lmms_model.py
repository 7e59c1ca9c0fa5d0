"""The in-process engine as a model of lmms-eval's: its requests in, its replies out.

Every request becomes a sample of ours, so that prompt, images, batches and decoding are those of
`cwdpo-bench run`. Options that lmms-eval asks for one by one are scored together, a forward over
the prompt for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.engine import ChoiceAnswer, Failure
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.lmms import as_images, cut_at_stops, longest_reply
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, OPEN, ChoiceSample, RowImages
from cwdpo_bench.vlm import load_vlm

_OPTIONS = ("pretrained", "batch_size", "trust_remote_code")
_IGNORED = ("max_batch_size", "device")
"""What lmms-eval always passes on; the device is the best one there is."""


class CwdpoBench(lmms):  # type: ignore[misc]
    """`--model cwdpo_bench`.

    Args:
        pretrained: a folder, an adapter's folder or a Hub id.
        batch_size: prompts a forward.
        trust_remote_code: let the model's own code run.

    Raises:
        UserError: no checkpoint is named, or an argument is unknown.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str | None = 16,
        trust_remote_code: bool = False,
        **others: object,
    ) -> None:
        """Load the checkpoint."""
        super().__init__()
        if unknown := sorted(set(others) - set(_IGNORED)):
            raise UserError(f"--model_args {unknown[0]}: {nearest(unknown[0], _OPTIONS)}")
        if not pretrained:
            raise UserError("--model_args pretrained=CHECKPOINT: name the checkpoint")
        vlm = load_vlm(pretrained, trust_remote_code=trust_remote_code)
        self._engine = InProcessEngine(vlm, Path(), int(batch_size or 16))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy replies, each up to its task's stop texts."""
        samples, by_length = [], defaultdict(list)
        for place, request in enumerate(requests):
            prompt, settings, visuals, row, task, split = request.args
            samples.append(self._sample(place, prompt, visuals, row, task, split))
            by_length[longest_reply(settings)].append(place)
        replies: dict[int, str] = {}
        for length, places in by_length.items():
            answers = self._answer([samples[place] for place in places], length)
            for place, answer in zip(places, answers, strict=True):
                replies[place] = cut_at_stops(answer.text, requests[place].args[1])
        return [replies[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """−log p of each continuation, a sum over its tokens, and whether the reply starts so.

        lmms-eval takes the least: what it calls a likelihood is a loss. Its evaluator (0.7) makes a
        text of a bare pair, which its scoring then cannot read; it takes the wrapped one as it is.
        """
        options: dict[tuple[Any, ...], list[tuple[int, str]]] = defaultdict(list)
        for place, request in enumerate(requests):
            prompt, target, visuals, row, task, split = request.args
            text = target if isinstance(target, str) else target(self.task_dict[task][split][row])
            options[prompt, visuals, row, task, split].append((place, str(text).strip()))
        samples = []
        for number, ((prompt, visuals, row, task, split), texts) in enumerate(options.items()):
            words = tuple(dict.fromkeys(text for _, text in texts))
            samples.append(self._sample(number, prompt, visuals, row, task, split, words))
        found: dict[int, tuple[float, bool]] = {}
        for sample, answer, texts in zip(
            samples, self._answer(samples, 32), options.values(), strict=True
        ):
            assert answer.option_log_probabilities is not None
            logps = dict(zip(sample.option_words, answer.option_log_probabilities, strict=True))
            for place, text in texts:
                found[place] = (-float(logps[text]), answer.text.startswith(text))
        return [GenerationResult(found[place]) for place in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not done: our engine answers one turn."""
        raise UserError("--model cwdpo_bench answers one turn; this task asks for several rounds")

    def _answer(self, samples: Sequence[ChoiceSample], length: int) -> list[ChoiceAnswer]:
        answers: dict[int, ChoiceAnswer] = {}
        for place, answer in self._engine.answer_choices(samples, max_new_tokens=length):
            if isinstance(answer, Failure):
                raise UserError(answer.reason)
            answers[place] = answer
        return [answers[place] for place in range(len(samples))]

    def _sample(
        self,
        place: int,
        prompt: str,
        visuals: Any,
        row: int,
        task: str,
        split: str,
        words: tuple[str, ...] = (),
    ) -> ChoiceSample:
        load = partial(_load, visuals, self.task_dict[task][split], row)
        return ChoiceSample(
            id=f"{task} row {row} request {place}",
            cluster=str(row),
            images=(RowImages(f"{task} row {row}", load),),
            prompt=prompt,
            question_type=MULTIPLE_CHOICE if words else OPEN,
            options=words,
            option_words=words,
            gold="",
        )


def _load(visuals: Any, docs: Any, row: int) -> Sequence[Image.Image]:
    return as_images(visuals(docs[row]))
