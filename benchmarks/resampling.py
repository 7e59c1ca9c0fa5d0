"""10,000 paired resamples of all caption metrics for two systems, beside a loop over pycocoevalcap.

    python benchmarks/resampling.py             # 5,000 images, a markdown table
    python benchmarks/resampling.py --scored 500    # scores 500, repeats their rows to 5,000
    python benchmarks/resampling.py --smoke     # seconds: that it runs and the loop agrees

Ours sums statistics that were kept when the captions were scored. The loop is what one would write
with pycocoevalcap alone: draw images, score BLEU, ROUGE-L and CIDEr again, for both systems.
One of its resamples is timed and multiplied by their number: **its total is extrapolated**, never
run. On one resample both give the same BLEU and ROUGE-L (how CIDEr and METEOR are recomposed is
tested against the official scorers in `tests/evaluate/`).

SPICE's per-image values are random here where its jars are missing: that changes what is summed,
not what it costs. The loop leaves METEOR and SPICE out, whose Java would be most of it. Processor
time is the process's own, so that other work on the machine counts little; wall time stands beside
it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from cwdpo_bench.demo.captions import references as captions_of
from cwdpo_bench.demo.world import draw_scene
from cwdpo_bench.evaluate.captions import score_captions, tokenize
from cwdpo_bench.evaluate.metrics import METRICS as RULES
from cwdpo_bench.leaderboards.paired import paired_differences, resample
from cwdpo_bench.leaderboards.statistics import TaskStatistics, statistics_of

METRICS = [*(f"BLEU-{n}" for n in range(1, 5)), "METEOR", "ROUGE-L", "CIDEr", "SPICE"]
RESAMPLES = 10_000

Captions = dict[str, list[str]]


def world(images: int) -> tuple[Captions, dict[str, Captions]]:
    """References, and the captions of two systems: another true caption, or one cut short."""
    generator = random.Random(0)
    truth: Captions = {}
    systems: dict[str, Captions] = {"a": {}, "b": {}}
    for image in range(images):
        first, second, *rest = captions_of(draw_scene(generator, "test"), generator, 7)
        name = f"{image:06}"
        truth[name], systems["a"][name], systems["b"][name] = rest, [first], [second]
        if generator.random() < 0.1:
            systems["b"][name] = [" ".join(second.split()[:-2]) or second]
    return truth, systems


def kept(truth: Captions, captions: Captions, seed: int) -> TaskStatistics:
    rows, _ = score_captions(truth, {name: text for name, (text,) in captions.items()})
    rows = rows.reset_index().rename(columns={"index": "id"})
    if "SPICE" not in rows:
        rows["SPICE"] = np.random.default_rng(seed).random(len(rows))
    return statistics_of(rows.assign(cluster=rows["id"], groups=[[] for _ in range(len(rows))]))


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor seconds, wall seconds, what came of it."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def ours(systems: dict[str, list[TaskStatistics]], metrics: list[str], resamples: int) -> Any:
    drawn = resample(systems, metrics, resamples=resamples)
    return paired_differences(systems, drawn, "a")


def loop_once(truth: Captions, captions: Captions, names: list[str]) -> dict[str, float]:
    """One system's part of one resample, by the scorers themselves."""
    references = {str(place): truth[name] for place, name in enumerate(names)}
    answers = {str(place): captions[name] for place, name in enumerate(names)}
    bleu, _ = Bleu(4).compute_score(references, answers, verbose=0)
    rouge, _ = Rouge().compute_score(references, answers)
    Cider().compute_score(references, answers)
    return {**{f"BLEU-{n + 1}": bleu[n] for n in range(4)}, "ROUGE-L": float(rouge)}


def part(statistics: TaskStatistics, size: int) -> TaskStatistics:
    return statistics.rows(np.arange(len(statistics.ids)) < size)


def repeated(statistics: TaskStatistics, times: int) -> TaskStatistics:
    """The same rows `times` over, as images of their own."""
    ids = np.array([f"{k}-{name}" for k in range(times) for name in statistics.ids])
    tiled: dict[int, Any] = {}
    for block in statistics.blocks.values():
        tiled.setdefault(id(block), np.tile(block, (times, 1)))
    return TaskStatistics(
        ids=ids,
        clusters=ids,
        groups=statistics.groups * times,
        asked=np.tile(statistics.asked, times),
        truth={},
        blocks={name: tiled[id(block)] for name, block in statistics.blocks.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--scored", type=int, help="a divisor of --images; all by default")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    images, resamples = (60, 200) if options.smoke else (options.images, RESAMPLES)
    scored = min(options.scored or images, images)

    truth, systems = world(scored)
    tokens = tokenize(truth, *systems.values())
    truth, systems = tokens[0], dict(zip(systems, tokens[1:], strict=True))
    statistics = {
        name: [kept(truth, captions, seed)] for seed, (name, captions) in enumerate(systems.items())
    }

    names = [str(n) for n in np.random.default_rng(1).choice(sorted(truth), scored)]
    cpu_once, wall_once, scores = timed(lambda: loop_once(truth, systems["a"], names))
    counts = pd.Series(names).value_counts().reindex(sorted(truth), fill_value=0).to_numpy()
    for metric, value in scores.items():
        found = float(RULES[metric].value(counts @ statistics["a"][0].sums(metric)))
        assert abs(found - value) < 1e-9, (metric, found, value)

    times = images // scored
    statistics = {name: [repeated(own, times)] for name, (own,) in statistics.items()}
    runs = [timed(lambda: ours(statistics, METRICS, resamples))[:2] for _ in range(3)]
    cpu, wall = (sorted(column)[1] for column in zip(*runs, strict=True))
    loop_cpu, loop_wall = (2 * times * once * resamples for once in (cpu_once, wall_once))
    size = f"{len(METRICS)} metrics × {images:,} images × 2 systems"
    print(f"{scored:,} images were scored, the loop was timed on them.")
    print(f"{resamples:,} paired resamples × {size}\n")
    print("| | processor s | wall s |\n| --- | ---: | ---: |")
    print(f"| ours, median of 3 | {cpu:.2f} | {wall:.2f} |")
    print(f"| loop over pycocoevalcap, extrapolated | {loop_cpu:,.0f} | {loop_wall:,.0f} |")
    print(f"\nRatio in processor time: {loop_cpu / max(cpu, 0.01):,.0f}.\n")

    print("| images | columns summed | metrics | processor s |\n| ---: | ---: | ---: | ---: |")
    for count in (images // 4, images // 2, images):
        some = {name: [part(whole, count)] for name, (whole,) in statistics.items()}
        for chosen in (METRICS[-2:], METRICS[:5], METRICS):
            blocks = {id(some["a"][0].blocks[m]): some["a"][0].blocks[m] for m in chosen}
            columns = 2 * sum(int(block.any(axis=0).sum()) for block in blocks.values())
            seconds = min(timed(lambda s=some, c=chosen: ours(s, c, resamples))[0] for _ in "123")
            print(f"| {count:,} | {columns} | {len(chosen)} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
