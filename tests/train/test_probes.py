"""The probe against scores of each answer alone, and the rules that choose its answers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.calibration import ece
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.probe_answers import probe_answers, shuffled
from cwdpo_bench.train.probes import Probe, core_columns
from cwdpo_bench.vlm import VLM, Prompt, generate, load_vlm, score_completions

CHOSEN = ["a red circle.", "two blue squares.", "a large star above a cross.", "one yellow ring."]
REJECTED = ["a blue circle.", None, "a small star above a cross.", "squares two blue."]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    found = []
    for i, (chosen, rejected) in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)).save(path)
        found.append(
            Pair(f"p{i}", f"line {i}", (path,), "What is it?", chosen, rejected, (chosen,))
        )
    found[0] = replace(found[0], paraphrase="it is a circle in red.")
    return found


@pytest.fixture(scope="module")
def vlm(tiny_model_folder: Path) -> VLM:
    return load_vlm(tiny_model_folder)


@pytest.fixture(scope="module")
def train_pairs(pairs: list[Pair]) -> list[Pair]:
    return [replace(pairs[0], id=f"t{i}", chosen=f"a training answer {i}.") for i in range(5)]


@pytest.fixture(scope="module")
def probe(vlm: VLM, pairs: list[Pair], train_pairs: list[Pair]) -> Probe:
    return Probe(vlm, pairs, 3, train_pairs=train_pairs, answer_pairs=3, seed=1)


def _alone(vlm: VLM, prompt: Prompt, text: str) -> np.ndarray:
    """log π of an answer's tokens in a row of its own: the oracle of every probe."""
    (scores,) = score_completions(vlm, [prompt], [text])
    return scores.logps


def test_core_columns_are_those_of_each_answer_alone(
    probe: Probe, vlm: VLM, pairs: list[Pair]
) -> None:
    row = probe.measure(vlm.model)
    opened = [pair.open() for pair in pairs]
    scores = score_completions(vlm, opened, CHOSEN)
    assert row["chosen_logp"] == pytest.approx(np.mean([s.logps.sum() for s in scores]), abs=1e-4)
    means = [s.logps.mean() for s in scores]
    assert row["chosen_mean_logp"] == pytest.approx(np.mean(means), abs=1e-5)
    argmax = [np.log(s.top1_probabilities) for s in scores]
    assert row["argmax_logp"] == pytest.approx(np.mean([a.sum() for a in argmax]), abs=1e-4)
    assert row["argmax_mean_logp"] == pytest.approx(np.mean([a.mean() for a in argmax]), abs=1e-5)
    top1 = np.concatenate([s.top1_probabilities for s in scores])
    correct = np.concatenate([s.top1_correct for s in scores])
    assert row["top1_probability"] == pytest.approx(top1.mean(), abs=1e-5)
    assert row["token_ece"] == pytest.approx(ece(top1.astype(float), correct), abs=1e-4)
    entropies = np.concatenate([s.entropies for s in scores])
    assert row["entropy"] == pytest.approx(entropies.mean(), abs=1e-4)
    assert row["tv"] == pytest.approx(0, abs=1e-5)
    rejected = [
        _alone(vlm, opened[i], text).mean() for i, text in enumerate(REJECTED) if text is not None
    ]
    assert row["rejected_mean_logp"] == pytest.approx(np.mean(rejected), abs=1e-5)


def test_residuals_are_norms_of_the_softmax_minus_the_token(
    probe: Probe, vlm: VLM, pairs: list[Pair]
) -> None:
    core = probe.core(vlm.model)
    assert core.with_rejected.tolist() == [0, 2, 3]
    from cwdpo_bench.vlm import build_batch

    batch = build_batch(vlm.processor, [pairs[2].open()], [CHOSEN[2]])
    with torch.no_grad():
        logits = vlm.model(**batch.inputs).logits[0]
    length = batch.targets.shape[1]
    pi = logits[-(length + 1) : -1].softmax(-1)
    hot = torch.nn.functional.one_hot(batch.targets[0], pi.shape[-1])
    assert core.chosen.residuals[2].item() == pytest.approx((pi - hot).norm().item(), abs=1e-4)


