"""Packed rows against rows of their own: the same log-probabilities, the same gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.vlm import (
    VLM,
    Batch,
    Prompt,
    append_completions,
    batch_completions,
    build_branches,
    completion_statistics,
    encode_prompt,
    encode_prompts,
    load_vlm,
    merge_prompts,
    packing_refusal,
    sequence_logps,
)
from cwdpo_bench.vlm.batch import completion_ids
from cwdpo_bench.vlm.packing import branch_mask


@pytest.fixture(scope="module")
def packed_vlm(tiny_model_folder: Path) -> VLM:
    return load_vlm(tiny_model_folder)


@pytest.fixture(scope="module")
def plain_vlm(tiny_plain_folder: Path) -> VLM:
    return load_vlm(tiny_plain_folder)


def _image(seed: int, width: int = 84, height: int = 84) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SHORT = Prompt("How many?", (_image(0),))
LONG = Prompt("What is there, and where is it, and what colour has it?", (_image(1),))
TWO_IMAGES = Prompt("Which one is red?", (_image(2), _image(3, 168, 84)))
NO_IMAGE = Prompt("Say something.")
PROMPTS = [SHORT, LONG, TWO_IMAGES, NO_IMAGE]
CHOSEN = ["a red circle", "two", "a blue square left of a green triangle on white", "x"]
REJECTED = ["a green circle on black", "three red squares", "a", "a blue square"]


def _ids(vlm: VLM, texts: list[str]) -> list[list[int]]:
    return [completion_ids(vlm.tokenizer, text) for text in texts]


def _plain(vlm: VLM, prompts: list[Prompt], texts: list[str]) -> Batch:
    return append_completions(encode_prompts(vlm.processor, prompts), _ids(vlm, texts))


def _packed(vlm: VLM, prompts: list[Prompt], texts: list[str]) -> Batch:
    encoded = [encode_prompt(vlm.processor, prompt) for prompt in prompts]
    return batch_completions(vlm, encoded, _ids(vlm, texts))


def _gradient_norms(vlm: VLM, batch: Batch) -> dict[str, torch.Tensor]:
    """Norm of every parameter's gradient of a loss that weighs chosen and rejected differently."""
    vlm.model.zero_grad()
    sums = sequence_logps(completion_statistics(vlm.model, batch).logps)
    chosen, rejected = sums.chunk(2)
    torch.nn.functional.softplus(0.3 * (rejected - chosen)).mean().backward()
    norms = {n: p.grad.norm() for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    return norms


@pytest.mark.parametrize(
    ("prompts", "chosen", "rejected"),
    [
        pytest.param(PROMPTS, CHOSEN, REJECTED, id="padding left and right"),
        pytest.param([SHORT, LONG], ["two", "two"], ["one", "one"], id="padding left"),
        pytest.param([SHORT, SHORT], CHOSEN[1:3], REJECTED[1:3], id="padding right"),
        pytest.param([LONG], ["two"], ["three red squares"], id="no padding"),
        pytest.param([NO_IMAGE, NO_IMAGE], CHOSEN[:2], REJECTED[:2], id="no image at all"),
    ],
)
def test_packed_pairs_equal_plain_rows_in_logp_and_gradient(
    packed_vlm: VLM, prompts: list[Prompt], chosen: list[str], rejected: list[str]
) -> None:
    packed = _packed(packed_vlm, prompts, chosen + rejected)
    plain = _plain(packed_vlm, prompts, chosen + rejected)
    assert packed.segments is not None
    assert packed.inputs["input_ids"].shape[0] == len(prompts)
    assert plain.inputs["input_ids"].shape[0] == 2 * len(prompts)
    assert torch.equal(packed.targets, plain.targets)
    with torch.no_grad():
        torch.testing.assert_close(
            completion_statistics(packed_vlm.model, packed).logps,
            completion_statistics(packed_vlm.model, plain).logps,
            atol=1e-4,
            rtol=0,
        )
    norms, expected = (_gradient_norms(packed_vlm, batch) for batch in (packed, plain))
    assert norms.keys() == expected.keys()
    for name, norm in norms.items():
        torch.testing.assert_close(norm, expected[name], atol=1e-4, rtol=1e-4)


def test_any_number_of_branches_equals_one_row_each(packed_vlm: VLM) -> None:
    """Options of a question: as many branches as it has, none sees another."""
    options = [["A", "B", "C", "D"], ["yes"], ["a red circle", "a blue square left of it"]]
    prompts = [SHORT, NO_IMAGE, TWO_IMAGES]
    batch = build_branches(packed_vlm, prompts, options)
    assert batch.inputs["input_ids"].shape[0] == 3
    assert batch.targets.shape[0] == 7
    with torch.no_grad():
        logps = completion_statistics(packed_vlm.model, batch).logps
        row = 0
        for prompt, texts in zip(prompts, options, strict=True):
            for text in texts:
                alone = _plain(packed_vlm, [prompt], [text])
                expected = completion_statistics(packed_vlm.model, alone).logps[0]
                got = logps[row, : len(expected)]
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
                row += 1


def test_positions_of_every_branch_are_those_of_its_own_row(packed_vlm: VLM) -> None:
    batch = _packed(packed_vlm, PROMPTS, CHOSEN + REJECTED)
    assert batch.segments is not None
    for n, text in enumerate(CHOSEN + REJECTED):
        row, branch = n % 4, 2 + n // 4
        alone = _plain(packed_vlm, [PROMPTS[row]], [text]).inputs
        expected, _ = packed_vlm.model.model.get_rope_index(
            alone["input_ids"],
            mm_token_type_ids=alone["mm_token_type_ids"],
            image_grid_thw=alone.get("image_grid_thw"),
        )
        keep = (batch.segments[row] == 1) | (batch.segments[row] == branch)
        assert torch.equal(batch.inputs["position_ids"][:, row, keep], expected[:, 0])
        assert torch.equal(batch.inputs["input_ids"][row, keep], alone["input_ids"][0])


def test_a_branch_sees_the_prompt_and_itself_alone() -> None:
    segments = torch.tensor([[0, 1, 1, 2, 2, 3, 0]])
    visible = branch_mask(segments, torch.float32)[0, 0] == 0
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 1, 0, 0],
            [0, 1, 1, 0, 0, 1, 0],
            [0, 1, 1, 0, 0, 0, 1],  # padding: nothing reads it
        ]
    )
    assert torch.equal(visible, expected.bool())


