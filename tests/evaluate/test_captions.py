"""Captions against pycocoevalcap itself, and captions that break its wrappers."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from cwdpo_bench.evaluate import captions
from cwdpo_bench.evaluate.captions import (
    begin_scores,
    caption_rows,
    score_candidates,
    score_captions,
    tokenize,
)
from cwdpo_bench.evaluate.java import java_on_path
from cwdpo_bench.evaluate.meteor import kept_meteor
from cwdpo_bench.evaluate.metrics import METRICS, metric_names_for
from cwdpo_bench.evaluate.samples import CaptionSample


@pytest.fixture(scope="module", autouse=True)
def one_meteor() -> Iterator[None]:
    """Its start takes longer than everything else in this file."""
    with kept_meteor():
        yield


NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")

NASTY = [
    "",
    " ",
    "dog",
    "...",
    "!?",
    "a man\nwith a\r\ndog",
    "a\ttab and a\x0bvertical one",
    "line\u2028separator \u2029 and \x85 next",
    "a ||| b |||",
    "|||",
    "😀",
    "a dog 😀 runs 👩‍👩‍👧",
    "日本語 の 字幕",
    "café naïve Ünïcode",
    'don\'t "quote" (this) [or] {that}',
    "50% of $3.50, U.S. e.g. it's -- well...",
    "http://example.com/a?b=c|||d <b>bold</b> &amp;",
    "zero\x00byte and \u200b nothing",
    "word " * 300,
    "x" * 5000,
    "SCORE ||| EVAL ||| 1 2 3",
    "\ud83d lone surrogate",
    "A man-in-black's 2nd T-shirt .",
]


WORDS = """a the an dog dogs puppy cat is are runs running ran on in the big large red grass, and
field. quickly happily man men woman plays playing football ball's two three 3 !"""


def random_corpus(seed: int, images: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(1, 14)))

    references = {str(n): [sentence() for _ in range(rng.randint(1, 5))] for n in range(images)}
    predictions = {
        name: rng.choice(texts) if rng.random() < 0.3 else sentence()
        for name, texts in references.items()
    }
    return references, predictions


@pytest.fixture(scope="module")
def official_meteor() -> Iterator[Meteor]:
    with java_on_path():
        meteor = Meteor()
    yield meteor
    # It kills its process when it is collected, and leaves the pipes open.
    for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
        pipe.close()


