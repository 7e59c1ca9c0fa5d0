"""The probe: held-out pairs with all their answers, encoded once, measured under the policy of now.

Two measurements, both means over held-out pairs (SPEC 2):

- `core`, cheap and frequent: the chosen and the rejected answer, and on the chosen answers'
  contexts the confidence, the calibration and the shift from the initial policy.
- `answers`, on fewer pairs and less often: ℓ̄ and Σ log p of the other answers (`probe_answers.py`),
  of the initial policy's greedy answer and of the current one y*, and of the chosen answer under
  other images.

All answers of a pair stand behind one prompt, so that a packed batch computes it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from cwdpo_bench.calibration import ece
from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.probe_answers import (
    IMAGE_PROBES,
    TEXT_PROBES,
    ProbeAnswers,
    probe_answers,
)
from cwdpo_bench.train.residuals import CoolingRule, Scores, histogram, residual_norms
from cwdpo_bench.train.views import REJECTED as REJECTED_IMAGE
from cwdpo_bench.train.views import under_image
from cwdpo_bench.vlm import (
    VLM,
    Batch,
    Distribution,
    EncodedPrompt,
    at_the_head,
    average_confidence,
    batch_completions,
    completion_hidden,
    completion_statistics,
    device_of,
    encode_prompt,
    frozen_head,
    greedy_ids,
    merge_prompts,
    output_head,
    sequence_logps,
    token_statistics,
)
from cwdpo_bench.vlm.batch import completion_ids

CHOSEN, REJECTED, GREEDY, INITIAL_GREEDY = "chosen", "rejected", "greedy", "initial_greedy"
ANSWER_KINDS = (*TEXT_PROBES, INITIAL_GREEDY, GREEDY, *IMAGE_PROBES)
"""Kinds of the second measurement; columns are `KIND_mean_logp` and `KIND_logp`."""

LONGEST_GREEDY = 128
"""Tokens of a greedy answer at most; within it, as many as the longest chosen answer has."""


class _Item(NamedTuple):
    """One answer to score: its kind, its pair, and which encoded prompt it stands behind."""

    kind: str
    pair: int
    prompt: int
    ids: list[int]


class _Block(NamedTuple):
    """Answers that one forward scores."""

    items: list[_Item]
    batch: Batch

    def rows(self, kind: str) -> torch.Tensor:
        """Positions of the answers of a kind."""
        return torch.tensor([i for i, item in enumerate(self.items) if item.kind == kind])


class Answers(NamedTuple):
    """Of B answers.

    Attributes:
        scores: Σ log p, ℓ̄ and the number of tokens.
        residuals: [B] ‖π − e_y‖ over the answer's positions and the vocabulary.
        argmax_logp: [B] Σ log p of the argmax token at the answer's positions.
        argmax_mean_logp: [B] the same a token.
    """

    scores: Scores
    residuals: torch.Tensor
    argmax_logp: torch.Tensor
    argmax_mean_logp: torch.Tensor


@dataclass(frozen=True)
class Core:
    """The first measurement.

    Attributes:
        chosen: of all pairs.
        rejected: of the pairs that have one; None where none has.
        with_rejected: [pairs with a rejected answer] their positions.
        tokens: on the chosen answers' contexts, each [tokens]: entropy, top1_probability, correct,
            tv, js.
    """

    chosen: Answers
    rejected: Answers | None
    with_rejected: torch.Tensor
    tokens: dict[str, torch.Tensor]


class Probe:
    """Held-out pairs with the initial policy's distribution on the chosen answers."""

    def __init__(
        self,
        vlm: VLM,
        pairs: Sequence[Pair],
        batch_size: int,
        *,
        train_pairs: Sequence[Pair] = (),
        answer_pairs: int = 0,
        seed: int = 0,
    ) -> None:
        """Encode the pairs and keep the policy of now as the initial one.

        Args:
            vlm: the policy, which the probe holds on to.
            pairs: held-out pairs.
            batch_size: prompts a forward.
            train_pairs: where the answers of training pairs come from.
            answer_pairs: how many of `pairs` also get the second measurement.
            seed: of what the probes draw.
        """
        self.vlm, self.pairs, self._batch_size = vlm, list(pairs), batch_size
        # Where the head itself is trained, the initial distribution needs the head of now.
        self._initial_head = frozen_head(vlm.model)
        prompts = [encode_prompt(vlm.processor, pair.open()) for pair in self.pairs]
        # A rejected answer that stands under images of its own has a prompt of its own.
        self._prompt_of_rejected = {}
        for index, pair in enumerate(self.pairs):
            if pair.rejected_images is not None:
                self._prompt_of_rejected[index] = len(prompts)
                shown = under_image(pair, REJECTED_IMAGE).open()
                prompts.append(encode_prompt(vlm.processor, shown))
        self._core = self._blocks(self._pair_items(range(len(self.pairs))), prompts)
        self._initial_hidden = [
            self._hidden(vlm.model, block)[block.rows(CHOSEN)].cpu() for block in self._core
        ]
        others = probe_answers(self.pairs, train_pairs, answer_pairs, seed)
        self._answer_pairs = range(len(others))
        kept = {self._prompt_of_rejected.get(i, i) for i in self._answer_pairs}
        self._prompts = {i: prompts[i] for i in kept.union(self._answer_pairs)}
        items = self._answer_items(others, prompts)
        items += self._greedy_items(INITIAL_GREEDY, vlm.model)
        self._answers = self._blocks(items, prompts)
        measured = {GREEDY, *(item.kind for item in items)}
        # Kinds of the second measurement that no pair has: a paraphrase that no row brings, say.
        self.left_out = [kind for kind in ANSWER_KINDS if kind not in measured]

    def core(self, model: Any) -> Core:
        """The first measurement.

        Raises:
            UserError: the model's log-probabilities are not finite.
        """
        chosen, rejected, tokens, where = [], [], [], []
        for block, initial in zip(self._core, self._initial_hidden, strict=True):
            other = Distribution(initial.to(device_of(model)), self._initial_head)
            answers, losers, rows = self._core_block(model, block, other)
            chosen.append(answers)
            tokens.append(rows)
            if losers is not None:
                rejected.append(losers)
                where += [item.pair for item in block.items if item.kind == REJECTED]
        core = Core(
            chosen=_joined(chosen),
            rejected=_joined(rejected) if rejected else None,
            with_rejected=torch.tensor(where, dtype=torch.long),
            tokens={name: torch.cat([part[name] for part in tokens]) for name in tokens[0]},
        )
        if not torch.isfinite(core.chosen.scores.logp).all():
            raise UserError(
                "the model gives log-probabilities that are not finite on the probe pairs; look at "
                "the starting weights, or lower trainer.learning_rate"
            )
        return core

    def measure(self, model: Any, cooling: CoolingRule | None = None) -> dict[str, float]:
        """The columns of the first measurement."""
        return core_columns(self.core(model), cooling)

    def answers(self, model: Any) -> dict[str, float]:
        """The columns of the second measurement; a kind that no pair has is absent."""
        if not self._answer_pairs:
            return {}
        greedy = self._blocks(self._greedy_items(GREEDY, model), self._prompts)
        found: dict[str, dict[int, tuple[float, float]]] = {}
        for block in [*self._answers, *greedy]:
            scores = self._scores(model, block)
            values = zip(scores.mean_logp.tolist(), scores.logp.tolist(), strict=True)
            for item, value in zip(block.items, values, strict=True):
                found.setdefault(item.kind, {})[item.pair] = value
        row = {}
        for kind in ANSWER_KINDS:
            if kind in found:
                means, sums = zip(*found[kind].values(), strict=True)
                row[f"{kind}_mean_logp"] = float(np.mean(means))
                row[f"{kind}_logp"] = float(np.mean(sums))
        if "blank_image" in found:
            gains = [found[CHOSEN][i][0] - blank for i, (blank, _) in found["blank_image"].items()]
            row["image_gain"] = float(np.mean(gains))
        return row

    def branches(self, model: Any, pair: int) -> tuple[list[str], Batch]:
        """Chosen, rejected (where there is one) and current greedy answer of one pair.

        Only for pairs of the second measurement. Returns the kinds and the batch, on the device.
        """
        items = [*self._pair_items([pair]), *self._greedy_items(GREEDY, model, [pair])]
        (block,) = self._blocks(items, self._prompts)
        return [item.kind for item in block.items], block.batch.to(device_of(model))

    def _pair_items(self, indices: Sequence[int]) -> list[_Item]:
        items = []
        for index in indices:
            items.append(_Item(CHOSEN, index, index, self._ids(self.pairs[index].chosen)))
            rejected = self.pairs[index].rejected
            if rejected is not None:
                prompt = self._prompt_of_rejected.get(index, index)
                items.append(_Item(REJECTED, index, prompt, self._ids(rejected)))
        return items

    def _answer_items(
        self, others: Sequence[ProbeAnswers], prompts: list[EncodedPrompt]
    ) -> list[_Item]:
        """The text probes behind the pairs' own prompts, the image probes behind `prompts`' new."""
        items = []
        for index, probes in enumerate(others):
            chosen = self._ids(self.pairs[index].chosen)
            # The chosen answer again, on these pairs alone: what the image probes compare with.
            items.append(_Item(CHOSEN, index, index, chosen))
            items += [_Item(k, index, index, self._ids(text)) for k, text in probes.texts.items()]
            for kind, prompt in probes.prompts.items():
                items.append(_Item(kind, index, len(prompts), chosen))
                prompts.append(encode_prompt(self.vlm.processor, prompt))
        return items

    def _greedy_items(
        self, kind: str, model: Any, indices: Sequence[int] | None = None
    ) -> list[_Item]:
        """The greedy answers of now, behind the pairs' own prompts."""
        indices = self._answer_pairs if indices is None else indices
        vlm, items = replace(self.vlm, model=model), []
        longest = max((len(self._ids(pair.chosen)) for pair in self.pairs), default=0)
        for start in range(0, len(indices), self._batch_size):
            part = indices[start : start + self._batch_size]
            inputs = merge_prompts([self._prompts[i] for i in part], vlm.pad_token_id)
            answers = greedy_ids(vlm, inputs, min(longest, LONGEST_GREEDY))
            items += [_Item(kind, i, i, ids) for i, ids in zip(part, answers, strict=True)]
        return items

    def _ids(self, text: str) -> list[int]:
        return completion_ids(self.vlm.tokenizer, text)

    def _blocks(
        self, items: list[_Item], prompts: Sequence[EncodedPrompt] | Mapping[int, EncodedPrompt]
    ) -> list[_Block]:
        """Batches of `batch_size` prompts with all their answers."""
        used = sorted({item.prompt for item in items})
        blocks = []
        for start in range(0, len(used), self._batch_size):
            part = used[start : start + self._batch_size]
            inside = [item for item in items if item.prompt in part]
            batch = batch_completions(
                self.vlm,
                [prompts[i] for i in part],
                [item.ids for item in inside],
                [part.index(item.prompt) for item in inside],
            )
            blocks.append(_Block(inside, batch))
        return blocks

    @staticmethod
    @torch.no_grad()
    def _hidden(model: Any, block: _Block) -> torch.Tensor:
        with _evaluating(model):
            return completion_hidden(model, block.batch.to(device_of(model)))

    @staticmethod
    @torch.no_grad()
    def _core_block(
        model: Any, block: _Block, other: Distribution
    ) -> tuple[Answers, Answers | None, dict[str, torch.Tensor]]:
        """Chosen and rejected answers of one forward, and the chosen ones' tokens."""
        found: list[tuple[Answers, dict[str, torch.Tensor]]] = []

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            found.append(_row_statistics(model, hidden, block, CHOSEN, other))
            if len(block.rows(REJECTED)):
                found.append(_row_statistics(model, hidden, block, REJECTED))
            return hidden

        with _evaluating(model):
            at_the_head(model, block.batch.to(device_of(model)), compute)
        (chosen, tokens), *rest = found
        return chosen, rest[0][0] if rest else None, tokens

    @torch.no_grad()
    def _scores(self, model: Any, block: _Block) -> Scores:
        with _evaluating(model):
            batch = block.batch.to(device_of(model))
            return _answer_scores(completion_statistics(model, batch).logps, batch.mask)


