"""How long captions take to score, by us and by the functions that lmms-eval calls.

    python benchmarks/score_vs_lmms.py                       # COCO, Flickr30k and NoCaps in size
    python benchmarks/score_vs_lmms.py --real references.json predictions.json

Without --real the captions are generated: the sizes of the Karpathy test splits and of NoCaps
validation (5,000 × 5, 1,000 × 5 and 4,500 × 10 references), about eleven words each as in COCO,
candidates as near to their references as references are to each other. With --real, captions in
COCO's forms are scored leave-one-out: every caption of an image once against its others.

Each side runs in a process of its own, the two by turns, and everything in it counts, its imports
and its start of Java too. lmms-eval's side is its aggregation functions, called as its evaluator
calls them: seven a task. Needs `pip install lmms-eval==0.7.3`; where it is missing, the same calls
of pycocoevalcap stand in for it, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

TASKS = {"coco": (5000, 5), "flickr30k": (1000, 5), "nocaps": (4500, 10)}
"""Images and references an image."""
FUNCTIONS = {"coco": "coco_cap", "flickr30k": "flickr30k", "nocaps": "nocaps"}
METRICS = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "rougel": "ROUGE-L",
    "cider": "CIDEr",
}
TOLERANCE = 1e-9

Corpus = dict[str, tuple[list[str], str]]
"""Image id → its references and the caption to score."""


# --- captions ------------------------------------------------------------------------------------

SUBJECTS = """man woman boy girl child dog cat horse player cyclist surfer chef couple crowd family
toddler skier teenager worker musician group bird elephant zebra giraffe bear cow sheep kitten puppy
train bus truck car motorcycle bicycle airplane boat kite sandwich pizza cake plate bowl vase clock
bench umbrella laptop phone table bed couch chair lamp mirror sink toilet refrigerator oven"""
ADJECTIVES = """young old small large red blue green yellow white black brown striped wooden metal
empty crowded colorful bright dark happy tired wet muddy snowy sunny busy quiet tall short fluffy"""
ACTIONS = """riding holding watching eating throwing catching carrying pulling pushing washing
painting crossing leaving entering jumping sitting standing walking running sleeping playing looking
waiting cooking cutting reading writing talking smiling flying swimming skating skiing surfing"""
PLACES = """street kitchen field beach park mountain river lake road sidewalk station airport garden
forest room bathroom restaurant stadium court pool ocean bridge city farm yard zoo market school"""
PREPOSITIONS = """in on near beside behind under above across along inside outside through next"""


def sentence(rng: random.Random, scene: dict[str, list[str]]) -> str:
    """A caption of a scene."""

    def one(kind: str) -> str:
        return rng.choice(scene[kind])

    parts = [rng.choice(("a", "the", "two", "one")), one("adjective"), one("subject")]
    parts += [rng.choice(("is", "", "")), one("action")]
    if rng.random() < 0.6:
        parts += [rng.choice(("a", "the", "some")), one("subject")]
    parts += [one("preposition"), rng.choice(("a", "the")), one("adjective"), one("place")]
    if rng.random() < 0.3:
        parts += ["with", rng.choice(("a", "its", "their")), one("subject")]
    text = " ".join(part for part in parts if part)
    return text.capitalize() + rng.choice((".", ".", " .", "", "!", " with people's bags."))


def generated(images: int, references: int, seed: int) -> Corpus:
    """Images whose captions choose from a few words of a scene, as people's do."""
    rng = random.Random(seed)
    words = {
        "subject": SUBJECTS.split(),
        "adjective": ADJECTIVES.split(),
        "action": ACTIONS.split(),
        "place": PLACES.split(),
        "preposition": PREPOSITIONS.split(),
    }
    corpus: Corpus = {}
    for image in range(images):
        scene = {kind: rng.sample(known, 3) for kind, known in words.items()}
        texts = [sentence(rng, scene) for _ in range(references)]
        corpus[str(image)] = (texts, sentence(rng, scene))
    return corpus


def real(references: Path, predictions: Path | None) -> Corpus:
    """Every caption of an image against its others."""
    captions: dict[str, list[str]] = {}
    records = json.loads(references.read_text())["annotations"]
    if predictions is not None:
        records = json.loads(predictions.read_text()) + records
    for record in records:
        captions.setdefault(str(record["image_id"]), []).append(record["caption"])
    most = max(map(len, captions.values()))
    pairs = ((place, texts) for place in range(most) for texts in captions.values())
    return {
        str(number): (texts[:place] + texts[place + 1 :], texts[place])
        for number, (place, texts) in enumerate(pairs)
        if place < len(texts) and len(texts) > 1
    }


# --- the two sides, each in a process of its own -------------------------------------------------


def ours(corpora: dict[str, Corpus]) -> dict[str, dict[str, float]]:
    from cwdpo_bench.evaluate.captions import begin_scores
    from cwdpo_bench.evaluate.meteor import kept_meteor
    from cwdpo_bench.evaluate.metrics import METRICS as OURS

    with kept_meteor(start=True):
        begun = {
            task: begin_scores(
                {name: texts for name, (texts, _) in corpus.items()},
                [(name, text) for name, (_, text) in corpus.items()],
            )
            for task, corpus in corpora.items()
        }
        rows = {task: finish().samples for task, finish in begun.items()}
    return {
        task: {
            name: float(OURS[name].value(OURS[name].statistics(samples).sum(axis=0)))
            for name in METRICS.values()
        }
        for task, samples in rows.items()
    }


