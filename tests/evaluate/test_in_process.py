import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate import in_process
from cwdpo_bench.evaluate.coco import load_coco
from cwdpo_bench.evaluate.engine import Failure
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.mmbench import load_mmbench
from cwdpo_bench.evaluate.mmmu import load_mmmu
from cwdpo_bench.vlm import load_vlm


@pytest.fixture(scope="module")
def vlm(tiny_model_folder):
    return load_vlm(tiny_model_folder)


def answer_captions(vlm, samples, root, *, batch_size, max_new_tokens, reference=None):
    engine = InProcessEngine(vlm, root, batch_size, reference)
    return _in_order(engine.answer_captions(samples, max_new_tokens=max_new_tokens), samples)


def answer_choices(vlm, samples, root, *, batch_size, max_new_tokens):
    engine = InProcessEngine(vlm, root, batch_size)
    return _in_order(engine.answer_choices(samples, max_new_tokens=max_new_tokens), samples)


def _in_order(replies, samples):
    answers = sorted(replies, key=lambda reply: reply[0])
    assert [place for place, _ in answers] == list(range(len(samples)))
    return [answer for _, answer in answers]


def test_a_caption_comes_with_statistics_of_every_reference_token(vlm, data_root):
    samples = load_coco(data_root)

    answers = answer_captions(vlm, samples, data_root, max_new_tokens=3, batch_size=2)

    for sample, answer in zip(samples, answers, strict=True):
        tokens = vlm.tokenizer(sample.references[0], add_special_tokens=False)["input_ids"]
        scores = answer.reference_scores
        assert len(scores.logps) == len(tokens) + 1  # the end of the turn counts
        assert (scores.entropies <= math.log(len(vlm.tokenizer)) + 1e-4).all()
        assert scores.tv is None


def test_a_model_does_not_shift_from_itself(vlm, data_root):
    samples = load_coco(data_root)

    answers = answer_captions(
        vlm, samples, data_root, max_new_tokens=1, batch_size=4, reference=vlm
    )

    assert all(np.abs(a.reference_scores.tv).max() < 1e-5 for a in answers)


def test_every_option_gets_a_log_probability_and_an_open_question_none(vlm, data_root):
    samples = load_mmmu(data_root)

    answers = answer_choices(vlm, samples, data_root, max_new_tokens=2, batch_size=4)

    lengths = [
        None if a.option_log_probabilities is None else len(a.option_log_probabilities)
        for a in answers
    ]
    assert lengths == [3, 2, None, 2]


def test_replies_come_before_all_images_are_opened(vlm, data_root, monkeypatch):
    opened = []
    plain = in_process.open_images
    monkeypatch.setattr(in_process, "CHUNK_BATCHES", 1)
    monkeypatch.setattr(
        in_process, "open_images", lambda s, root: opened.append(s.id) or plain(s, root)
    )
    samples = load_mmbench(data_root)

    replies = InProcessEngine(vlm, data_root, 2).answer_choices(samples, max_new_tokens=1)

    assert next(replies)[0] in (0, 1)
    # One batch is answered, the next one is got ready.
    assert opened == [sample.id for sample in samples[: len(opened)]]
    assert len(opened) <= 4


def test_the_fingerprint_follows_the_weights_and_the_reference(tiny_model_folder, data_root):
    one, other = load_vlm(tiny_model_folder), load_vlm(tiny_model_folder)

    def prints():
        engines = [InProcessEngine(vlm, data_root, 1) for vlm in (one, other)]
        return [engine.fingerprint() for engine in engines]

    same = prints()
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    assert same[0] == same[1] == prints()[0] != prints()[1]
    assert InProcessEngine(one, data_root, 1, reference=one).fingerprint() != same[0]


def test_a_real_photograph_is_captioned(vlm, data_root, tmp_path):
    Image.fromarray(load_sample_images().images[0]).save(tmp_path / "china.jpg")
    sample = replace(load_coco(data_root)[0], image=Path("china.jpg"))

    (answer,) = answer_captions(vlm, [sample], tmp_path, max_new_tokens=4, batch_size=1)

    assert isinstance(answer.text, str)
    assert np.isfinite(answer.reference_scores.logps).all()


