"""Every family on the one log-probability operation: padding changes nothing, nor does packing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.doctor import examine
from cwdpo_bench.vlm import (
    VLM,
    Batch,
    Prompt,
    append_completions,
    batch_completions,
    completion_statistics,
    encode_prompt,
    encode_prompts,
    generate,
    load_vlm,
    packing_refusal,
    sequence_logps,
)
from cwdpo_bench.vlm.batch import completion_ids
from cwdpo_bench.vlm.family import family_of
from cwdpo_bench.vlm.packing import PACKED_FAMILIES

PACKED = {"qwen2_vl", "qwen3_vl"}


def _picture(seed: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (84, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PROMPTS = [
    Prompt("What is there?", (_picture(0, 84),)),
    Prompt("How many are there, and where is the red one?", (_picture(1, 140),)),
]
TEXTS = ["a red circle", "two blue squares on white", "a cross", "three"]


@pytest.fixture(scope="module")
def vlm(family_folder: Path) -> VLM:
    loaded = load_vlm(family_folder)
    loaded.model.eval()
    return loaded


def _ids(vlm: VLM, texts: list[str]) -> list[list[int]]:
    return [completion_ids(vlm.tokenizer, text) for text in texts]


def _plain(vlm: VLM, prompts: list[Prompt], texts: list[str]) -> Batch:
    return append_completions(encode_prompts(vlm.processor, prompts), _ids(vlm, texts))


def test_a_row_is_scored_as_if_alone(vlm: VLM) -> None:
    prompts = PROMPTS + PROMPTS
    with torch.no_grad():
        together = completion_statistics(vlm.model, _plain(vlm, prompts, TEXTS)).logps
        for row, (prompt, text) in enumerate(zip(prompts, TEXTS, strict=True)):
            alone = completion_statistics(vlm.model, _plain(vlm, [prompt], [text])).logps[0]
            torch.testing.assert_close(
                together[row, : len(alone)], alone, atol=1e-4, rtol=0, msg=text
            )
    assert len({round(value, 3) for value in sequence_logps(together).tolist()}) == 4


def test_the_picture_is_seen(vlm: VLM) -> None:
    """Another picture, another answer: image tokens are where the model looks for them."""
    other = Prompt(PROMPTS[0].text, (_picture(9, 84),))
    with torch.no_grad():
        one, two = (
            sequence_logps(completion_statistics(vlm.model, _plain(vlm, [p], ["a cross"])).logps)
            for p in (PROMPTS[0], other)
        )
    assert abs(float(one - two)) > 1e-4


def test_greedy_answers_do_not_depend_on_the_batch(vlm: VLM) -> None:
    together = [g.text for g in generate(vlm, PROMPTS, max_new_tokens=6, batch_size=2)]
    alone = [g.text for p in PROMPTS for g in generate(vlm, [p], max_new_tokens=6, batch_size=1)]
    assert together == alone


def test_packed_families_equal_plain_rows_in_logp_and_gradient(vlm: VLM) -> None:
    if vlm.model.config.model_type not in PACKED:
        assert "is not tested" in (packing_refusal(vlm.model) or "")
        return
    found = []
    encoded = [encode_prompt(vlm.processor, prompt) for prompt in PROMPTS]
    packed = batch_completions(vlm, encoded, _ids(vlm, TEXTS))
    assert packed.segments is not None
    for batch in (_plain(vlm, PROMPTS + PROMPTS, TEXTS), packed):
        vlm.model.zero_grad()
        logps = sequence_logps(completion_statistics(vlm.model, batch).logps)
        (logps[:2].sum() - 0.5 * logps[2:].sum()).backward()
        norms = {
            name: parameter.grad.norm()
            for name, parameter in vlm.model.named_parameters()
            if parameter.grad is not None
        }
        found.append((logps.detach(), norms))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, norm in found[0][1].items():
        torch.testing.assert_close(norm, found[1][1][name], atol=1e-4, rtol=1e-4, msg=name)


def _documented() -> dict[str, tuple[str, str]]:
    """The table of docs/TRAINING.md: model type → path, and why not packed."""
    text = (Path(__file__).parents[2] / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (packed|plain) \| ([^|]*)\|$", text, re.M)
    return {model_type: (path, why.strip()) for model_type, path, why in rows}


def _assert_documented(folder: Path) -> None:
    family = family_of(str(folder))
    path, why = _documented()[family.model_type]
    assert (path == "packed") == (family.refusal is None)
    assert family.refusal == packing_refusal(load_vlm(folder).model)
    if family.refusal is not None:
        assert why.split(";")[0] in family.refusal
    check = next(c for c in examine(None, str(folder)) if c.name == "model")
    assert (check.state, check.found.split(",")[0]) == ("ok", f"{family.model_type}: {path}")


def test_the_path_of_a_family_is_the_documented_one(family_folder: Path) -> None:
    _assert_documented(family_folder)


def test_so_are_those_of_the_two_that_every_test_uses(
    tiny_model_folder: Path, tiny_plain_folder: Path
) -> None:
    _assert_documented(tiny_model_folder)
    _assert_documented(tiny_plain_folder)
    packed = {name for name, (path, _) in _documented().items() if path == "packed"}
    assert packed == PACKED_FAMILIES


def test_a_folder_without_a_family_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no family to tell"):
        family_of(str(tmp_path))
    check = next(c for c in examine(None, str(tmp_path)) if c.name == "model")
    assert check.state == "broken"
