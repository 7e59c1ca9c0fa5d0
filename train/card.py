"""The model card beside a checkpoint: what it is, what it was made from, how to load it.

A Hugging Face model card (`README.md` with a metadata block), from the recipe and the provenance
alone: the same run gives the same bytes, and no path of the machine stands in it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from cwdpo_bench.files import write_text
from cwdpo_bench.markup import code, escape
from cwdpo_bench.train.recipe import Recipe

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(recipe: Recipe, record: dict[str, Any], *, adapter: bool, model: str) -> str:
    """The card's text.

    Args:
        recipe: as run.
        record: the finished provenance.
        adapter: whether the checkpoint holds a peft adapter, not whole weights.
        model: folder or Hub id that the run started from; its own card may tell the licence.
    """
    base, hub = _base(record["model"]["name"])
    licence = _licence(model)
    metadata = ModelCardData(
        base_model=base if hub else None,
        library_name="peft" if adapter else "transformers",
        license=licence,
        pipeline_tag="image-text-to-text",
        tags=["cwdpo-bench", "preference-tuning", recipe.name],
    )
    lines = [
        "---",
        metadata.to_yaml().strip(),
        "---",
        "",
        f"# {escape(recipe.name)} on {escape(base)}",
        "",
        f"Trained by cwdpo-bench {record['versions']['cwdpo-bench']} from {code(base)} with "
        f"recipe {code(recipe.name)}, seed {record['seed']}.",
        "",
        f"- **Verdict of the learning dynamics**: {escape(record['verdict']['sentence'])}",
        *[
            f"- **{name}**: {code(stage['objective'])}, {stage['pairs']} pairs, "
            f"{stage['steps']} update steps; {escape(stage['verdict']['sentence'])}"
            for name, stage in record["stages"].items()
        ],
        f"- **Data**: {code(record['data']['file'])}, {record['data']['pairs']} pairs, "
        f"{record['data']['probe_pairs']} held out; fingerprint "
        f"{code(record['data']['fingerprint'])}",
        f"- **Weights**: {_weights(recipe, adapter)}",
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
        "`recipe.yaml` holds every setting, `provenance.json` every figure above and more,",
        "`dynamics.parquet` and `dynamics.png` the held-out curves.",
        "",
        "## Loading",
        "",
        "```python",
        # A folder's name here leads nowhere else, or to somebody else's model on the Hub.
        *_loading(base if hub else "BASE", adapter),
        "```",
        "",
        "## Scores",
        "",
        "`cwdpo-bench run --model FOLDER` scores it; `cwdpo-bench leaderboard RUN",
        "--format model-index` gives the block of results for the metadata above.",
    ]
    return "\n".join(lines) + "\n"


def write_card(folder: Path, recipe: Recipe, record: dict[str, Any], model: str) -> None:
    """Write the card, in the place of peft's own where the checkpoint is an adapter."""
    adapter = (folder / "adapter_config.json").is_file()
    text = model_card(recipe, record, adapter=adapter, model=model)
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


def _weights(recipe: Recipe, adapter: bool) -> str:
    if not adapter:
        return "all parameters trained, safetensors"
    return f"a LoRA adapter of rank {recipe.lora.r}, α {recipe.lora.alpha}, safetensors"


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
