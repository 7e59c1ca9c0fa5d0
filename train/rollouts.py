"""Rollouts of PPO: answers sampled from the policy of now, scored, and made into advantages.

The value head is linear on the last hidden state, in fp32, and starts at zero: the first advantages
are those of the rewards alone. The reference is the policy at the stage's start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.policy_gradient import (
    gae,
    kl_estimates,
    masked_mean,
    token_rewards,
    whiten,
)
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.reference import StartWeights
from cwdpo_bench.train.rewards import RewardFunction
from cwdpo_bench.train.sections import PPO
from cwdpo_bench.vlm import (
    VLM,
    Batch,
    append_completions,
    completion_hidden,
    merge_prompts,
    output_head,
    sample,
    token_statistics,
)


class Scores(NamedTuple):
    """Of B answers under a policy and its value head, each [B, L]; meaningless on padding."""

    logps: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor | None


def score(model: Any, head: torch.nn.Module, batch: Batch, *, entropy: bool = False) -> Scores:
    """Log-probabilities (nats) and values of a batch's completion tokens, from one forward."""
    hidden = completion_hidden(model, batch)
    rows = token_statistics(
        hidden.flatten(0, 1),
        output_head(getattr(model, "module", model)),
        batch.targets.flatten(),
        statistics=entropy,
    )
    shape = batch.targets.shape
    values = head(hidden.float()).squeeze(-1)
    return Scores(
        rows.logps.view(shape), values, None if rows.entropy is None else rows.entropy.view(shape)
    )


def value_head(model: Any) -> torch.nn.Linear:
    """A head [H] → 1 in fp32 that says 0 everywhere."""
    width = model.get_output_embeddings().weight.shape[-1]
    head = torch.nn.Linear(width, 1, device=model.device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


@dataclass(frozen=True)
class Rollout:
    """B sampled answers.

    Attributes:
        rows: [B] places of their pairs.
        ids: [B, L] tokens.
        mask: [B, L] True on tokens.
        logps: [B, L] log-probabilities under the policy that sampled, nats.
        values: [B, L] of the value head at that time.
        advantages: [B, L], whitened.
        returns: [B, L].
    """

    rows: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    logps: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def part(self, answers: Sequence[int], device: torch.device) -> Rollout:
        """Some of the answers, on `device`, without columns that are padding in all of them."""
        index = torch.tensor(answers)
        width = int(self.mask[index].sum(-1).max())
        parts = {name: value[index].to(device) for name, value in self.tensors().items()}
        return Rollout(
            **{name: value if name == "rows" else value[:, :width] for name, value in parts.items()}
        )


class Roller:
    """Samples answers to given pairs and scores them under policy, value head and reference."""

    def __init__(
        self,
        objective: PPO,
        vlm: VLM,
        pairs: Sequence[Pair],
        prepared: PreparedPairs,
        reward: RewardFunction,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """The policy of now becomes the reference."""
        self._objective, self._vlm, self._pairs = objective, vlm, pairs
        self._prepared, self._reward, self._autocast = prepared, reward, autocast
        self._start = StartWeights(vlm.model)

    def batch(self, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> Batch:
        """Prompts of the pairs at `rows` with answers of tokens `ids`."""
        prompts = self._prepared.prompts(self._pairs[row] for row in rows)
        merged = merge_prompts(prompts, self._prepared.pad_token_id)
        return append_completions(merged, ids).to(self._vlm.device)

    @torch.no_grad()
    def roll_out(
        self, rows: Sequence[int], head: torch.nn.Module
    ) -> tuple[Rollout, dict[str, float]]:
        """One answer to each of the pairs at `rows`, and what is logged of them all.

        Raises:
            UserError: a reward is not a finite number.
        """
        objective = self._objective
        with self._autocast():
            answers = sample(
                self._vlm,
                self._prepared.prompts(self._pairs[row] for row in rows),
                max_new_tokens=objective.max_new_tokens,
                batch_size=objective.sample_batch_size,
            )
        rewards = self._reward([self._pairs[row] for row in rows], [a.text for a in answers])
        ids = [answer.ids for answer in answers]
        policy = self._scores(rows, ids, head, entropy=True)
        with self._start.in_place():
            reference = self._scores(rows, ids, head)
        tokens, mask = policy["ids"], policy["mask"]
        kl = kl_estimates(policy["logps"], reference["logps"]).k1.masked_fill(~mask, 0)
        scores = torch.from_numpy(rewards.total).float()
        token = token_rewards(scores, kl, mask, kl_coefficient=objective.kl_coefficient)
        if objective.whiten_rewards:
            token = whiten(token, mask, center=False)
        estimate = gae(token, policy["values"], mask, gamma=objective.gamma, lam=objective.lam)
        rollout = Rollout(
            rows=torch.tensor(rows),
            ids=tokens,
            mask=mask,
            logps=policy["logps"],
            values=policy["values"],
            advantages=whiten(estimate.advantages, mask),
            returns=estimate.returns,
        )
        metrics = {
            "reward/mean": float(rewards.total.mean()),
            "reward/std": float(rewards.total.std()),
            **{f"reward/{name}": float(value.mean()) for name, value in rewards.terms.items()},
            "kl/reference": kl.sum(-1).mean().item(),
            "answers/tokens": mask.sum(-1).float().mean().item(),
            "answers/ended": sum(answer.ended for answer in answers) / len(answers),
            "entropy": masked_mean(policy["entropy"], mask).item(),
            "value/explained_variance": _explained(policy["values"], estimate.returns, mask),
        }
        return rollout, metrics

    def _scores(
        self,
        rows: Sequence[int],
        ids: Sequence[Sequence[int]],
        head: torch.nn.Module,
        *,
        entropy: bool = False,
    ) -> dict[str, torch.Tensor]:
        """`logps`, `values`, `ids`, `mask` and, on request, `entropy`, [B, L] on the CPU."""
        model, length = self._vlm.model, max(len(tokens) for tokens in ids)
        training = model.training
        model.eval()
        parts: list[dict[str, torch.Tensor]] = []
        size = self._objective.sample_batch_size
        for start in range(0, len(rows), size):
            batch = self.batch(rows[start : start + size], ids[start : start + size])
            with self._autocast():
                found = score(model, head, batch, entropy=entropy)
            columns = {"ids": batch.targets, "mask": batch.mask, **found._asdict()}
            parts.append(
                {
                    name: torch.nn.functional.pad(value, (0, length - value.shape[1])).cpu()
                    for name, value in columns.items()
                    if value is not None
                }
            )
        model.train(training)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _explained(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 − Var(R − V)/Var(R): 0 for a value head that says nothing, 1 for one that knows."""
    spread = returns[mask].var(correction=0)
    rest = (returns - values)[mask].var(correction=0)
    return float(1 - rest / spread) if spread > 0 else 0.0