def test_too_large_a_batch_says_to_make_it_smaller(vlm, data_root, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(in_process, "answer_batch", full)

    with pytest.raises(UserError, match="too small for a batch of 64; make the batch size smaller"):
        answer_choices(vlm, load_mmbench(data_root), data_root, max_new_tokens=1, batch_size=64)


def test_a_batch_size_left_to_the_engine_is_halved_until_it_fits(
    vlm, data_root, monkeypatch, capsys
):
    samples = load_mmbench(data_root)
    plain, sizes = in_process.answer_batch, []

    def small(vlm, prompts, inputs, **settings):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return plain(vlm, prompts, inputs, **settings)

    expected = answer_choices(vlm, samples, data_root, max_new_tokens=2, batch_size=2)
    monkeypatch.setattr(in_process, "answer_batch", small)
    engine = InProcessEngine(vlm, data_root, None)

    answers = _in_order(engine.answer_choices(samples, max_new_tokens=2), samples)

    assert [a.text for a in answers] == [a.text for a in expected]
    for a, b in zip(answers, expected, strict=True):
        np.testing.assert_allclose(
            a.option_log_probabilities, b.option_log_probabilities, atol=1e-4
        )
    assert sizes[0] == 5
    assert engine.provenance["batch_size"] == 1
    assert engine.chunk_size == in_process.AUTO_ROWS * in_process.CHUNK_BATCHES
    assert "batch size auto: a batch of 5 is too much" in capsys.readouterr().err


def test_a_sample_that_alone_is_too_much_is_told(vlm, data_root, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(in_process, "answer_batch", full)
    engine = InProcessEngine(vlm, data_root, None)

    with pytest.raises(UserError, match="too small for a batch of 1; limit the images' pixels"):
        list(engine.answer_choices(load_mmbench(data_root), max_new_tokens=1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_gives_the_same_replies(
    tiny_model_folder, data_root, monkeypatch, tmp_path, backend
):
    """Traced as `torch.compile` traces, and run as it is traced and as the compiler makes it."""
    if backend == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler (g++, or what CXX names)")
    # Whatever was compiled before is not found here.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    plain = torch.nn.Module.compile
    asked = []

    def compile(module, **settings):
        asked.append((type(module).__name__, settings))
        plain(module, **({} if backend == "inductor" else {"backend": backend}), **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    torch.compiler.reset()
    samples = load_coco(data_root)
    settings = {"max_new_tokens": 3}
    ours, compiled = (
        InProcessEngine(load_vlm(tiny_model_folder), data_root, 2, compiled=compiled)
        for compiled in (False, True)
    )

    replies = [
        _in_order(engine.answer_captions(samples, **settings), samples)
        for engine in (ours, compiled)
    ]

    assert asked == [("Qwen2_5_VLTextModel", {"dynamic": True})]
    if backend == "inductor":
        assert list(tmp_path.rglob("*.so"))
    assert ours.fingerprint() != compiled.fingerprint()
    assert (ours.provenance["compiled"], compiled.provenance["compiled"]) == (False, True)
    for a, b in zip(*replies, strict=True):
        assert a.text == b.text
        np.testing.assert_allclose(a.reference_scores.logps, b.reference_scores.logps, atol=1e-4)


def test_a_compiler_that_fails_is_told(tiny_model_folder, data_root, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nat all")

    plain = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **more: plain(module, backend=fail, **more)
    )
    engine = InProcessEngine(load_vlm(tiny_model_folder), data_root, 2, compiled=True)

    with pytest.raises(UserError, match=r"--compile: torch\.compile fails here .*leave it out"):
        list(engine.answer_captions(load_coco(data_root), max_new_tokens=3))


def test_a_model_with_nan_weights_is_refused_with_model_and_sample(tiny_model_folder, data_root):
    broken = load_vlm(tiny_model_folder)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.fill_(float("nan"))

    with pytest.raises(UserError, match=r"tiny-vlm.*sample '101' is not a finite number"):
        answer_captions(broken, load_coco(data_root), data_root, max_new_tokens=1, batch_size=4)
    with pytest.raises(UserError, match=r"tiny-vlm.*sample '9-0' is not a finite number"):
        answer_choices(broken, load_mmbench(data_root), data_root, max_new_tokens=1, batch_size=4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_prompt_that_is_longer_than_the_model_reads_fails_alone(vlm, data_root, batch_size):
    samples = load_coco(data_root)
    before = answer_captions(vlm, samples, data_root, max_new_tokens=2, batch_size=batch_size)
    long = replace(samples[1], prompt="red " * 2000)

    answers = answer_captions(
        vlm, [samples[0], long, samples[2]], data_root, max_new_tokens=2, batch_size=batch_size
    )

    room = vlm.model.config.get_text_config().max_position_embeddings
    _assert_failed(
        answers[1], rf"sample 102: the prompt is 20\d\d tokens long.*the model reads {room}"
    )
    assert [answers[0].text, answers[2].text] == [before[0].text, before[2].text]


def test_an_option_or_a_reference_that_does_not_fit_behind_the_prompt_fails_alone(vlm, data_root):
    long, room = "red " * 1100, vlm.context_length
    question, other, *_ = load_mmbench(data_root)
    captions = load_coco(data_root)

    asked = answer_choices(
        vlm,
        [replace(question, option_words=("a", long, "b")), other],
        data_root,
        max_new_tokens=2,
        batch_size=2,
    )
    described = answer_captions(
        vlm,
        [captions[0], replace(captions[1], references=(long,))],
        data_root,
        max_new_tokens=2,
        batch_size=2,
    )

    told = rf"the prompt is \d+ tokens long, images included, and its %s 1\d\d\d; .* reads {room}"
    _assert_failed(asked[0], f"sample 7-0: {told % 'option'}")
    _assert_failed(described[1], f"sample 102: {told % 'first reference'}")
    assert not isinstance(asked[1], Failure)
    assert not isinstance(described[0], Failure)


def _remove(path):
    path.unlink()


def _empty(path):
    path.write_bytes(b"")


def _cut_short(path):
    Image.effect_noise((60, 60), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:600])


def _bomb(path):
    """A few kilobytes that unfold to 81 million pixels."""
    Image.new("1", (9000, 9000)).save(path, "PNG")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove, "does not exist"),
        (_empty, "is broken"),
        (_cut_short, "is broken"),
        (_bomb, "9000x9000 pixels, more than the limit"),
    ],
)
def test_a_bad_image_names_sample_and_file(vlm, data_root, spoil, message):
    samples = load_coco(data_root)
    spoil(data_root / samples[1].image)

    answers = answer_captions(vlm, samples, data_root, max_new_tokens=1, batch_size=4)

    _assert_failed(answers[1], rf"sample 102: image .*000000000002\.jpg.*{message}")
    assert [isinstance(answer, Failure) for answer in answers] == [False, True, False]


def _assert_failed(answer, pattern):
    assert isinstance(answer, Failure)
    assert re.search(pattern, answer.reason)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd"])
def test_an_image_path_that_leaves_the_root_is_refused(vlm, data_root, path):
    sample = replace(load_coco(data_root)[0], image=Path(path))

    (answer,) = answer_captions(vlm, [sample], data_root, max_new_tokens=1, batch_size=1)

    _assert_failed(answer, r"sample 101: image path .* leaves the data folder")


def test_a_link_out_of_the_root_is_refused(vlm, data_root, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    (data_root / "link.png").symlink_to(outside)
    sample = replace(load_coco(data_root)[0], image=Path("link.png"))

    (answer,) = answer_captions(vlm, [sample], data_root, max_new_tokens=1, batch_size=1)

    _assert_failed(answer, "leaves the data folder")


def test_broken_base64_names_the_sample(vlm, data_root):
    sample = replace(load_mmbench(data_root)[0], images=("not base64!",))

    (answer,) = answer_choices(vlm, [sample], data_root, max_new_tokens=1, batch_size=1)

    _assert_failed(answer, "sample 7-0: the image is not base64")


def test_drawn_captions_are_an_images_own_whatever_its_batch(vlm, data_root):
    samples = load_coco(data_root)

    def drawn(samples, batch_size):
        engine = InProcessEngine(vlm, data_root, batch_size, draws=3)
        replies = _in_order(engine.answer_captions(samples, max_new_tokens=6), samples)
        return [reply.drawn for reply in replies]

    torch.manual_seed(7)
    before = torch.get_rng_state()
    expected = drawn(samples, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert {len(captions) for captions in expected} == {3}
    assert any(len(set(captions)) > 1 for captions in expected)
    assert drawn(samples[::-1], 1) == expected[::-1]
