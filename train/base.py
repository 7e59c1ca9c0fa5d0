"""What all our trainers share beyond `transformers.Trainer`: metrics, one clear stop, resuming."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import processes
from cwdpo_bench.vlm import is_sharded


class BaseTrainer(Trainer):
    """The Trainer with means of metrics in its log, and weights that come back as they were."""

    def __init__(self, **kwargs: Any) -> None:
        """Take what the next class takes."""
        super().__init__(**kwargs)
        if self.is_fsdp_enabled and is_sharded(self.model):
            processes.leave_sharded(self.accelerator)
        self._recorded: dict[str, list[torch.Tensor]] = defaultdict(list)

    def record(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        """Keep values whose means go into the next line of the log."""
        for name, value in metrics.items():
            self._recorded[name].append(torch.as_tensor(value, dtype=torch.float32).detach())

    def refuse_not_finite(self, loss: torch.Tensor, ids: Iterable[str]) -> None:
        """Stop with the step and the samples' ids where the loss is not finite.

        Raises:
            UserError: it is not.
        """
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} on the pairs "
                f"{', '.join(ids)}; lower trainer.learning_rate or look at these rows; the last "
                "checkpoint is kept"
            )

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

    def load_weights(self, folder: Path) -> None:
        """Take the weights that `processes.keep_weights` wrote to a folder."""
        if not processes.take_weights(self.model, folder):
            self._load_from_checkpoint(str(folder))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of our metrics since the last log, over all processes."""
        if "loss" in logs:
            own = {
                name: torch.stack([value.cpu() for value in values]).mean().item()
                for name, values in self._recorded.items()
            }
            logs.update(processes.means(own))
            self._recorded.clear()
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss(logs["train_loss"])
        super().log(logs, start_time)

    def _mean_loss(self, otherwise: float) -> float:
        """The mean of the logged losses over their steps.

        The Trainer's own divides the sum since the last start by all steps, so that a resumed run
        ends with a figure that is too small (seen in transformers 5.24).
        """
        lines = [line for line in self.state.log_history if "loss" in line]
        steps = [0, *(line["step"] for line in lines)]
        weighted = [
            line["loss"] * (end - start)
            for line, (start, end) in zip(lines, pairwise(steps), strict=True)
        ]
        return sum(weighted) / steps[-1] if lines else otherwise
