"""`transformers.Trainer` with our loss: one forward gives log-probabilities, an objective the loss.

The loop, checkpoints, schedules, accelerate back ends and loggers are the Trainer's own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, Trainer

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.cooling import CoolingParameters, CoolingTracker
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.objectives import (
    cw_dpo_loss,
    dpo_loss,
    sft_c_loss,
    sft_loss,
)
from cwdpo_bench.train.recipe import CWDPO, DPO, SFT, SFTC, Objective
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


class SequenceScores(NamedTuple):
    """Of B answers, each [B] in nats: the summed log-probability and the mean a token (ℓ̄)."""

    logp: torch.Tensor
    mean_logp: torch.Tensor


class Reference(NamedTuple):
    """The reference policy's scores of all pairs of a stage, in the pairs' order."""

    chosen: SequenceScores
    rejected: SequenceScores


def needs_rejected(objective: Objective) -> bool:
    """Whether the objective reads the rejected answers."""
    return not isinstance(objective, SFT)


def needs_reference(objective: Objective) -> bool:
    """Whether the objective compares with a reference policy."""
    return isinstance(objective, DPO | CWDPO)


class PairCollator:
    """Turns (index, pair) items into tensors: chosen rows first, then the rejected rows."""

    def __init__(self, processor: Any, *, with_rejected: bool) -> None:
        """`with_rejected` adds the rejected rows."""
        self._processor, self._with_rejected = processor, with_rejected

    def __call__(self, items: Sequence[tuple[int, Pair]]) -> dict[str, Any]:
        """One batch; `index` says which pairs it holds."""
        pairs = [pair for _, pair in items]
        answers = [pair.chosen for pair in pairs]
        if self._with_rejected:
            answers += [pair.rejected for pair in pairs if pair.rejected is not None]
        ids = [completion_ids(self._processor.tokenizer, answer) for answer in answers]
        batch = append_completions(
            encode_prompts(self._processor, [pair.open() for pair in pairs]), ids
        )
        index = torch.tensor([position for position, _ in items])
        return {**vars(batch), "index": index}


def _batch(collated: dict[str, Any]) -> Batch:
    """The batch in a collator's output; the Trainer moves plain dictionaries of tensors only."""
    return Batch(collated["inputs"], collated["targets"], collated["mask"])


def _scores(model: Any, batch: Batch, pairs: int) -> list[SequenceScores]:
    """Scores of the chosen rows and, where the batch holds them, of the rejected rows."""
    logps = completion_statistics(model, batch).logps
    sums, means = sequence_logps(logps), average_confidence(logps, batch.mask)
    return [
        SequenceScores(sums[start : start + pairs], means[start : start + pairs])
        for start in range(0, len(sums), pairs)
    ]


@torch.no_grad()
def reference_scores(vlm: VLM, pairs: list[Pair], batch_size: int) -> Reference:
    """Score every pair under the policy of now, which a stage then keeps as its reference.

    With LoRA the policy of now is base plus adapter as the stage before left it, so the reference
    is that frozen adapter and never the bare base.
    """
    collate = PairCollator(vlm.processor, with_rejected=True)
    training = vlm.model.training
    vlm.model.eval()
    parts: list[list[SequenceScores]] = []
    indexed = list(enumerate(pairs))
    for start in range(0, len(indexed), batch_size):
        part = indexed[start : start + batch_size]
        batch = _batch(collate(part)).to(vlm.device)
        parts.append(_scores(vlm.model, batch, len(part)))
    vlm.model.train(training)
    chosen, rejected = (
        SequenceScores(*(torch.cat(column).cpu() for column in zip(*side, strict=True)))
        for side in zip(*parts, strict=True)
    )
    return Reference(chosen, rejected)


def loss_and_metrics(
    objective: Objective,
    scores: list[SequenceScores],
    reference: list[SequenceScores] | None,
    cooling: CoolingParameters | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The scalar loss of a batch, and what is logged of it.

    Args:
        objective: which loss, with its parameters.
        scores: the policy's, of the chosen and (unless for SFT) of the rejected answers.
        reference: the reference's, of the same pairs.
        cooling: ℓ_floor and τ of now, for the cooled loss.
    """
    chosen = scores[0]
    metrics = {"logps/chosen": chosen.logp.mean(), "mean_logps/chosen": chosen.mean_logp.mean()}
    if isinstance(objective, SFT):
        return sft_loss(_nll(objective, chosen)), metrics
    rejected = scores[1]
    metrics["logps/rejected"] = rejected.logp.mean()
    metrics["mean_logps/rejected"] = rejected.mean_logp.mean()
    if isinstance(objective, SFTC):
        nll_rejected = _nll(objective, rejected)
        loss = sft_c_loss(
            _nll(objective, chosen),
            nll_rejected,
            weight=objective.weight,
            threshold=objective.threshold,
        )
        metrics["penalty/active"] = (nll_rejected.mean() < objective.threshold).float()
        return loss, metrics
    assert reference is not None
    delta_chosen = chosen.logp - reference[0].logp
    delta_rejected = rejected.logp - reference[1].logp
    margin = delta_chosen - delta_rejected
    metrics["rewards/chosen"] = objective.beta * delta_chosen.mean()
    metrics["rewards/rejected"] = objective.beta * delta_rejected.mean()
    metrics["rewards/margins"] = objective.beta * margin.mean()
    metrics["rewards/accuracies"] = (margin > 0).float().mean()
    if isinstance(objective, DPO):
        return dpo_loss(delta_chosen, delta_rejected, beta=objective.beta).mean(), metrics
    assert cooling is not None
    weight = cooling.weight(rejected.mean_logp)
    metrics["cooling/mean"] = weight.mean()
    return cw_dpo_loss(delta_chosen, delta_rejected, weight, beta=objective.beta).mean(), metrics


def _nll(objective: SFT | SFTC, scores: SequenceScores) -> torch.Tensor:
    return -(scores.mean_logp if objective.nll == "mean" else scores.logp)


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
        reference = None
        if self._reference is not None:
            reference = [
                SequenceScores(*(column[index].to(inputs["mask"].device) for column in side))
                for side in self._reference
            ]
        scores = _scores(model, _batch(inputs), len(index))
        cooling = self._cooling
        now = cooling.parameters if isinstance(cooling, CoolingTracker) else cooling
        loss, metrics = loss_and_metrics(self._objective, scores, reference, now)
        if isinstance(cooling, CoolingTracker):
            cooling.observe(scores[1].mean_logp)
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
