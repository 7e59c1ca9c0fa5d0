"""`transformers.Trainer` with our loss: one forward gives log-probabilities, an objective the loss.

The loop, checkpoints, schedules, accelerate back ends and loggers are the Trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from cwdpo_bench.train import processes
from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.train.buckets import LengthBuckets
from cwdpo_bench.train.cooling import CoolingParameters, CoolingTracker
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.negatives import Negative
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.reference import Reference as Reference
from cwdpo_bench.train.sections import Objective
from cwdpo_bench.train.smoothing import has_constraint
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
    merge_prompts,
    pack_completions,
    sequence_logps,
)


class PairCollator:
    """Turns (index, pair) items into tensors: a batch for every image that the views stand under.

    The batch of an image holds a block of answers a view, in the views' order.
    """

    def __init__(
        self, prepared: PreparedPairs, views: Sequence[str], *, packed: bool | None = None
    ) -> None:
        """`views` are names of `train/views.py`.

        `packed` says whether the answers of a pair share a row: by default wherever the model's
        family allows it.
        """
        self._prepared, self._views = prepared, views
        self._join = (
            pack_completions
            if (prepared.packed if packed is None else packed)
            else (append_completions)
        )

    def __call__(self, items: Sequence[tuple[int, Pair]]) -> dict[str, Any]:
        """One batch; `index` says which pairs it holds."""
        pairs = [pair for _, pair in items]
        collated: dict[str, Any] = {"index": torch.tensor([position for position, _ in items])}
        groups = by_image(self._views, contrast=has_image_contrast(pairs))
        for image, views in groups.items():
            shown = [under_image(pair, image) for pair in pairs]
            answers = [answer_of(pair, view) for view in views for pair in pairs]
            ids = [self._prepared.answer(answer) for answer in answers]
            prompts = merge_prompts(self._prepared.prompts(shown), self._prepared.pad_token_id)
            collated[image] = self._join(prompts, ids).tensors()
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


def autocast_of(arguments: TrainingArguments) -> AbstractContextManager[Any]:
    """The mixed precision of the training steps, which the reference must share."""
    if not (arguments.bf16 or arguments.fp16):
        return nullcontext()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    return torch.autocast(arguments.device.type, dtype=dtype)


@torch.no_grad()
def reference_scores(
    vlm: VLM,
    pairs: Sequence[Pair],
    batch_size: int,
    views: Sequence[str] = ("chosen", "rejected"),
    *,
    prepared: PreparedPairs | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Reference:
    """Score every pair under the policy of now, which a stage then keeps as its reference.

    With LoRA the policy of now is base plus adapter as the stage before left it, so the reference
    is that frozen adapter and never the bare base. Several processes take the batches in turn.

    Args:
        vlm: the policy of now.
        pairs: of the stage.
        batch_size: pairs a forward.
        views: what is scored of a pair.
        prepared: where the pairs are encoded already.
        autocast: the precision of the training steps, so that Δ = 0 before the first.
    """
    prepared = prepared or PreparedPairs(vlm)
    collate = PairCollator(prepared, views)
    training = vlm.model.training
    vlm.model.eval()
    # Pairs of like length make little padding; their scores go back to the pairs' places.
    order = sorted(range(len(pairs)), key=lambda i: prepared.length(pairs[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    scored: list[tuple[list[int], dict[str, torch.Tensor]]] = []
    for turn in range(0, len(batches), processes.count()):
        # A process without a batch of its own goes along: sharded weights need all of them.
        part = batches[min(turn + processes.rank(), len(batches) - 1)]
        collated = _to_device(collate([(i, pairs[i]) for i in part]), vlm.device)
        with autocast():
            scores = _scores(vlm.model, collated, views)
        scored.append((part, {view: torch.stack(found).cpu() for view, found in scores.items()}))
    vlm.model.train(training)
    columns = {view: torch.empty(2, len(pairs)) for view in views}
    for each in processes.gathered(scored):
        for part, found in each:
            for view, values in found.items():
                columns[view][:, part] = values
    return {view: SequenceScores(*values) for view, values in columns.items()}


def _to_device(collated: Any, device: torch.device) -> Any:
    if isinstance(collated, dict):
        return {name: _to_device(value, device) for name, value in collated.items()}
    return collated.to(device)


def _with_common_mean(scores: SequenceScores) -> SequenceScores:
    """Scores whose means are those over all processes, in value; the gradient stays this one's.

    Data-parallel training averages gradients, so a function of the mean alone gets the value and
    the gradient that it has in one process with all the pairs.
    """
    number = processes.count()
    if number == 1:
        return scores
    own = torch.stack([column.detach().mean() for column in scores])
    common = own.clone()
    torch.distributed.all_reduce(common)
    shift = common / number - own
    return SequenceScores(*(column + s for column, s in zip(scores, shift, strict=True)))


class _EpochOf(TrainerCallback):
    """Tells the sampler its epoch, also where a resumed loader hides it behind other samplers."""

    def __init__(self, sampler: LengthBuckets) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


class _Items(Sequence[tuple[int, Pair]]):
    """(row, pair) by the place in the data; a row is of the data, or of a pair in another's place.

    Rows are added and never taken away, so that a row names one pair for ever.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._data = pairs
        self._added: list[tuple[int, Pair]] = []
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: Any) -> Any:
        row = self._rows.get(place, place)
        return row, self.pair(row)

    def pair(self, row: int) -> Pair:
        size = len(self._data)
        return self._data[row] if row < size else self._added[row - size][1]

    def place(self, row: int) -> int:
        size = len(self._data)
        return row if row < size else self._added[row - size][0]

    def replace(self, pairs: Mapping[int, Pair]) -> None:
        """Put these in the places of the data's own, which stand elsewhere."""
        first = len(self._data) + len(self._added)
        self._rows = {place: first + i for i, place in enumerate(pairs)}
        self._added += pairs.items()


