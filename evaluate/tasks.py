"""The benchmarks by name: how each is loaded, prompted and, where missing, got.

To add a benchmark: one file with its loader and its task, run as `--tasks module:NAME`
(docs/EXTENDING.md); to ship it, put the file beside this one and an entry here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate import coco, hidden, mmbench, mmmu, nocaps, pope
from cwdpo_bench.evaluate.choices import Rules
from cwdpo_bench.evaluate.coco import caption_prompt
from cwdpo_bench.evaluate.mmbench import mmbench_prompt
from cwdpo_bench.evaluate.mmmu import MULTIPLE_CHOICE, OPEN, mmmu_prompt
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.named import load_named

if TYPE_CHECKING:
    import pandas as pd

    # An engine needs torch, which no one should wait for who asks for a task's name.
    from cwdpo_bench.evaluate.engine import ChoiceAnswer

    Score = Callable[
        [Sequence[ChoiceSample], Sequence[ChoiceAnswer], Path], tuple[pd.DataFrame, list[str]]
    ]

Sample = TypeVar("Sample", CaptionSample, ChoiceSample)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as `--tasks` takes it.
        split: of the data that is read.
        files: the annotation files that a data root holds; empty where the benchmark is absent.
        template: the prompt with its variable parts named, for the signature.
        max_new_tokens: greedy generation stops there.
        source: how the data are got.
        origin: the task of lmms-eval that they are from, where no local layout is.
    """

    name: str
    split: str
    files: Callable[[Path], list[Path]]
    template: str
    max_new_tokens: int
    source: str
    origin: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class CaptionTask(Task):
    """A benchmark of images to caption; `load` gives all samples under a data root."""

    load: Callable[[Path], list[CaptionSample]]


@dataclass(frozen=True)
class ChoiceTask(Task):
    """A benchmark of questions; `rules` names the parser that reads the replies.

    `score` scores them in its place: samples, replies and the folder of the run give rows, and what
    a reader must know.
    """

    load: Callable[[Path], list[ChoiceSample]]
    rules: Rules | None
    score: Score | None = None


def _only(relative: Path) -> Callable[[Path], list[Path]]:
    """A benchmark whose annotations are one file."""
    return lambda root: [root / relative] if (root / relative).is_file() else []


_MMMU_TEMPLATE = "\n".join(
    mmmu_prompt("{question}", ["{A}", "{B}"], kind) for kind in (MULTIPLE_CHOICE, OPEN)
)
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"