def theirs(corpora: dict[str, Corpus]) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task, corpus in corpora.items():
            results = [
                {"answer": texts, "pred": text, "image_id": int(name), "id": int(name)}
                for name, (texts, text) in corpus.items()
            ]
            values[task] = {
                ours: float(_aggregation(task, short)(results, SimpleNamespace(output_path=folder)))
                for short, ours in METRICS.items()
            }
    return values


def _aggregation(task: str, metric: str):  # type: ignore[no-untyped-def]
    """lmms-eval's function, or where it is missing the calls that it makes."""
    if importlib.util.find_spec("lmms_eval") is None:
        return lambda results, _: _as_lmms_does(results, metric)
    module = importlib.import_module(f"lmms_eval.tasks.{FUNCTIONS[task]}.utils")
    prefix = {"flickr30k": "flickr"}.get(task, task)
    return getattr(module, f"{prefix}_{metric}")


def _as_lmms_does(results: list[dict[str, object]], metric: str) -> float:
    from pycocoevalcap.eval import Bleu, Cider, Meteor, Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # It makes all seven scorers for each of its functions, METEOR's program included.
    scorers = [Bleu(4), Bleu(4), Bleu(4), Bleu(4), Meteor(), Rouge(), Cider()]
    truth = {r["image_id"]: [{"caption": text} for text in r["answer"]] for r in results}  # type: ignore[attr-defined]
    answers = {r["image_id"]: [{"caption": r["pred"]}] for r in results}
    tokenizer = PTBTokenizer()
    truth, answers = tokenizer.tokenize(truth), tokenizer.tokenize(answers)
    value, _ = scorers[list(METRICS).index(metric)].compute_score(truth, answers)
    return float(value[int(metric[-1]) - 1] if isinstance(value, list) else value)


def side(which: str, source: Path, target: Path) -> None:
    corpora = json.loads(source.read_text())
    values = {"ours": ours, "lmms": theirs}[which](corpora)
    target.write_text(json.dumps(values))


# --- measuring -----------------------------------------------------------------------------------


def measure(which: str, source: Path) -> tuple[float, float, dict[str, dict[str, float]]]:
    """Seconds by the clock, seconds of processor (Java's too), and the values."""
    from cwdpo_bench.evaluate.java import java_on_path

    target = source.with_suffix(f".{which}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with java_on_path():
        subprocess.run(
            [sys.executable, __file__, "--side", which, str(source), str(target)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, busy, json.loads(target.read_text())


def table(name: str, corpora: dict[str, Corpus], runs: int) -> float:
    """Measure both sides by turns, print a row; the largest difference of a value."""
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "lmms": []}
    values: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "captions.json"
        source.write_text(json.dumps(corpora))
        for turn in range(runs):
            for which in ("ours", "lmms") if turn % 2 == 0 else ("lmms", "ours"):
                wall, busy, values[which] = measure(which, source)
                times[which].append((wall, busy))
    largest = max(
        abs(values["ours"][task][metric] - values["lmms"][task][metric])
        for task in corpora
        for metric in METRICS.values()
    )
    middle = {
        which: [statistics.median(column) for column in zip(*rows, strict=True)]
        for which, rows in times.items()
    }
    clock, busy = (theirs / own for theirs, own in zip(middle["lmms"], middle["ours"], strict=True))
    print(
        f"| {name} | {middle['ours'][0]:.1f} | {middle['lmms'][0]:.1f} | **{clock:.1f} ×** | "
        f"{middle['ours'][1]:.1f} | {middle['lmms'][1]:.1f} | {busy:.1f} × | {largest:.0e} |",
        flush=True,
    )
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--real", nargs="+", type=Path, metavar="FILE", help="annotations [results]"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="of the generated ones")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images")
    parser.add_argument("--runs", type=int, default=1, help="of each side, by turns")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        which, source, target = arguments.side
        side(which, Path(source), Path(target))
        return
    if arguments.real:
        corpus = real(arguments.real[0], arguments.real[1] if arguments.real[1:] else None)
        name, corpora = f"real captions, {len(corpus):,} images", {"coco": corpus}
    else:
        sizes = {task: TASKS[task] for task in arguments.tasks.split(",")}
        corpora = {
            task: generated(max(2, round(images * arguments.scale)), references, seed)
            for seed, (task, (images, references)) in enumerate(sizes.items())
        }
        name = ", ".join(f"{t} {len(c):,} × {TASKS[t][1]}" for t, c in corpora.items())
    if importlib.util.find_spec("lmms_eval") is None:
        print("lmms-eval is not installed: its calls of pycocoevalcap stand in for it\n")
    print(
        "| captions | ours s | lmms-eval s | ratio | ours CPU s | lmms-eval CPU s | ratio | |Δ| |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    largest = table(name, corpora, arguments.runs)
    if not largest <= TOLERANCE:
        sys.exit(f"a value differs by {largest:g}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
