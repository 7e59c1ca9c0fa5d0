"""The model card beside a checkpoint: what it is, what it was made from, how to load it.

A Hugging Face model card (`README.md` with a metadata block), from the provenance alone: the same
run gives the same bytes, and no path of the machine stands in it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from cwdpo_bench.files import write_json, write_text
from cwdpo_bench.markup import code, escape

CARD = "README.md"
RECIPE = "recipe.yaml"
PROVENANCE = "provenance.json"
_UNFINISHED = "- **Not finished**: saved in the middle of the training"
_PARTS = [
    "The weights are spread over files of several processes: `cwdpo-bench train … --resume` reads",
    "them, and writes whole ones at the end.",
]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    record: dict[str, Any],
    *,
    adapter: bool,
    model: str,
    curves: bool = True,
    whole: bool = True,
) -> str:
    """The card's text.

    Args:
        record: the provenance; of a run that is not finished, as far as it has come.
        adapter: whether the checkpoint holds a peft adapter, not whole weights.
        model: folder or Hub id that the run started from; its own card may tell the licence.
        curves: whether the held-out curves lie beside it.
        whole: whether its weights can be loaded, and are not spread over processes' own files.
    """
    base, hub = _base(record["model"]["name"])
    licence = _licence(model)
    metadata = ModelCardData(
        base_model=base if hub else None,
        library_name="peft" if adapter else "transformers",
        license=licence,
        pipeline_tag="image-text-to-text",
        tags=["cwdpo-bench", "preference-tuning", record["recipe"]],
    )
    lines = [
        "---",
        metadata.to_yaml().strip(),
        "---",
        "",
        f"# {escape(record['recipe'])} on {escape(base)}",
        "",
        f"Trained by cwdpo-bench {record['versions']['cwdpo-bench']} from {code(base)} with "
        f"recipe {code(record['recipe'])}, seed {record['seed']}.",
        "",
        f"- **Verdict of the learning dynamics**: {escape(record['verdict']['sentence'])}",
        *[
            f"- **{name}**: {code(stage['objective'])}, {stage['pairs']} pairs, "
            f"{stage['steps']} update steps{_settings(stage.get('hyperparameters', {}))}; "
            f"{escape(stage['verdict']['sentence'])}"
            for name, stage in record["stages"].items()
        ],
        *([] if record["status"] == "finished" else [_UNFINISHED]),
        f"- **Data**: {code(record['data']['file'])}, {record['data']['pairs']} pairs, "
        f"{record['data']['probe_pairs']} held out; fingerprint "
        f"{code(record['data']['fingerprint'])}",
        f"- **Weights**: {_weights(record, adapter)}",
        "- **Licence**: "
        + (
            f"that of the base, {code(licence)}"
            if licence
            else "that of the base, which its card here does not tell; look it up before sharing"
        ),
        "- **Versions**: "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        *[f"- **Warning**: {escape(warning)}" for warning in record["warnings"]],
        "",
        "`recipe.yaml` holds every setting, `provenance.json` every figure above and more"
        + (", `dynamics.parquet` and `dynamics.png` the held-out curves." if curves else "."),
        "",
        "## Loading",
        "",
        # A folder's name here leads nowhere else, or to somebody else's model on the Hub.
        *(["```python", *_loading(base if hub else "BASE", adapter), "```"] if whole else _PARTS),
        "",
        "## Scores",
        "",
        "`cwdpo-bench run --model FOLDER` scores it; `cwdpo-bench leaderboard RUN",
        "--format model-index` gives the block of results for the metadata above.",
    ]
    return "\n".join(lines) + "\n"


def write_beside(folder: Path, recipe: str, record: dict[str, Any], model: str) -> None:
    """Write recipe (its text as run), provenance and card beside the weights of a checkpoint."""
    write_text(folder / RECIPE, recipe)
    write_json(folder / PROVENANCE, record)
    write_card(folder, record, model)


def write_card(folder: Path, record: dict[str, Any], model: str) -> None:
    """Write the card, in the place of peft's own where the checkpoint is an adapter."""
    text = model_card(
        record,
        adapter=(folder / "adapter_config.json").is_file(),
        model=model,
        curves=(folder / "dynamics.parquet").is_file(),
        whole=any(folder.glob("*.safetensors")),
    )
    write_text(folder / CARD, text)


def _base(name: str) -> tuple[str, bool]:
    """What the base may be called in public, and whether that is its name on the Hub."""
    if _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name, True
    return Path(name).resolve().name if Path(name).exists() else Path(name).name, False


def _licence(model: str) -> str | None:
    """As the base's own card tells it, in its folder or in the Hub's cache; never from the net."""
    file: Any = Path(model) / CARD
    if not file.is_file():
        file = try_to_load_from_cache(model, CARD) if _HUB_ID.fullmatch(model) else None
    if not isinstance(file, str | Path):
        return None
    try:
        licence = ModelCard.load(file, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.-]+", licence) else None


def _settings(found: dict[str, Any]) -> str:
    """What a stage's steps were taken with, as `record.hyperparameters` tells it."""
    names = {"batch": "batch", "learning_rate": "learning rate", "beta": "β"}
    told = [f"{name} {found[key]:g}" for key, name in names.items() if found.get(key) is not None]
    return "".join(f", {one}" for one in told)


def _weights(record: dict[str, Any], adapter: bool) -> str:
    lora = record.get("lora")
    if lora is None:
        return "all parameters trained, safetensors"
    merged = "" if adapter else ", merged into its base"
    return f"a LoRA adapter of rank {lora['r']}, α {lora['alpha']}{merged}, safetensors"


def _loading(base: str, adapter: bool) -> list[str]:
    if not adapter:
        return [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            'model = AutoModelForImageTextToText.from_pretrained("FOLDER")',
            'processor = AutoProcessor.from_pretrained("FOLDER")',
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"model = AutoModelForImageTextToText.from_pretrained({json.dumps(base)})",
        'model = PeftModel.from_pretrained(model, "FOLDER")',
        'processor = AutoProcessor.from_pretrained("FOLDER")',
    ]
