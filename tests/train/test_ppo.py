"""PPO whole: a bandit with a known optimum; rollouts, reference, resuming on a tiny VLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimates,
    token_rewards,
    whiten,
)
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.reference import StartWeights
from cwdpo_bench.train.rewards import Rewards
from cwdpo_bench.train.rollouts import Roller, score, value_head
from cwdpo_bench.train.run import train
from cwdpo_bench.train.sections import PPO
from cwdpo_bench.vlm import load_vlm

OWN = "own_rewards_of_test_ppo"
SMALL = [
    f"objective.rewards=[{{kind: callable, function: '{OWN}:early'}}]",
    "trainer.per_device_train_batch_size=8",
    "trainer.gradient_accumulation_steps=1",
    "trainer.learning_rate=1e-3",
    "trainer.warmup_steps=0",
    "trainer.lr_scheduler_type=constant",
    "trainer.logging_steps=1",
    "trainer.save_steps=2",
    "trainer.max_steps=6",
    "dynamics.every=3",
    "objective.rollout_size=16",
    "objective.epochs=2",
    "objective.max_new_tokens=4",
    "objective.target_kl=null",
]


def _bandit(beta: float, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPO on 6 arms: policy, rewards and reference when it is done."""
    generator = torch.Generator().manual_seed(0)
    worth = torch.tensor([0.0, 0.2, 0.4, 1.0, 0.6, 0.1])
    start = torch.randn(6, generator=generator)
    logits, value = start.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.02)
    mask = torch.ones(512, 1, dtype=torch.bool)
    for _ in range(steps):
        old, old_value = logits.detach().log_softmax(-1), value.detach().expand(512, 1)
        arms = torch.multinomial(old.exp(), 512, replacement=True, generator=generator)
        old_logps = old[arms][:, None]
        kl = kl_estimates(old_logps, start.log_softmax(-1)[arms][:, None]).k1
        rewards = token_rewards(worth[arms], kl, mask, kl_coefficient=beta)
        estimate = gae(rewards, old_value, mask, gamma=1.0, lam=0.95)
        advantages = whiten(estimate.advantages, mask)
        for _ in range(2):
            logps = logits.log_softmax(-1)[arms][:, None]
            policy = clipped_policy_loss(logps, old_logps, advantages, mask, clip=0.2).loss
            critic = clipped_value_loss(
                value.expand(512, 1), old_value, estimate.returns, mask, clip=0.2
            ).loss
            optimizer.zero_grad()
            (policy + critic).backward()
            optimizer.step()
    return logits.detach().softmax(-1), worth, start.softmax(-1)


def test_without_a_penalty_the_bandit_learns_the_best_arm() -> None:
    policy, worth, _ = _bandit(beta=0.0, steps=150)
    assert policy[worth.argmax()] > 0.97


def test_with_a_penalty_the_bandit_learns_the_tilted_reference() -> None:
    """The optimum of E[r] − β KL(π ‖ π_ref) is π_ref · exp(r / β), normalised."""
    policy, worth, reference = _bandit(beta=0.4, steps=400)
    best = (reference.log() + worth / 0.4).softmax(-1)
    assert (0.5 * (best - reference).abs().sum()) > 0.3
    torch.testing.assert_close(policy, best, atol=0.04, rtol=0)