def core_columns(core: Core, cooling: CoolingRule | None = None) -> dict[str, float]:
    """What `dynamics.parquet` keeps of the first measurement."""
    tokens = core.tokens
    row: dict[str, Any] = {
        "chosen_mean_logp": core.chosen.scores.mean_logp.mean(),
        "chosen_logp": core.chosen.scores.logp.mean(),
        "argmax_mean_logp": core.chosen.argmax_mean_logp.mean(),
        "argmax_logp": core.chosen.argmax_logp.mean(),
        "token_ece": ece(
            tokens["top1_probability"].double().clamp(max=1).numpy(), tokens["correct"].numpy()
        ),
        **{name: tokens[name].mean() for name in ("top1_probability", "entropy", "tv", "js")},
    }
    if core.rejected is not None:
        confidence = core.rejected.scores.mean_logp
        row["rejected_mean_logp"] = confidence.mean()
        row["rejected_logp"] = core.rejected.scores.logp.mean()
        if cooling is not None:
            weights = cooling(confidence)
            row["cooling_weight"] = weights.mean()
            row.update(histogram(weights))
    return {name: float(value) for name, value in row.items()}


@torch.no_grad()
def _row_statistics(
    model: Any, hidden: torch.Tensor, block: _Block, kind: str, other: Distribution | None = None
) -> tuple[Answers, dict[str, torch.Tensor]]:
    """Of a block's answers of one kind: what is kept an answer, and what is kept a token."""
    rows = block.rows(kind)
    mask, targets = (x[rows].to(hidden.device) for x in (block.batch.mask, block.batch.targets))
    second = None if other is None else Distribution(other.hidden[mask], other.head)
    head = output_head(getattr(model, "module", model))
    flat = token_statistics(hidden[rows][mask], head, targets[mask], statistics=True, other=second)
    assert flat.top1_probability is not None
    assert flat.top1_id is not None
    assert flat.collision is not None

    def by_answer(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    logps = by_answer(flat.logps)
    argmax = by_answer(flat.top1_probability.log())
    answers = Answers(
        _answer_scores(logps, mask),
        residual_norms(logps, by_answer(flat.collision), mask).cpu(),
        sequence_logps(argmax).cpu(),
        average_confidence(argmax, mask).cpu(),
    )
    tokens = {
        "entropy": flat.entropy,
        "top1_probability": flat.top1_probability,
        "correct": flat.top1_id.eq(targets[mask]),
        "tv": flat.tv,
        "js": flat.js,
    }
    return answers, {name: values.cpu() for name, values in tokens.items() if values is not None}


def _answer_scores(logps: torch.Tensor, mask: torch.Tensor) -> Scores:
    means = average_confidence(logps, mask)
    return Scores(sequence_logps(logps).cpu(), means.cpu(), mask.sum(-1).cpu())


def _joined(parts: list[Answers]) -> Answers:
    scores = Scores(*(torch.cat(column) for column in zip(*(p.scores for p in parts), strict=True)))
    rest = zip(*(part[1:] for part in parts), strict=True)
    return Answers(scores, *(torch.cat(column) for column in rest))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout while measuring; the mode of before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
