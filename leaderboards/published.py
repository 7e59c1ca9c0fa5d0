"""The figures that were published for CW-DPO and its baselines, as SPEC 5 lists them.

They are of another model on other settings than any run here (Qwen2.5-VL-72B with LoRA, mean of
five runs, standard deviations, prompts and settings unpublished). They come from third-party notes
on the paper and were not checked against its authors' outputs. So they are shown only when asked
for, apart from our rows, and never ranked with them.
"""

from __future__ import annotations

SOURCE = (
    "Published: figures of the CW-DPO paper as recorded in third-party notes on it: "
    "Qwen2.5-VL-72B + LoRA, mean of 5 runs, standard deviations unpublished. "
    "A dash: no source gave the figure. Not measured here, not comparable with the rows above, "
    "never ranked with them."
)

SYSTEM_COLUMNS = (
    "COCO BLEU-4",
    "COCO METEOR",
    "COCO CIDEr",
    "COCO SPICE",
    "Flickr30k CIDEr",
    "Flickr30k SPICE",
    "NoCaps in CIDEr",
    "NoCaps near CIDEr",
    "NoCaps out CIDEr",
    "NoCaps entire CIDEr",
    "MMMU",
    "MMBench v1.1",
)

COLUMN_METRICS: tuple[tuple[str, str, str | None], ...] = (
    ("coco", "BLEU-4", None),
    ("coco", "METEOR", None),
    ("coco", "CIDEr", None),
    ("coco", "SPICE", None),
    ("flickr30k", "CIDEr", None),
    ("flickr30k", "SPICE", None),
    ("nocaps", "CIDEr", "in-domain"),
    ("nocaps", "CIDEr", "near-domain"),
    ("nocaps", "CIDEr", "out-domain"),
    ("nocaps", "CIDEr", None),
    ("mmmu", "accuracy", None),
    ("mmbench", "accuracy", None),
)
"""Task, metric and group of each column; the figures are × 100."""

SYSTEMS: dict[str, tuple[float | None, ...]] = {
    "CW-DPO": (39.6, 30.4, 142.6, 25.8, 89.2, 18.6, 125.6, 121.3, 123.7, 123.6, 74.6, 89.6),
    "OPA-DPO": (36.8, None, 138.5, None, 86.7, 18.2, 122.6, 119.4, 121.8, 121.3, 73.1, 87.2),
    "PPO": (None, None, 139.2, *[None] * 7, 72.2, None),
    "DPO": (33.5, None, 137.2, 24.2, 86.5, 18.0, *[None] * 6),
    "SFT": (35.2, *[None] * 11),
}

ABLATION_COLUMNS = ("COCO CIDEr", "MMMU", "MMBench v1.1")

ABLATIONS: dict[str, tuple[float | None, ...]] = {
    "full": (142.6, 74.6, 89.6),
    "no-smooth-sft": (137.6, 71.8, 86.3),
    "no-negative-sampling": (138.9, 72.8, 88.4),
    "hard-constraint": (139.2, 73.2, 88.7),
    "no-cw-dpo": (140.7, 72.9, 86.7),
    "no-cooling": (141.5, 73.6, 88.3),
    "no-filter": (137.4, 73.4, 87.4),
}

DYNAMICS_COLUMNS = ("TV", "JS", "top-1 probability", "ECE")

DYNAMICS: dict[str, tuple[str, ...]] = {
    "DPO": ("≈ 0.45", "≈ 0.30", "over 80 %", "0.12 → 0.25"),
    "CW-DPO": ("≈ 0.15", "≈ 0.10", "50–60 %", "0.08–0.10"),
}

DYNAMICS_NOTE = (
    "How TV, JS and ECE were computed is unpublished. CW-DPO is said to need half the steps."
)