def official_scores(
    meteor: Meteor, references: dict[str, list[str]], predictions: dict[str, str]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Corpus scores and scores a caption, from pycocoevalcap's own wrappers."""
    with java_on_path():
        truth, candidates = (
            PTBTokenizer().tokenize(
                {name: [{"caption": text} for text in texts] for name, texts in corpus.items()}
            )
            for corpus in (references, {name: [text] for name, text in predictions.items()})
        )
    scorers = {"METEOR": meteor, "ROUGE-L": Rouge(), "CIDEr": Cider()}
    pairs = {name: scorer.compute_score(truth, candidates) for name, scorer in scorers.items()}
    bleu, _ = Bleu(4).compute_score(truth, candidates, verbose=0)
    corpus = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
    corpus |= {name: value for name, (value, _) in pairs.items()}
    return corpus, {name: np.asarray(scores) for name, (_, scores) in pairs.items()}


def corpus_values(samples: captions.pd.DataFrame) -> dict[str, float]:
    names = metric_names_for(samples)
    statistics = {name: METRICS[name].statistics(samples).sum(axis=0) for name in names}
    return {name: float(METRICS[name].value(sums)) for name, sums in statistics.items()}


def assert_equal_to_official(
    meteor: Meteor, references: dict[str, list[str]], predictions: dict[str, str]
) -> None:
    corpus, single = official_scores(meteor, references, predictions)
    samples = score_captions(references, predictions).samples
    values = corpus_values(samples)
    assert {name: values[name] for name in corpus} == pytest.approx(corpus, abs=1e-9)
    assert list(samples.index) == list(references)
    for name, scores in single.items():
        np.testing.assert_allclose(samples[name], scores, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("seed", "images"), [(0, 60), (1, 1), (2, 7)])
def test_scores_are_those_of_pycocoevalcap(official_meteor: Meteor, seed: int, images: int) -> None:
    assert_equal_to_official(official_meteor, *random_corpus(seed, images))


PLAIN = ["a man with a dog", "a dog and its owner walk in a park"]
HARD = {
    "plain": ("a man walks his dogs", PLAIN),
    "empty caption": ("", PLAIN),
    "blank caption": ("  ", PLAIN),
    "empty reference": ("a man with a dog", ["", "a dog"]),
    "one word": ("dog", PLAIN),
    "one word, one reference of one word": ("dog", ["dog"]),
    "500 words": ("the quick dog runs over " * 100, PLAIN),
    "reference of 500 words": ("a dog runs", ["the quick dog runs over " * 100, "a dog"]),
    "punctuation only": ("... !? -- ;", PLAIN),
    "punctuation only in the reference": ("a dog", ["?!", "..."]),
    "new lines": ("a man\nwith a\n\ndog\n", PLAIN),
    "tabs": ("a\tman\twith\ta\tdog", PLAIN),
    "bars": ("a man ||| with a ||| dog", PLAIN),
    "bars only": ("|||", PLAIN),
    "bars in the reference": ("a man with a dog", ["a man ||| with a dog |||", "SCORE ||| a"]),
    "emoji": ("a dog 😀 runs 👩‍👩‍👧 🏳️‍🌈", PLAIN),
    "emoji only": ("😀", ["😀 dog"]),
    "right to left": ("رجل مع كلب في الحديقة", ["رجل مع كلب", "איש עם כלב"]),
    "right to left among others": ("a כלב dog كلب runs", PLAIN),
    "without spaces": ("一只狗在草地上奔跑", ["一只狗 在 草地上", "狗"]),
    "longer than its references": ("a man with a big brown dog and two cats in a park", ["a dog"]),
    "equal to its reference": ("a man with a dog", PLAIN),
    "one reference": ("a man and a dog", ["a man with a dog"]),
    "the same reference many times": ("a man and a dog", ["a man with a dog"] * 20),
    "one word again and again": ("dog dog dog dog dog dog", ["a dog is a dog", "dog dog"]),
    "capitals and quotes": ("\"Don't\", said the MAN: [It's a (dog)].", PLAIN),
    "numbers and currencies": (
        "50% of $3.50, U.S. e.g. 1,000 -- well...",
        ["50 % of 3.50 dollars"],
    ),
    "markup": ("http://example.com/a?b=c <b>bold</b> &amp; more", PLAIN),
    # The last caption holds words: pycocoevalcap's tokenizer loses a last line without any.
    "last": ("a man with a dog", ["a man with a dog"]),
}
"""Candidate and references that pycocoevalcap can read, as the images of one corpus."""


@pytest.fixture(scope="module")
def hard_scores(
    official_meteor: Meteor,
) -> tuple[dict[str, float], dict[str, np.ndarray], captions.pd.DataFrame]:
    references = {name: texts for name, (_, texts) in HARD.items()}
    predictions = {name: text for name, (text, _) in HARD.items()}
    corpus, single = official_scores(official_meteor, references, predictions)
    return corpus, single, score_captions(references, predictions).samples


@pytest.mark.parametrize("case", HARD)
def test_hard_captions_score_as_in_pycocoevalcap(
    case: str, hard_scores: tuple[dict[str, float], dict[str, np.ndarray], captions.pd.DataFrame]
) -> None:
    _, official, ours = hard_scores
    place = list(HARD).index(case)
    values = {name: scores[place] for name, scores in official.items()}
    assert ours.loc[case, list(values)].to_dict() == pytest.approx(values, abs=1e-9)


def test_a_corpus_of_hard_captions_scores_as_in_pycocoevalcap(
    hard_scores: tuple[dict[str, float], dict[str, np.ndarray], captions.pd.DataFrame],
) -> None:
    corpus, _, ours = hard_scores
    values = corpus_values(ours)
    assert {name: values[name] for name in corpus} == pytest.approx(corpus, abs=1e-9)


@pytest.fixture(scope="module")
def nasty_rows() -> captions.CaptionRows:
    return score_captions(
        {f"n{n}": ["a man with a dog"] for n in range(len(NASTY))},
        {f"n{n}": text for n, text in enumerate(NASTY)},
    )


def test_no_caption_shifts_the_rows_of_the_others(nasty_rows: captions.CaptionRows) -> None:
    rows = nasty_rows.samples
    by_text = dict(zip(NASTY, rows.to_dict("records"), strict=True))
    assert by_text["dog"]["bleu_matches"] == [1, 0, 0, 0]
    assert by_text["a man\nwith a\r\ndog"]["METEOR"] == 1.0
    assert by_text["A man-in-black's 2nd T-shirt ."]["bleu_length"] == 5
    for empty in ("", " ", "...", "😀"):
        assert by_text[empty]["bleu_length"] == 0, empty
        assert by_text[empty]["METEOR"] == by_text[empty]["CIDEr"] == 0.0, empty
    assert np.isfinite(rows[["CIDEr", "METEOR", "ROUGE-L"]].to_numpy()).all()


def test_captions_without_a_word_are_told(nasty_rows: captions.CaptionRows) -> None:
    assert any(
        "captions hold no word and score as such (first: image n0)" in warning
        for warning in nasty_rows.warnings
    )


def test_only_empty_captions_score_zero() -> None:
    for reference in ("a dog", "..."):
        scored = score_captions({"1": [reference], "2": [reference]}, {"1": "", "2": "..."})
        values = corpus_values(scored.samples)
        assert {name: values[name] for name in NAMES if name != "ROUGE-L"} == pytest.approx(
            dict.fromkeys(set(NAMES) - {"ROUGE-L"}, 0.0), abs=1e-6
        )


def test_one_tokenizer_call_gives_what_two_give(monkeypatch: pytest.MonkeyPatch) -> None:
    references, predictions = random_corpus(3, 40)
    references |= {f"n{n}": [text, '"'] for n, text in enumerate(NASTY)}
    lists = {name: [text] for name, text in predictions.items()}
    together = tokenize(references, lists)
    assert together == [*tokenize(references), *tokenize(lists)]
    assert [len(texts) for texts in together[0].values()] == [len(t) for t in references.values()]

    starts = []

    def counted(options: Sequence[str], *rest: object) -> list[str]:
        starts.append(options)
        return real(options, *rest)

    real = captions.filter_lines
    monkeypatch.setattr(captions, "filter_lines", counted)
    score_captions(references, dict.fromkeys(references, "a dog"))
    assert len([options for options in starts if "-preserveLines" in options]) == 1


def test_thousands_of_equal_captions(official_meteor: Meteor) -> None:
    names = [str(n) for n in range(4000)]
    references = {name: ["a dog runs", "the dog"] for name in names}
    references["other"] = ["a cat sleeps"]
    assert_equal_to_official(official_meteor, references, dict.fromkeys(references, "a dog runs"))


def test_candidates_are_scored_each_alone(official_meteor: Meteor) -> None:
    references, predictions = random_corpus(4, 12)
    other = {name: text[::-1] for name, text in predictions.items()}
    candidates = [(name, text) for corpus in (predictions, other) for name, text in corpus.items()]
    rows = score_candidates(references, candidates).samples
    # The same whatever stands beside it, and as that of a run on the same references.
    few = score_candidates(references, candidates[3:5]).samples
    assert few.to_numpy() == pytest.approx(rows.iloc[3:5].to_numpy(), abs=1e-12)
    of_run = score_captions(references, predictions).samples
    for name in ("METEOR", "ROUGE-L", "CIDEr", "CIDEr-plain"):
        assert rows[name].iloc[:12].tolist() == of_run[name].tolist(), name
    with java_on_path():
        truth, answers = (
            PTBTokenizer().tokenize(
                {name: [{"caption": text} for text in texts] for name, texts in corpus.items()}
            )
            for corpus in (references, {name: [text] for name, text in predictions.items()})
        )
    _, bleu = Bleu(4).compute_score(truth, answers, verbose=0)
    for order, scores in enumerate(bleu, start=1):
        np.testing.assert_allclose(rows[f"BLEU-{order}"].iloc[:12], scores, atol=1e-12)


def test_two_tasks_share_a_meteor_and_get_their_own_rows() -> None:
    corpora = [random_corpus(seed, 20) for seed in (5, 6)]
    with kept_meteor(start=True):
        begun = [begin_scores(refs, list(preds.items())) for refs, preds in corpora]
        together = [finish().samples for finish in begun]
    for rows, (references, predictions) in zip(together, corpora, strict=True):
        alone = score_captions(references, predictions).samples
        assert rows["METEOR"].tolist() == alone["METEOR"].tolist()
        assert rows["CIDEr"].tolist() == alone["CIDEr"].tolist()


def test_one_image_has_no_cider_and_that_is_told() -> None:
    scored = score_captions({"1": ["a dog runs"]}, {"1": "a dog runs"})
    assert scored.samples["CIDEr"].tolist() == [0.0]
    assert "CIDEr of one image is 0: its document frequencies need a corpus" in scored.warnings


def test_the_images_must_be_the_same() -> None:
    for references, predictions in (({"1": ["a"]}, {"2": "a"}), ({"1": []}, {"1": "a"})):
        with pytest.raises(ValueError, match="must name the same images"):
            score_captions(references, predictions)


def test_rows_carry_what_the_run_folder_needs() -> None:
    samples = [
        CaptionSample("7", b"", "Caption it.", ("a dog", "a big dog"), ("in-domain",)),
        CaptionSample("3", b"", "Caption it.", ("a cat",), ("out-domain",)),
    ]
    rows = caption_rows(samples, {"3": "a cat", "7": "a dog"}).samples
    assert rows["id"].tolist() == rows["cluster"].tolist() == ["7", "3"]
    assert rows["prediction"].tolist() == ["a dog", "a cat"]
    assert rows["references"].tolist() == [["a dog", "a big dog"], ["a cat"]]
    assert rows["groups"].tolist() == [["in-domain"], ["out-domain"]]
    assert rows["prompt"].tolist() == ["Caption it."] * 2
    assert set(NAMES) <= set(metric_names_for(rows))


def test_spice_without_its_jars_is_unavailable_not_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(captions, "_SPICE_FOLDER", tmp_path)
    scored = score_captions({"1": ["a dog"], "2": ["a cat"]}, {"1": "a dog", "2": "a cat"})
    assert "SPICE" not in scored.samples
    assert any(warning.startswith("SPICE unavailable: ") for warning in scored.warnings)


def test_spice_with_its_jars_gives_a_score_a_caption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    for jar in captions._SPICE_JARS:
        (tmp_path / jar).write_text("")
    monkeypatch.setattr(captions, "_SPICE_FOLDER", tmp_path)
    monkeypatch.setattr(captions.spice, "get_stanford_models", lambda: None)

    def of_length(size: int) -> dict[str, float]:
        f = size / 100
        return {"f": f, "pr": f, "re": f, "tp": size, "fp": 100 - size, "fn": 100 - size}

    def run_spice(command: list[str], **_: object) -> None:
        # The program's own file formats, with scores that tell the captions apart.
        items = json.loads(Path(command[4]).read_text())
        scores = [
            {"image_id": i["image_id"], "scores": {"All": of_length(len(i["test"]))}} for i in items
        ]
        Path(command[command.index("-out") + 1]).write_text(json.dumps(scores))

    monkeypatch.setattr(captions.spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(subprocess, "check_call", run_spice)
    references = {str(n): ["a dog"] for n in range(12)}
    predictions = {str(n): "a" * (n + 1) for n in range(12)}
    scored = score_captions(references, predictions)
    assert scored.samples["SPICE"].tolist() == [(n + 1) / 100 for n in range(12)]
    right, wrong, missing = np.array(scored.samples["spice_tuples"].tolist()).T
    np.testing.assert_allclose(
        (2 * right / (2 * right + wrong + missing)), scored.samples["SPICE"], atol=1e-12
    )
    assert not any("SPICE" in warning for warning in scored.warnings)

    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "check_call", fail)
    scored = score_captions(references, predictions)
    assert "SPICE" not in scored.samples
    assert any("SPICE unavailable: it did not run" in warning for warning in scored.warnings)


def test_nothing_is_written_beside_the_jars() -> None:
    package = Path(captions.ptbtokenizer.__file__).parents[1]
    before = set(package.rglob("*"))
    score_captions({"1": ["a dog"], "2": ["a cat"]}, {"1": "a dog", "2": "a cat"})
    assert set(package.rglob("*")) == before
