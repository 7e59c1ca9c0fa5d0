import io
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import TaskResult, signature_of, write_run


def choices(skill=0.5, size=120, seed=0):
    """Multiple-choice samples: about `skill` of the questions are answered rightly."""
    truth, noise = np.random.default_rng(7), np.random.default_rng(seed)
    gold = truth.integers(0, 4, size)
    hardness = truth.random(size)
    scores = noise.normal(0, 0.3, (size, 4))
    scores[np.arange(size), gold] += np.where(hardness < skill, 2.0, -2.0)
    logps = scores - np.log(np.exp(scores).sum(1, keepdims=True)) - 0.1
    answers = logps.argmax(1)
    return pd.DataFrame(
        {
            "id": [f"q{i:04}" for i in range(size)],
            "cluster": [f"image{i // 2:04}" for i in range(size)],
            "groups": [["Art"] if i % 2 else ["Science"] for i in range(size)],
            "prompt": "Which?",
            "prediction": [f"({'ABCD'[a]})" for a in answers],
            "gold": ["ABCD"[g] for g in gold],
            "question_type": "multiple-choice",
            "options": [["a", "b", "c", "d"]] * size,
            "parsed": ["ABCD"[a] for a in answers],
            "correct": answers == gold,
            "option_log_probabilities": list(logps),
            "option_correct": answers == gold,
        }
    )


def captions(skill=0.5, size=60, seed=0):
    """Caption samples whose statistics grow with `skill`."""
    truth, noise = np.random.default_rng(8), np.random.default_rng(seed)
    guesses = [[12 - n for n in range(4)]] * size
    chance = np.clip(skill + truth.normal(0, 0.1, size), 0, 1)
    matches = [
        [int(noise.binomial(g, c)) for g in row] for row, c in zip(guesses, chance, strict=True)
    ]
    confidences = [list(noise.uniform(0.5, 1, 5)) for _ in range(size)]
    return pd.DataFrame(
        {
            "id": [f"{i}" for i in range(size)],
            "cluster": [f"{i}" for i in range(size)],
            "groups": [["in-domain"] if i % 3 else ["out-domain"] for i in range(size)],
            "prompt": "Describe.",
            "prediction": "a red square",
            "references": [["a red square", "one square"]] * size,
            "CIDEr": chance * 2 + noise.normal(0, 0.02, size),
            "ROUGE-L": chance,
            "bleu_matches": matches,
            "bleu_guesses": guesses,
            "bleu_length": 12,
            "bleu_reference_length": 12,
            "token_confidences": confidences,
            "token_correct": [list(noise.random(5) < 0.75) for _ in range(size)],
            "token_entropies": [list(noise.uniform(0, 1, 5)) for _ in range(size)],
        }
    )


def task(samples, name="coco", **parts):
    defaults = {"task": name, "split": "test", "prompt": "abc", "scorer": "x 1.2"}
    return TaskResult(samples, signature_of({**defaults, **parts}))


def save(path, name, tasks, signature="engine:hf|dtype:float32", **provenance):
    write_run(path, {"name": name}, tasks, provenance, signature)
    return path


class Pictures:
    """A reader of pictures that needs no benchmark: noise, a picture an id, `size` pixels."""

    def __init__(self, ids, size=(32, 24), broken=()):
        self._ids, self._size, self._broken, self._made = ids, size, broken, {}

    def sources(self, task, root, data_sha256=None):
        if root.name == "gone":
            raise UserError(f"{root}: holds no data of {task}")
        return {name: (name,) for name in self._ids}

    def thumbnail(self, source, root, edge, quality):
        if source in self._broken:
            raise UserError(f"{source} is broken")
        key = (edge, quality, sum(source.encode()) % 20)
        if key not in self._made:
            width, height = self._size
            noise = np.random.default_rng(key[2]).integers(0, 255, (height, width, 3))
            image, buffer = Image.fromarray(noise.astype(np.uint8)), io.BytesIO()
            image.thumbnail((edge, edge))
            image.save(buffer, "WEBP", quality=quality)
            self._made[key] = buffer.getvalue()
        return self._made[key]


@pytest.fixture(scope="session")
def make():
    """The builders above, for tests; test folders are no packages to import from."""
    return SimpleNamespace(
        choices=choices, captions=captions, task=task, save=save, pictures=Pictures
    )


@pytest.fixture(scope="session")
def written_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, skill in (("base", 0.4), ("better", 0.8), ("copy", 0.4)):
        tasks = {
            "coco": task(captions(skill)),
            "mmmu": task(choices(skill), "mmmu", split="validation"),
        }
        save(root / name, name, tasks, seed=3)
    return root


@pytest.fixture
def runs(written_runs, tmp_path):
    """Three runs on two tasks: `base`, a clearly better one, and a copy of `base`."""
    copied = shutil.copytree(written_runs, tmp_path / "runs")
    return [copied / name for name in ("base", "better", "copy")]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    # The floor of 100 draws a difference stays, so verdicts after Holm do too.
    monkeypatch.setattr("cwdpo_bench.leaderboards.compare.RESAMPLES", 1000)
    monkeypatch.setattr("cwdpo_bench.leaderboards.gate.RESAMPLES", 1000)
