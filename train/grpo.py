"""GRPO on TRL's GRPOTrainer with our rewards: group-normalised advantages, clipped ratio.

The loop, the objective and its variants are TRL's, and so are the arguments: what stands under
`trainer` in a recipe of this kind is a field of `trl.GRPOConfig`. Ours are the rewards, the rows,
the log and the folder. TRL is an extra: `pip install 'cwdpo-bench[grpo]'`.

Source: Shao et al., DeepSeekMath (2024), section 4. What TRL's defaults change in it: no KL term
(`beta: 0`), and a loss averaged over all tokens of a batch (`loss_type: dapo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.rewards import RewardFunction
from cwdpo_bench.vlm import VLM

try:
    import datasets
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]
except ImportError as error:
    raise UserError(
        f"recipe kind grpo needs TRL ({error}); pip install 'cwdpo-bench[grpo]'"
    ) from error


@dataclass
class GRPOArguments(GRPOConfig):  # type: ignore[misc]
    """TRL's arguments with the defaults of transformers, which the other recipes have, in two."""

    bf16: bool = False
    gradient_checkpointing: bool = False


class _Trainer(BaseTrainer, GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with our rewards, log, and start as the reference."""

    def __init__(
        self, *, vlm: VLM, pairs: Sequence[Pair], reward: RewardFunction, **kwargs: Any
    ) -> None:
        """The policy of now becomes the reference, where a KL term asks for one."""
        self._pairs, self._reward = pairs, reward
        self._answered: list[Pair] = []
        super().__init__(
            model=vlm.model,
            processing_class=vlm.processor,
            train_dataset=_rows(pairs),
            reward_funcs=[self.reward],
            **kwargs,
        )
        if self.ref_model is not None:
            # TRL loads it from where the model once came from; the start may be another policy.
            self.ref_model.load_state_dict(vlm.model.state_dict())

    def reward(self, *, completions: list[Any], row: list[int], **_: Any) -> list[float]:
        """The weighted sums of our terms, each of which goes into the log.

        Raises:
            UserError: a term is not a finite number.
        """
        self._answered = [self._pairs[i] for i in row]
        answers = [completion[0]["content"].strip() for completion in completions]
        scored = self._reward(self._answered, answers)
        self.record(
            {
                "reward/mean": float(scored.total.mean()),
                "reward/std": float(scored.total.std()),
                **{f"reward/{name}": float(value.mean()) for name, value in scored.terms.items()},
            }
        )
        return [float(value) for value in scored.total]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; stops with the samples' ids where it is not finite."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.refuse_not_finite(
            loss[0] if isinstance(loss, tuple) else loss,
            dict.fromkeys(pair.id for pair in self._answered),
        )
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; a reference adapter of TRL's is no part of the checkpoint."""
        output = super().train(*args, **kwargs)
        model: Any = self.model
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")
        return output

    def _send_telemetry(self) -> None:
        """Nothing is told to anyone."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The folder says in its own files how it was made."""


def _rows(pairs: Sequence[Pair]) -> Any:
    """TRL's rows: a conversation without its images, the images, and the place of the pair."""

    def open_rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        opened = [pairs[i].open() for i in batch["row"]]
        return {
            "prompt": [[{"role": "user", "content": prompt.text}] for prompt in opened],
            "images": [list(prompt.images) for prompt in opened],
            "row": batch["row"],
        }

    rows = datasets.Dataset.from_dict({"row": list(range(len(pairs)))})
    return rows.with_transform(open_rows)


def grpo_trainer(
    vlm: VLM,
    pairs: Sequence[Pair],
    reward: RewardFunction,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> BaseTrainer:
    """GRPO of `vlm` on the prompts and references of `pairs`."""
    return _Trainer(vlm=vlm, pairs=pairs, reward=reward, args=arguments, callbacks=callbacks)
