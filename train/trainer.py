"""`transformers.Trainer` with our loss: one forward gives log-probabilities, an objective the loss.

The loop, checkpoints, schedules, accelerate back ends and loggers are the Trainer's own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.cooling import CoolingParameters, CoolingTracker
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.sections import Objective
from cwdpo_bench.train.terms import SequenceScores, loss_and_metrics, needed_views
from cwdpo_bench.train.views import (
    FROZEN,
    REJECTED,
    answer_of,
    by_image,
    has_image_contrast,
    under_image,
)
from cwdpo_bench.vlm import (
    VLM,
    Batch,
    append_completions,
    average_confidence,
    completion_statistics,
    encode_prompts,
    sequence_logps,
)
from cwdpo_bench.vlm.batch import completion_ids

Reference = dict[str, SequenceScores]
"""The reference policy's scores of all pairs of a stage, by view, in the pairs' order."""


class PairCollator:
    """Turns (index, pair) items into tensors: a batch for every image that the views stand under.

    The batch of an image holds a block of rows a view, in the views' order.
    """

    def __init__(self, processor: Any, views: Sequence[str]) -> None:
        """`views` are names of `train/views.py`."""
        self._processor, self._views = processor, views

    def __call__(self, items: Sequence[tuple[int, Pair]]) -> dict[str, Any]:
        """One batch; `index` says which pairs it holds."""
        pairs = [pair for _, pair in items]
        collated: dict[str, Any] = {"index": torch.tensor([position for position, _ in items])}
        groups = by_image(self._views, contrast=has_image_contrast(pairs))
        for image, views in groups.items():
            shown = [under_image(pair, image) for pair in pairs]
            answers = [answer_of(pair, view) for view in views for pair in pairs]
            ids = [completion_ids(self._processor.tokenizer, answer) for answer in answers]
            prompts = encode_prompts(self._processor, [pair.open() for pair in shown])
            collated[image] = append_completions(prompts, ids).tensors()
        return collated


def _scores(model: Any, collated: dict[str, Any], views: Sequence[str]) -> Reference:
    """Scores of every view in a collator's output."""
    scores: Reference = {}
    pairs = len(collated["index"])
    groups = by_image(views, contrast=REJECTED in collated)
    for image, members in groups.items():
        # The Trainer moves plain dictionaries of tensors only.
        batch = Batch(**collated[image])
        with torch.set_grad_enabled(torch.is_grad_enabled() and image not in FROZEN):
            logps = completion_statistics(model, batch).logps
        sums, means = sequence_logps(logps), average_confidence(logps, batch.mask)
        for i, view in enumerate(members):
            rows = slice(i * pairs, (i + 1) * pairs)
            scores[view] = SequenceScores(sums[rows], means[rows])
    return scores


@torch.no_grad()
def reference_scores(
    vlm: VLM, pairs: list[Pair], batch_size: int, views: Sequence[str] = ("chosen", "rejected")
) -> Reference:
    """Score every pair under the policy of now, which a stage then keeps as its reference.

    With LoRA the policy of now is base plus adapter as the stage before left it, so the reference
    is that frozen adapter and never the bare base.
    """
    collate = PairCollator(vlm.processor, views)
    training = vlm.model.training
    vlm.model.eval()
    parts: list[Reference] = []
    indexed = list(enumerate(pairs))
    for start in range(0, len(indexed), batch_size):
        collated = collate(indexed[start : start + batch_size])
        parts.append(_scores(vlm.model, _to_device(collated, vlm.device), views))
    vlm.model.train(training)
    return {
        view: SequenceScores(
            *(torch.cat(column).cpu() for column in zip(*(p[view] for p in parts), strict=True))
        )
        for view in views
    }


def _to_device(collated: Any, device: torch.device) -> Any:
    if isinstance(collated, dict):
        return {name: _to_device(value, device) for name, value in collated.items()}
    return collated.to(device)


class PreferenceTrainer(Trainer):
    """The Trainer with one of our objectives.

    Expectations are means over the micro-batch of one process: with gradient accumulation or
    several processes the penalty of SFT-C is taken a micro-batch, then averaged.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        pairs: list[Pair],
        reference: Reference | None,
        cooling: CoolingParameters | CoolingTracker | None,
        **kwargs: Any,
    ) -> None:
        """`reference` and `cooling` belong to `pairs`, in their order."""
        super().__init__(train_dataset=list(enumerate(pairs)), **kwargs)
        self._objective, self._pairs = objective, pairs
        self._views = needed_views(objective)
        self._reference, self._cooling = reference, cooling
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        # Our loss is a mean over the micro-batch: the Trainer divides by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss; stops with the batch's ids where it is not finite."""
        index = inputs["index"].cpu()
        scores = _scores(model, inputs, self._views)
        reference = None
        if self._reference is not None:
            device = inputs["index"].device
            reference = {
                view: SequenceScores(*(column[index].to(device) for column in columns))
                for view, columns in self._reference.items()
            }
        cooling = self._cooling
        now = cooling.parameters if isinstance(cooling, CoolingTracker) else cooling
        loss, metrics = loss_and_metrics(self._objective, scores, reference, now)
        if isinstance(cooling, CoolingTracker):
            cooling.observe(scores["rejected"].mean_logp)
        if not math.isfinite(loss.item()):
            ids = ", ".join(self._pairs[i].id for i in index.tolist())
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} on the pairs "
                f"{ids}; lower trainer.learning_rate or look at these rows; the last checkpoint "
                "is kept"
            )
        for name, value in metrics.items():
            self._metrics[name].append(value.detach())
        return (loss, None) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a resumed run's weights through `from_pretrained`.

        `save_pretrained` writes some families' weights (Qwen2.5-VL among them) under their Hub
        names, which the Trainer's own loading, seen in transformers 5.23, does not map back: it
        warns of missing keys and goes on with the weights of the start.
        """
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and not (
            self.is_deepspeed_enabled or self.is_fsdp_enabled
        ):
            saved = type(model).from_pretrained(
                resume_from_checkpoint, dtype=model.dtype, use_safetensors=True
            )
            model.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of our metrics since the last log."""
        if "loss" in logs:
            for name, values in self._metrics.items():
                logs[name] = torch.stack(values).mean().item()
            self._metrics.clear()
        super().log(logs, start_time)