@pytest.fixture
def run(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Train on prompts without pictures, whose right answers a module of the user's knows."""
    rows = [
        {"id": f"q{i}", "prompt": f"Which? {i}", "chosen": "a red circle", "rejected": "b"}
        for i in range(32)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "probe.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / f"{OWN}.py").write_text(
        "def early(completions):\n"
        "    return [float(text[:1].lower() < 'm') for text in completions]\n"
        "def broken(completions, ids):\n"
        "    return [float('inf') if name == 'q7' else 0.0 for name in ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def start(*overrides: str, output: str = "out", **kwargs: Any) -> dict[str, Any]:
        return train(
            load_recipe("ppo", [*SMALL, *overrides]),
            model=str(kwargs.pop("model", tiny_model_folder)),
            data=tmp_path / "pairs.jsonl",
            probe=tmp_path / "probe.jsonl",
            output=tmp_path / output,
            **kwargs,
        )

    return start


def _history(folder: Path, column: str) -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[column] for line in lines if column in line]


def test_a_model_learns_what_is_rewarded(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """From chance to nearly always within 40 steps."""
    run(
        "objective.max_new_tokens=1",
        "objective.rollout_size=64",
        "objective.kl_coefficient=0",
        "trainer.per_device_train_batch_size=32",
        "trainer.max_steps=40",
        "trainer.learning_rate=3e-3",
    )
    means = _history(tmp_path / "out", "reward/mean")
    assert len(means) == 10
    assert means[0] < 0.75
    assert means[-1] > 0.95
    assert _history(tmp_path / "out", "kl/reference")[-1] > 0.1


def test_the_first_ratio_is_1_and_the_start_is_the_reference(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    record = run()
    assert record["stages"]["stage1"]["steps"] == 6
    out = tmp_path / "out"
    moved = _history(out, "kl/rollout")
    # Two passes of two micro-batches a rollout: the first micro-batch of each finds no difference.
    assert moved[0] == pytest.approx(0, abs=1e-6)
    assert moved[4] == pytest.approx(0, abs=1e-6)
    assert min(moved[1:4]) > 1e-6
    reference = _history(out, "kl/reference")
    assert reference[0] == pytest.approx(0, abs=1e-5)
    assert reference[1] != pytest.approx(0, abs=1e-4)
    assert _history(out, f"reward/{OWN}:early") == _history(out, "reward/mean")


@pytest.mark.parametrize("lora", ["true", "false"])
def test_an_interrupted_rollout_goes_on_to_the_same_weights(
    lora: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def cut(stage: str, step: int, last: int, loss: float | None) -> None:
        if step == 3:
            raise Interrupted

    overrides = [f"lora.enabled={lora}", "lora.r=4"]
    whole = run(*overrides, output="whole")
    with pytest.raises(Interrupted):
        run(*overrides, output="cut", report=cut)
    # Step 2 lies in the middle of the first rollout, whose answers the checkpoint holds.
    resumed = run(*overrides, output="cut", resume=True)
    assert resumed["stages"]["stage1"]["steps"] == whole["stages"]["stage1"]["steps"]
    name = "adapter_model.safetensors" if lora == "true" else "model.safetensors"
    a, b = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)
    for column in ("reward/mean", "kl/reference", "loss/value"):
        assert _history(tmp_path / "whole", column) == _history(tmp_path / "cut", column)


def test_with_an_adapter_the_reference_is_the_adapter_of_the_start(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Adapters off would be the bare base, and the divergence of the first rollout not zero."""
    adapter = ["lora.enabled=true", "lora.r=4", "trainer.learning_rate=3e-2"]
    run(*adapter, output="first")
    assert abs(_history(tmp_path / "first", "kl/reference")[-1]) > 0.01
    run(*adapter, output="second", model=tmp_path / "first")
    assert _history(tmp_path / "second", "kl/reference")[0] == pytest.approx(0, abs=1e-5)


def test_the_start_is_put_in_place_and_taken_out_again(tiny_model_folder: Path) -> None:
    vlm = load_vlm(tiny_model_folder, trainable=True)
    pair = Pair("1", "line 1", (), "Which?", "a", None, ("a",))
    objective = PPO.model_validate({"kind": "ppo", "rewards": [{"kind": "exact-match"}]})
    prepared = PreparedPairs(vlm, [pair])
    roller = Roller(objective, vlm, [pair], prepared, lambda p, a: Rewards(None, {}), torch.no_grad)  # type: ignore[arg-type]
    batch = roller.batch([0], [[5, 6, 7]])
    head = value_head(vlm.model)
    with torch.no_grad():
        before = score(vlm.model, head, batch).logps
        start = StartWeights(vlm.model)
        for parameter in vlm.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        after = score(vlm.model, head, batch).logps
        with start.in_place():
            torch.testing.assert_close(score(vlm.model, head, batch).logps, before)
        torch.testing.assert_close(score(vlm.model, head, batch).logps, after)
        assert (after - before).abs().max() > 1e-3


def test_a_rollout_that_moved_too_far_is_dropped(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run("objective.target_kl=1e-9", output="dropped")
    # Without the bound six steps are one and a half rollouts, with it a new one every other step.
    assert len(_history(tmp_path / "dropped", "reward/mean")) == 3
    assert max(_history(tmp_path / "dropped", "kl/rollout_dropped")) == 1


def test_training_stops_where_the_reference_is_too_far(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    record = run("objective.stop_kl=1e-6", "trainer.learning_rate=1e-2")
    assert record["status"] == "finished"
    # The second rollout, the first that can differ from the start, is made for step 5.
    assert record["stages"]["stage1"]["steps"] == 5
    assert _history(tmp_path / "out", "kl/stopped_at")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"trainer.seed={seed}", "trainer.max_steps=2", output=output)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_reward_that_is_not_finite_names_the_sample(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"inf for sample q7 \(.*line 8\)"):
        run(SMALL[0].replace("early", "broken"), "objective.rollout_size=32")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.rewards=[{kind: cidr-d}]", ["rewards.0.kind", "'cidr-d'", "'cider-d'"]),
        ("objective.rewards=[{kind: cider-d, wieght: 2}]", ["rewards.0.wieght", "'weight'"]),
        ("objective.rewards=[{kind: length, words: 0}]", ["rewards.0.words"]),
        ("objective.rewards=[{kind: callable, function: nofunction}]", ["rewards.0.function"]),
        ("objective.rewards=[]", ["objective.rewards"]),
        ("objective.rollout_sise=2", ["objective.rollout_sise", "'rollout_size'"]),
        ("objective.lamda=2", ["objective.lamda", "'lambda'"]),
        ("objective.clip=0", ["objective.clip"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_mend(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("ppo", [override])
    for word in words:
        assert word in str(error.value)