# max_new_tokens are lmms-eval's (coco2017_cap_val, flickr30k_test, nocaps_val, mmmu_val, pope);
# for MMBench it allows 1024, which no reply of one letter needs and a rambling model uses up.
TASKS: dict[str, CaptionTask | ChoiceTask] = {
    task.name: task
    for task in (
        CaptionTask(
            name="coco",
            split=coco.SPLIT,
            load=coco.load_coco,
            files=_only(coco.COCO_ANNOTATIONS),
            template=caption_prompt(),
            max_new_tokens=64,
            source=f"coco/dataset_coco.json from {_KARPATHY}, and "
            "http://images.cocodataset.org/zips/val2014.zip unpacked into coco/",
        ),
        CaptionTask(
            name="flickr30k",
            split=coco.SPLIT,
            load=coco.load_flickr30k,
            files=_only(coco.FLICKR30K_ANNOTATIONS),
            template=caption_prompt(),
            max_new_tokens=64,
            source=f"flickr30k/dataset_flickr30k.json from {_KARPATHY}, and the images, on request "
            "from https://shannon.cs.illinois.edu/DenotationGraph/, in flickr30k/flickr30k-images/",
        ),
        CaptionTask(
            name="nocaps",
            split="validation",
            load=nocaps.load_nocaps,
            files=_only(nocaps.ANNOTATIONS),
            template=caption_prompt(),
            max_new_tokens=64,
            source=f"{nocaps.ANNOTATIONS} from "
            "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json, and the images that "
            "its coco_url fields name in nocaps/images/",
        ),
        ChoiceTask(
            name="mmmu",
            split="validation",
            load=mmmu.load_mmmu,
            files=mmmu.mmmu_files,
            template=_MMMU_TEMPLATE,
            max_new_tokens=128,
            source="hf download MMMU/MMMU --repo-type dataset --include '*/validation-*' "
            "--local-dir ROOT/mmmu",
            rules="mmmu",
        ),
        ChoiceTask(
            name="mmbench",
            split="dev",
            load=mmbench.load_mmbench,
            files=_only(mmbench.TSV),
            template=mmbench_prompt("{question}", ["{A}", "{B}"], "{hint}"),
            max_new_tokens=128,
            source=f"{mmbench.TSV} from https://opencompass.openxlab.space/utils/benchmarks/"
            "MMBench/MMBench_DEV_EN_V11.tsv",
            rules="mmbench",
        ),
        ChoiceTask(
            name="pope",
            split="coco",
            load=pope.load_pope,
            files=pope.pope_files,
            template=pope.pope_prompt("{question}"),
            max_new_tokens=128,
            source="pope/coco_pope_{random,popular,adversarial}.json from output/coco/ of "
            "https://github.com/AoiDragon/POPE, and "
            "http://images.cocodataset.org/zips/val2014.zip unpacked into coco/",
            rules="pope",
        ),
        ChoiceTask(
            name="mmmu-test",
            split="test",
            load=hidden.load_mmmu_test,
            files=hidden.mmmu_test_files,
            template=_MMMU_TEMPLATE,
            max_new_tokens=128,
            source="hf download MMMU/MMMU --repo-type dataset --include '*/test-*' "
            "--local-dir ROOT/mmmu",
            rules="mmmu",
            score=hidden.write_mmmu,
        ),
        ChoiceTask(
            name="mmbench-test",
            split="test",
            load=hidden.load_mmbench_test,
            files=hidden.mmbench_test_files,
            template=mmbench_prompt("{question}", ["{A}", "{B}"], "{hint}"),
            max_new_tokens=128,
            source=f"{hidden.MMBENCH_TSV} from https://opencompass.openxlab.space/utils/benchmarks/"
            "MMBench/MMBench_TEST_EN_V11.tsv",
            rules="mmbench",
            score=hidden.write_mmbench,
        ),
    )
}


DEFAULT_TASKS = ("coco", "flickr30k", "nocaps", "mmmu", "mmbench")
"""Those of the paper: run where a data root holds them and none is named."""


def find_task(name: str) -> CaptionTask | ChoiceTask:
    """The task of that name; `module:NAME` is one of the user's own.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    if ":" in name:
        own: CaptionTask | ChoiceTask = load_named(
            name, "CaptionTask or ChoiceTask", lambda found: isinstance(found, Task)
        )
        if own.name in TASKS:
            raise UserError(f"{name!r}: {own.name!r} is the name of a task of ours; take another")
        return own
    if name not in TASKS:
        hint = f"{nearest(name, TASKS)}; lmms-eval's are lmms:NAME, yours module:NAME"
        raise UserError(f"unknown task {name!r}; {hint}")
    return TASKS[name]


def first_clusters(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The samples of the first `limit` clusters (images; questions in all orders), or all."""
    if limit is None:
        return samples
    kept = set(list(dict.fromkeys(sample.cluster for sample in samples))[:limit])
    return [sample for sample in samples if sample.cluster in kept]


def refuse_doubled_ids(samples: Sequence[CaptionSample | ChoiceSample], file: object) -> None:
    """Refuse samples that share an id.

    Raises:
        UserError: the first such id and the file, or the data set.
    """
    counts = Counter(sample.id for sample in samples)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"{file}: id {name!r} is doubled; remove one")