class PreferenceTrainer(BaseTrainer):
    """The Trainer with one of our objectives.

    Expectations are means over a micro-batch of all processes together: with gradient accumulation
    the penalty of SFT-C is taken a micro-batch, then averaged.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        pairs: Sequence[Pair],
        reference: Reference | None,
        cooling: CoolingParameters | CoolingTracker | None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """`reference`, `cooling` and `lengths` belong to `pairs`, in their order.

        With `lengths` (tokens a pair) batches are of like length, see `LengthBuckets`; without, or
        with a `train_sampling_strategy` other than the default, they are the Trainer's own.
        """
        self._items = _Items(pairs)
        super().__init__(train_dataset=self._items, **kwargs)
        self._lengths = lengths
        self._objective = objective
        self._views = needed_views(objective)
        self._reference, self._cooling = reference, cooling
        # Our loss is a mean over the micro-batch: the Trainer divides by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._lengths is None or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        # The batches of all processes at a time are those of one process with so large a batch.
        together = self._train_batch_size * processes.count()
        sampler = LengthBuckets(self._lengths, together, self.args.seed)
        self.add_callback(_EpochOf(sampler))
        return sampler

    def replace(self, negatives: dict[int, Negative]) -> None:
        """Train from now on with these rejected answers, and with the data's own elsewhere.

        Pairs are added and never taken away: a batch that was fetched before finds its own scores.

        Args:
            negatives: by the place of their pair in the data.
        """
        self._items.replace({place: negative.pair for place, negative in negatives.items()})
        if self._reference is not None and negatives:
            new = [negative.scores for negative in negatives.values()]
            self._reference = {
                view: SequenceScores(
                    *(
                        torch.cat([column, torch.stack([scores[view][i] for scores in new])])
                        for i, column in enumerate(columns)
                    )
                )
                for view, columns in self._reference.items()
            }

    def _fresh(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch, collated again where it was fetched before its pairs were replaced."""
        rows = inputs["index"].tolist()
        items = [self._items[self._items.place(row)] for row in rows]
        if [row for row, _ in items] == rows:
            return inputs
        fresh: dict[str, Any] = self._prepare_inputs(self.data_collator(items))
        return fresh

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss; stops with the batch's ids where it is not finite."""
        inputs = self._fresh(inputs)
        index = inputs["index"].cpu()
        with autocast_of(self.args):
            scores = _scores(model, inputs, self._views)
        if has_constraint(self._objective):
            scores["rejected"] = _with_common_mean(scores["rejected"])
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
        self.refuse_not_finite(loss, (self._items.pair(i).id for i in index.tolist()))
        self.record(metrics)
        return (loss, None) if return_outputs else loss