def test_the_other_branch_changes_nothing(packed_vlm: VLM) -> None:
    """Equality to 1e-4 could hide a leak between branches of an untrained model: this cannot."""
    with torch.no_grad():
        one, other = (
            completion_statistics(
                packed_vlm.model, _packed(packed_vlm, [SHORT], ["a red circle", text])
            ).logps[0]
            for text in ("a blue square", "x y z")
        )
    torch.testing.assert_close(one[:4], other[:4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["packed_vlm", "plain_vlm"])
def test_merged_prompts_are_the_processors_own_batch(
    family: str, request: pytest.FixtureRequest
) -> None:
    vlm: VLM = request.getfixturevalue(family)
    for prompts in (PROMPTS, [SHORT, LONG], [SHORT, TWO_IMAGES], [NO_IMAGE, NO_IMAGE]):
        merged = merge_prompts(
            [encode_prompt(vlm.processor, prompt) for prompt in prompts], vlm.pad_token_id
        )
        expected = encode_prompts(vlm.processor, prompts)
        assert merged.keys() == expected.keys()
        for name, values in merged.items():
            torch.testing.assert_close(values, expected[name], atol=0, rtol=0, msg=name)


def test_the_plain_family_scores_each_row_as_if_alone(plain_vlm: VLM) -> None:
    prompts = [SHORT, LONG, TWO_IMAGES]
    together = _packed(plain_vlm, prompts, CHOSEN[:3] + REJECTED[:3])
    assert together.segments is None
    with torch.no_grad():
        logps = completion_statistics(plain_vlm.model, together).logps
        for n, text in enumerate(CHOSEN[:3] + REJECTED[:3]):
            alone = _plain(plain_vlm, [prompts[n % 3]], [text])
            expected = completion_statistics(plain_vlm.model, alone).logps[0]
            got = logps[n, : len(expected)]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_branches_of_a_plain_family_become_rows(plain_vlm: VLM) -> None:
    batch = build_branches(plain_vlm, [SHORT, TWO_IMAGES], [["A", "B", "C"], ["yes"]])
    assert batch.inputs["input_ids"].shape[0] == 4
    with torch.no_grad():
        logps = completion_statistics(plain_vlm.model, batch).logps
        for n, (prompt, text) in enumerate(
            [(SHORT, "A"), (SHORT, "B"), (SHORT, "C"), (TWO_IMAGES, "yes")]
        ):
            alone = _plain(plain_vlm, [prompt], [text])
            expected = completion_statistics(plain_vlm.model, alone).logps[0]
            torch.testing.assert_close(logps[n, : len(expected)], expected, atol=1e-4, rtol=0)


def test_why_a_model_is_not_packed_is_said(packed_vlm: VLM, plain_vlm: VLM) -> None:
    assert packing_refusal(packed_vlm.model) is None
    assert "'idefics3' is not tested" in str(packing_refusal(plain_vlm.model))
    text = packed_vlm.model.config.text_config
    attention, layers = text._attn_implementation, text.layer_types
    try:
        text._attn_implementation = "flash_attention_2"
        assert "'flash_attention_2' takes no mask" in str(packing_refusal(packed_vlm.model))
        text._attn_implementation = attention
        text.layer_types = ["sliding_attention", *layers[1:]]
        assert "sliding window" in str(packing_refusal(packed_vlm.model))
    finally:
        text._attn_implementation, text.layer_types = attention, layers


def test_the_last_layer_works_on_the_answers_alone(packed_vlm: VLM) -> None:
    """Only keys and values of the prompt are computed there: the answers' columns pass its MLP."""
    batch = _packed(packed_vlm, [LONG], ["a red circle", "two"])
    layers = packed_vlm.model.get_decoder().layers
    seen: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _module, _given, out: seen.append(out.shape[1]))
        for layer in layers
    ]
    completion_statistics(packed_vlm.model, batch)
    for hook in hooks:
        hook.remove()
    width = batch.inputs["input_ids"].shape[1]
    assert batch.tail is not None
    assert seen == [*[width] * (len(layers) - 1), len(batch.tail)]
    # And the layer is itself again: a forward without us returns every position.
    assert "forward" not in vars(layers[-1])
    hidden = packed_vlm.model(**batch.inputs, use_cache=False).logits
    assert hidden.shape[1] == width


def test_gradient_checkpointing_keeps_the_last_layer_whole(packed_vlm: VLM) -> None:
    batch = _packed(packed_vlm, [LONG, SHORT], ["a red circle", "two", "a", "three"])
    model = packed_vlm.model
    expected = completion_statistics(model, batch).logps
    model.gradient_checkpointing_enable()
    model.train()
    try:
        torch.testing.assert_close(completion_statistics(model, batch).logps, expected)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
