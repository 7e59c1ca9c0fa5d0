"""The trainer of an objective that judges the policy's own answers by a reward."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback, TrainingArguments

from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.ppo import PPOTrainer
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.rewards import build_reward
from cwdpo_bench.train.sections import GRPO, PPO
from cwdpo_bench.vlm import VLM


def sampled_trainer(
    objective: PPO | GRPO,
    vlm: VLM,
    pairs: Sequence[Pair],
    prepared: PreparedPairs,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> BaseTrainer:
    """PPO or GRPO of `vlm` on the prompts and references of `pairs`.

    Raises:
        UserError: the rewards do not fit the pairs, or TRL is not installed.
    """
    reward = build_reward(objective.rewards, pairs)
    if isinstance(objective, GRPO):
        from cwdpo_bench.train.grpo import grpo_trainer

        return grpo_trainer(vlm, pairs, reward, arguments, callbacks)
    return PPOTrainer(
        objective=objective,
        vlm=vlm,
        pairs=pairs,
        prepared=prepared,
        reward=reward,
        args=arguments,
        callbacks=callbacks,
    )
