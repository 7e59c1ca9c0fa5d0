"""The one log-probability operation against plain logits, scipy, and itself in other batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from cwdpo_bench.vlm import (
    VLM,
    Distribution,
    Prompt,
    average_confidence,
    build_batch,
    completion_statistics,
    load_vlm,
    sequence_logps,
    token_statistics,
)

TEXT = "Provide a one-sentence caption for the provided image."


@pytest.fixture(scope="module")
def vlm(tiny_model_folder: Path) -> VLM:
    return load_vlm(tiny_model_folder)


def _images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)) for _ in range(count)
    ]


def _prompts() -> list[Prompt]:
    """One image, two images, none, and prompts of several lengths."""
    a, b, c, d = _images(4)
    return [
        Prompt(TEXT, (a,)),
        Prompt("How many?", (b, c)),
        Prompt("Say something."),
        Prompt("What is there, and where is it, and what colour has it?", (d,)),
    ]


COMPLETIONS = ["a red circle", "two", "a blue square left of a green triangle on white", "x"]


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 30),
    max_block=st.integers(1, 200),
)
def test_statistics_equal_numpy_and_scipy_whatever_the_block(
    seed: int, tokens: int, vocabulary: int, max_block: int
) -> None:
    rng = np.random.default_rng(seed)
    hidden, other = 3 * rng.normal(size=(2, tokens, 4))
    weight, other_weight = 3 * rng.normal(size=(2, vocabulary, 4))
    targets = rng.integers(0, vocabulary, tokens)
    got = token_statistics(
        torch.tensor(hidden),
        lambda h: h @ torch.tensor(weight).T,
        torch.tensor(targets),
        statistics=True,
        other=Distribution(torch.tensor(other), lambda h: h @ torch.tensor(other_weight).T),
        max_block=max_block,
    )
    logits, other_logits = hidden @ weight.T, other @ other_weight.T
    p, q = softmax(logits, axis=1), softmax(other_logits, axis=1)
    expected = {
        "logps": log_softmax(logits, axis=1)[np.arange(tokens), targets],
        "entropy": entropy(p, axis=1),
        "top1_probability": p.max(1),
        "tv": 0.5 * np.abs(p - q).sum(1),
        # Of two distributions that agree to rounding SciPy takes the root of a number below 0.
        "js": np.nan_to_num(jensenshannon(p, q, axis=1)) ** 2,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(got, name).numpy(), values, rtol=2e-4, atol=2e-5)
    assert got.top1_id is not None
    np.testing.assert_array_equal(got.top1_id.numpy(), logits.argmax(1))


def test_blocks_give_the_same_gradient_as_one_piece() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    targets = torch.randint(0, 50, (40,))
    gradients = []
    for max_block in (50 * 40, 50 * 7):
        head.zero_grad()
        hidden = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        token_statistics(hidden, head, targets, max_block=max_block).logps.sum().backward()
        assert head.weight.grad is not None
        assert hidden.grad is not None
        gradients.append((hidden.grad.clone(), head.weight.grad.clone()))
    for one, blocks in zip(*gradients, strict=True):
        torch.testing.assert_close(one, blocks)


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).bfloat16()
    hidden, targets = torch.randn(5, 8).bfloat16(), torch.randint(0, 50, (5,))
    got = token_statistics(hidden, head, targets).logps
    expected = head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_completions_equal_the_plain_logits_of_one_row(vlm: VLM) -> None:
    """Padding on both sides, other rows and missing images change nothing (1e-4 in fp32)."""
    batch = build_batch(vlm.processor, _prompts(), COMPLETIONS)
    with torch.no_grad():
        together = completion_statistics(vlm.model, batch).logps
        for row, (prompt, completion) in enumerate(zip(_prompts(), COMPLETIONS, strict=True)):
            alone = build_batch(vlm.processor, [prompt], [completion])
            logits = vlm.model(**alone.inputs).logits[0].log_softmax(-1)
            length = alone.targets.shape[1]
            expected = logits[-length - 1 : -1].gather(1, alone.targets[0][:, None])[:, 0]
            torch.testing.assert_close(together[row, :length], expected, atol=1e-4, rtol=0)
            assert not together[row, length:].any()


def test_the_end_of_turn_token_is_scored(vlm: VLM) -> None:
    batch = build_batch(vlm.processor, _prompts()[:1], COMPLETIONS[:1])
    assert batch.targets[0, -1].item() == vlm.tokenizer.eos_token_id
    assert batch.mask.all()


def test_average_confidence_is_the_sum_over_the_length(vlm: VLM) -> None:
    batch = build_batch(vlm.processor, _prompts(), COMPLETIONS)
    with torch.no_grad():
        logps = completion_statistics(vlm.model, batch).logps
    lengths = torch.tensor([len(vlm.tokenizer(c)["input_ids"]) + 1 for c in COMPLETIONS])
    torch.testing.assert_close(
        average_confidence(logps, batch.mask) * lengths, sequence_logps(logps)
    )


def test_the_head_is_back_in_place_after_a_forward(vlm: VLM) -> None:
    batch = build_batch(vlm.processor, _prompts()[:1], COMPLETIONS[:1])
    with torch.no_grad():
        before = vlm.model(**batch.inputs).logits
        completion_statistics(vlm.model, batch)
        torch.testing.assert_close(vlm.model(**batch.inputs).logits, before)


def test_a_second_distribution_of_the_same_model_has_no_shift(vlm: VLM) -> None:
    from cwdpo_bench.vlm import completion_hidden, output_head

    batch = build_batch(vlm.processor, _prompts(), COMPLETIONS)
    with torch.no_grad():
        other = Distribution(completion_hidden(vlm.model, batch), output_head(vlm.model))
        scores = completion_statistics(vlm.model, batch, other=other)
    assert scores.tv is not None
    assert scores.js is not None
    assert scores.tv.max() < 1e-5
    assert scores.js.max() < 1e-5