def test_answers_are_those_of_each_answer_alone(
    probe: Probe, vlm: VLM, pairs: list[Pair], train_pairs: list[Pair]
) -> None:
    row = probe.answers(vlm.model)
    texts = probe_answers(pairs, train_pairs, 3, seed=1)
    opened = [pair.open() for pair in pairs]
    for kind in ("paraphrase", "other_meaning", "train_chosen", "held_out_chosen", "shuffled"):
        alone = [
            _alone(vlm, opened[i], found.texts[kind])
            for i, found in enumerate(texts)
            if kind in found.texts
        ]
        assert row[f"{kind}_mean_logp"] == pytest.approx(
            np.mean([a.mean() for a in alone]), abs=1e-4
        )
        assert row[f"{kind}_logp"] == pytest.approx(np.mean([a.sum() for a in alone]), abs=1e-3)
    blank = [
        _alone(vlm, Prompt("What is it?", (Image.new("RGB", (84, 84), (128,) * 3),)), CHOSEN[i])
        for i in range(3)
    ]
    other = [_alone(vlm, opened[i + 1], CHOSEN[i]) for i in range(3)]
    assert row["blank_image_mean_logp"] == pytest.approx(
        np.mean([a.mean() for a in blank]), abs=1e-4
    )
    assert row["other_image_mean_logp"] == pytest.approx(
        np.mean([a.mean() for a in other]), abs=1e-4
    )
    own = np.mean([_alone(vlm, opened[i], CHOSEN[i]).mean() for i in range(3)])
    assert row["image_gain"] == pytest.approx(own - row["blank_image_mean_logp"], abs=1e-4)


def test_the_greedy_answer_is_what_generation_gives_and_leads_at_every_token(
    probe: Probe, vlm: VLM, pairs: list[Pair]
) -> None:
    kinds, batch = probe.branches(vlm.model, 0)
    assert kinds == ["chosen", "rejected", "greedy"]
    ids = batch.targets[2][batch.mask[2]].tolist()
    longest = max(len(vlm.tokenizer(text)["input_ids"]) + 1 for text in CHOSEN)
    (answer,) = generate(vlm, [pairs[0].open()], max_new_tokens=longest)
    assert vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer.text
    # y* is its own argmax: under the policy of now no token is likelier.
    row = probe.answers(vlm.model)
    assert row["greedy_mean_logp"] == pytest.approx(row["initial_greedy_mean_logp"], abs=1e-5)
    assert row["greedy_mean_logp"] > row["shuffled_mean_logp"]


def test_measuring_leaves_the_model_and_its_mode(probe: Probe, vlm: VLM) -> None:
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    vlm.model.train()
    probe.measure(vlm.model)
    probe.answers(vlm.model)
    assert vlm.model.training
    vlm.model.eval()
    after = vlm.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_cooling_weights_histogram_counts_every_pair(probe: Probe, vlm: VLM) -> None:
    row = core_columns(probe.core(vlm.model), lambda c: torch.linspace(0, 1, len(c)))
    bins = [row[f"cooling_weight_bin_{k}"] for k in range(10)]
    assert sum(bins) == pytest.approx(1)
    assert bins[0] == bins[5] == bins[9] == pytest.approx(1 / 3)
    assert row["cooling_weight"] == pytest.approx(0.5)


def test_the_same_seed_draws_the_same_probes(pairs: list[Pair], train_pairs: list[Pair]) -> None:
    def texts(seed: int) -> list[dict[str, str]]:
        return [found.texts for found in probe_answers(pairs, train_pairs, 4, seed)]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


def test_probes_that_a_pair_cannot_have_are_absent(pairs: list[Pair]) -> None:
    bare = replace(pairs[1], images=(), chosen="yes")
    (found,) = probe_answers([bare], [], 1, seed=0)
    assert found.texts == {}
    assert found.prompts == {}
    (first, second) = probe_answers(pairs[:2], [], 2, seed=0)
    assert first.texts["paraphrase"] == "it is a circle in red."
    assert "paraphrase" not in second.texts
    assert first.texts["held_out_chosen"] == first.texts["other_meaning"] == CHOSEN[1]


def test_kinds_that_no_pair_has_are_said(vlm: VLM, pairs: list[Pair], probe: Probe) -> None:
    assert probe.left_out == []
    bare = Probe(vlm, pairs[1:], 3, answer_pairs=2)
    assert bare.left_out == ["paraphrase", "train_chosen"]
    assert "paraphrase_mean_logp" not in bare.answers(vlm.model)


def test_another_meaning_keeps_prompt_and_length_first_and_shares_few_words(
    pairs: list[Pair],
) -> None:
    pair = replace(pairs[0], chosen="a red circle.")
    others = [
        replace(pairs[1], chosen="a green square.", prompt="Else?"),
        replace(pairs[1], chosen="a red square."),
        replace(pairs[1], chosen="two green squares."),
        replace(pairs[1], chosen="cross."),
    ]
    (found, *_) = probe_answers([pair, *others], [], 1, seed=0)
    assert found.texts["other_meaning"] == "two green squares."
    own = replace(pair, other_meaning="a blue star.")
    (found, *_) = probe_answers([own, *others], [], 1, seed=0)
    assert found.texts["other_meaning"] == "a blue star."


def test_a_shuffle_keeps_the_words_and_changes_their_order() -> None:
    rng = random.Random(0)
    for _ in range(20):
        changed = shuffled("a red circle.", rng)
        assert changed is not None
        assert changed != "a red circle."
        assert sorted(changed.removesuffix(".").split()) == ["a", "circle", "red"]
        assert changed.endswith(".")
    assert shuffled("yes.", rng) is None
    assert shuffled("no no", rng) is None
