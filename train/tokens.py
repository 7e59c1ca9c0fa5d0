"""How many tokens went through the language model: what equal compute is judged by.

Counted are positions, padding and images' tokens included, since each costs the same arithmetic,
from the first update step to the last. `trained` positions were read to take a gradient and cost
about three times as much as `read` ones: answers sampled or scored on the way, and the measurements
of the dynamics. A process counts its own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState


class TokenCount(TrainerCallback, ExportableState):
    """Counts while a stage trains; travels in the Trainer's own checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` is the one that trains, with its adapters."""
        self.trained = 0
        self.read = 0
        # Every text and image position passes here once: images' places hold a token of their own.
        self._hook = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self.trained += inputs[0].numel()
        else:
            self.read += inputs[0].numel()

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in a checkpoint."""
        return {"args": {}, "attributes": self.record()}

    def record(self) -> dict[str, int]:
        """`trained` and `read` so far."""
        return {"trained": self.trained, "read": self.read}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the count of the checkpoint that the run goes on from."""
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.trained, self.read = saved["trained"], saved["read"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What happens to the model afterwards is not training."""
        self._hook.remove()
