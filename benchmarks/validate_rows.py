"""Reading and checking a file of a million preference rows: ours beside `datasets`.

    python benchmarks/validate_rows.py [--rows 1000000] [--repeats 3] [--smoke]

Each side in fresh processes, by turns, medians told; seconds are the processor's, so that other
work on the machine matters little. `datasets` is `load_dataset("json")` into an
empty cache and a Python loop that looks whether the answers are there and differ, the least that a
check must do; ours are all checks of `train/pairs.py`. Peak memory is the process's resident
set at its largest above what it is after the imports.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

WORDS = "a the red small dog cat man woman on under sofa street with bicycle two looks at".split()  # noqa: SIM905
IMAGES = 1000
SIDES = {
    "check, texts": "what `negatives check --without-images` does: nothing is held",
    "check, texts and image headers": f"the same with images: {IMAGES} files, each in many rows",
    "read_pairs, texts": "what `train` does before it opens images: all pairs are kept in a file",
    "datasets": "load_dataset('json'), then the loop",
    "datasets, streaming": "load_dataset('json', streaming=True), the same loop",
}


def write_rows(folder: Path, rows: int) -> Path:
    from PIL import Image

    (folder / "images").mkdir()
    for i in range(IMAGES):
        Image.new("RGB", (16, 16), (i % 255, 0, 0)).save(folder / "images" / f"{i}.png")
    rng = random.Random(0)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for i in range(rows):
            answer = " ".join(rng.choices(WORDS, k=30))
            row = {
                "id": f"row-{i}",
                "images": [f"images/{i % IMAGES}.png"],
                "prompt": "Describe the image in a sentence.",
                "chosen": answer,
                "rejected": f"{answer} and more",
            }
            file.write(json.dumps(row) + "\n")
    return path


def one_side(side: str, path: Path) -> None:
    """In a process of its own: print rows, seconds and peak memory."""
    import datasets

    from cwdpo_bench.train.data import read_pairs
    from cwdpo_bench.train.preferences.check import check_file

    datasets.disable_progress_bars()
    before = _peak()
    started = time.process_time()
    if side.startswith("check"):
        rows = check_file(path, with_images=side.endswith("headers"))["good"]
    elif side.startswith("read_pairs"):
        pairs = read_pairs(path, with_images=False).pairs
        rows = len(pairs)
    else:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset(
                "json",
                data_files=str(path),
                split="train",
                cache_dir=cache,
                streaming=side.endswith("streaming"),
            )
            rows = 0
            for row in table:
                chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
                rows += bool(row["prompt"].strip() and chosen and chosen != rejected)
    seconds = time.process_time() - started
    print(json.dumps({"rows": rows, "seconds": seconds, "mib": (_peak() - before) / 2**10}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(path: Path, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Rows a second, seconds and MiB of each side: medians over processes, sides by turns."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--path", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        side: (
            statistics.median(one["rows"] / one["seconds"] for one in runs),
            statistics.median(one["seconds"] for one in runs),
            statistics.median(one["mib"] for one in runs),
        )
        for side, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="2,000 rows, once")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options.side, options.path)
        return
    rows, repeats = (2_000, 1) if options.smoke else (options.rows, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder), rows)
        print(f"{rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB, medians of {repeats}")
        found = measure(path, repeats)
    base = found["datasets"][0]
    print("\n| | rows/s | beside datasets | seconds | MiB |\n| --- | ---: | ---: | ---: | ---: |")
    for side, (speed, seconds, mib) in found.items():
        print(f"| {side} | {speed:,.0f} | {speed / base:.2f}x | {seconds:.1f} | {mib:.0f} |")


if __name__ == "__main__":
    main()
