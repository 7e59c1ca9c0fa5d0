"""The second tiny VLM is a real LLaVA of the first one's size and words, pre-trained alike."""

import copy
import dataclasses

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cwdpo_bench.demo.pretrain import LOG_NAME, Plan, build_corpus, main, pretrain, save
from cwdpo_bench.demo.sight import learn_to_see
from cwdpo_bench.demo.tiny import build_tiny_vlm
from cwdpo_bench.demo.tiny_llava import build_tiny_llava
from cwdpo_bench.evaluate.coco import caption_prompt
from cwdpo_bench.vlm import generate, load_vlm
from cwdpo_bench.vlm.batch import Prompt, encode_prompts


@pytest.fixture(scope="module")
def llava():
    return build_tiny_llava(0)


def test_it_has_the_size_the_words_and_the_prompts_of_the_first(llava):
    model, processor = llava
    qwen, qwens = build_tiny_vlm(0)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, qwen)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert model.config.model_type == "llava"
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    prompt = Prompt(caption_prompt(), (Image.new("RGB", (84, 84)),))
    ids, theirs = (encode_prompts(p, [prompt])["input_ids"] for p in (processor, qwens))
    assert torch.equal(ids, theirs)


def test_what_a_patch_shows_does_not_reach_the_answer_through_another_ones_place(llava):
    """Nine patches, nine cells: a changed cell changes its own feature most."""
    model, processor = llava
    plain, changed = (Image.new("RGB", (84, 84), "gray") for _ in range(2))
    changed.paste("red", (28, 56, 56, 84))
    pixels = processor.image_processor(images=[plain, changed], return_tensors="pt")
    with torch.no_grad():
        before, after = model.eval().get_image_features(**pixels, return_dict=True).pooler_output
    assert before.shape == (9, 128)
    assert (after - before).norm(dim=-1).argmax() == 7


def test_one_step_of_its_pre_training_moves_every_part_and_is_saved(tmp_path):
    plan = dataclasses.replace(Plan(), scenes=20, sight_steps=1, steps=1)
    log = []
    model, processor = pretrain(plan, log, "llava")
    fresh = dict(build_tiny_llava(0)[0].named_parameters())
    still = {name for name, p in model.named_parameters() if torch.equal(p, fresh[name])}
    # LLaVA reads the tower's last layer but one; a norm's weights start at 1, too large to show it.
    assert all(".encoder.layers.3." in name or "norm" in name for name in still)
    assert "step" in log[-1]
    save(model, processor, log, tmp_path)
    assert (tmp_path / LOG_NAME).is_file()
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.model_type == "llava"
    assert AutoProcessor.from_pretrained(tmp_path).image_token_id == model.config.image_token_id
    prompt = Prompt("a", (Image.new("RGB", (84, 84)),))
    answer = generate(load_vlm(str(tmp_path)), [prompt], max_new_tokens=2, options=["AB"])[0]
    assert answer.option_logps.shape == (2,)


def test_its_tower_learns_what_lies_in_a_cell(llava):
    model, processor = copy.deepcopy(llava[0]), llava[1]
    corpus = build_corpus(Plan(scenes=2), processor)
    seen = learn_to_see(model, corpus.images, corpus.scenes, steps=150, learning_rate=2e-3, seed=0)
    assert seen == 1


def test_another_base_is_never_written_over_the_bundled_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain", "--architecture", "llava"])
    with pytest.raises(SystemExit):
        main()
    assert "--output FOLDER" in capsys.readouterr().err
