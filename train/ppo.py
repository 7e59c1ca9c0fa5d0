"""PPO on `transformers.Trainer`: its loop, schedules, checkpoints and log; our rollouts and loss.

The Trainer counts update steps. Its data set holds no rows: whenever the micro-batches of a rollout
are used up, `rollout_size` further prompts are drawn, answered and scored, and the answers are put
in a queue of `epochs` passes in random order. A checkpoint holds the rollout and its queue too, so
an interrupted run goes on to the same weights. Objective and sources: `train/policy_gradient.py`.

What the papers leave open, and what we do: answers are drawn at temperature 1 without truncation,
so the ratio is that of the policy that sampled; expectations are means over the tokens of a
micro-batch; dropout is off, or the first ratio would not be 1; the value head shares the policy's
trunk, has a learning rate of its own and lives as long as the training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    kl_estimates,
    masked_mean,
)
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.rewards import RewardFunction
from cwdpo_bench.train.rollouts import Roller, Rollout, score, value_head
from cwdpo_bench.train.sections import PPO
from cwdpo_bench.train.trainer import autocast_of
from cwdpo_bench.vlm import VLM

_STATE_FILE = "ppo.pt"


class _HeadStep(TrainerCallback):
    """Does for the value head what the Trainer does for the parameters of its model alone."""

    def __init__(self, head: torch.nn.Module) -> None:
        self._head = head

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._head.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._head.zero_grad()


class PPOTrainer(BaseTrainer):
    """Proximal policy optimization of a vision-language model; one process."""

    def __init__(
        self,
        *,
        objective: PPO,
        vlm: VLM,
        pairs: Sequence[Pair],
        prepared: PreparedPairs,
        reward: RewardFunction,
        args: Any,
        **kwargs: Any,
    ) -> None:
        """The policy of now becomes the reference.

        Raises:
            UserError: more than one process or device.
        """
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(
                "recipe kind ppo trains in one process on one device; start it without a launcher "
                "and with one device visible (CUDA_VISIBLE_DEVICES=0)"
            )
        self._objective, self._pairs = objective, pairs
        per_epoch = -(-objective.rollout_size // args.per_device_train_batch_size)
        rollouts = max(1, len(pairs) // objective.rollout_size)
        places = rollouts * objective.epochs * per_epoch * args.per_device_train_batch_size
        super().__init__(
            model=vlm.model,
            args=args,
            # As many empty places as one pass over the pairs takes micro-batches.
            train_dataset=list(range(places)),
            data_collator=lambda items: {"places": torch.tensor(items)},
            **kwargs,
        )
        for module in vlm.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self._roller = Roller(
            objective, vlm, pairs, prepared, reward, lambda: autocast_of(self.args)
        )
        self._head = value_head(vlm.model)
        self.add_callback(_HeadStep(self._head))
        self._rollout: Rollout | None = None
        self._queue: list[list[int]] = []
        self._drawn = 0
        # Our loss is a mean over the micro-batch: the Trainer divides by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own optimizer with one more group: the value head."""
        optimizer = super().create_optimizer(model)
        optimizer.add_param_group(
            {
                "params": list(self._head.parameters()),
                "lr": self._objective.value_learning_rate,
                "weight_decay": 0.0,
            }
        )
        return optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Policy loss + c · value loss of the next micro-batch; a new rollout where none is left.

        Raises:
            UserError: the loss is not finite, or a reward is not.
        """
        if not self._queue:
            self._roll_out()
        assert self._rollout is not None
        objective = self._objective
        part = self._rollout.part(self._queue.pop(0), self._head.weight.device)
        mask, rows = part.mask, part.rows.tolist()
        ids = [tokens[keep].tolist() for tokens, keep in zip(part.ids, mask, strict=True)]
        with autocast_of(self.args):
            now = score(model, self._head, self._roller.batch(rows, ids))
        policy = clipped_policy_loss(
            now.logps, part.logps, part.advantages, mask, clip=objective.clip
        )
        bound = math.inf if objective.value_clip is None else objective.value_clip
        value = clipped_value_loss(now.values, part.values, part.returns, mask, clip=bound)
        loss = policy.loss + objective.value_coefficient * value.loss
        self.refuse_not_finite(loss, (self._pairs[row].id for row in rows))
        moved = masked_mean(kl_estimates(part.logps, now.logps.detach()).k3, mask).item()
        too_far = objective.target_kl is not None and moved > objective.target_kl
        if too_far:
            # These answers tell less and less of the policy of now: the rest of them is dropped.
            self._queue.clear()
        self.record(
            {
                "loss/policy": policy.loss,
                "loss/value": value.loss,
                "clipped/policy": policy.clipped,
                "clipped/value": value.clipped,
                "kl/rollout": moved,
                "kl/rollout_dropped": float(too_far),
            }
        )
        return (loss, None) if return_outputs else loss

    def _roll_out(self) -> None:
        """Answer the next prompts and queue the answers; stop where the reference is too far."""
        objective = self._objective
        rows = [self._row(self._drawn + i) for i in range(objective.rollout_size)]
        self._rollout, metrics = self._roller.roll_out(rows, self._head)
        order = random.Random(f"{self.args.seed}:rollout {self._drawn}")
        size = self.args.per_device_train_batch_size
        for _ in range(objective.epochs):
            answers = order.sample(range(len(rows)), len(rows))
            self._queue += [answers[i : i + size] for i in range(0, len(rows), size)]
        self._drawn += len(rows)
        self.record(metrics)
        if objective.stop_kl is not None and metrics["kl/reference"] > objective.stop_kl:
            self.log({"kl/stopped_at": metrics["kl/reference"]})
            self.control.should_training_stop = True

    def _row(self, draw: int) -> int:
        """The pair of the draw of this number: each pass over the pairs in an order of its own."""
        turn, place = divmod(draw, len(self._pairs))
        if self._turn != turn:
            self._turn, self._order = turn, list(range(len(self._pairs)))
            random.Random(f"{self.args.seed}:pass {turn}").shuffle(self._order)
        return self._order[place]

    _turn = -1
    _order: Sequence[int] = ()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Beside them what a resumed run needs: value head, rollout, queue."""
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "head": self._head.state_dict(),
            "rollout": None if self._rollout is None else self._rollout.tensors(),
            "queue": self._queue,
            "drawn": self._drawn,
        }
        torch.save(state, Path(output_dir) / _STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / _STATE_FILE, map_location="cpu", weights_only=True)
        self._head.load_state_dict(state["head"])
        self._rollout = None if state["rollout"] is None else Rollout(**state["rollout"])
        self._queue, self._drawn = state["queue"], state["drawn"]
