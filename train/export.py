"""A checkpoint as others load it: an adapter merged into its base, a full model as it is."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import read_json
from cwdpo_bench.train.card import PROVENANCE, RECIPE, write_beside
from cwdpo_bench.train.checkpoints import disk_errors
from cwdpo_bench.vlm import load_vlm


def export_checkpoint(checkpoint: str, output: Path, *, merge: bool) -> str:
    """Write model and processor, without what belongs to the training alone; says what was written.

    Args:
        checkpoint: folder of a full model or of an adapter.
        output: a folder that is not there yet, or empty.
        merge: add an adapter's product to its base's weights, so that it loads without peft.

    Raises:
        UserError: nothing to load there, an adapter is to be merged and `merge` is not said, or the
            output holds files.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name a new folder with --output")
    vlm = load_vlm(checkpoint, dtype=None, dequantize=merge)
    model, what = vlm.model, "a full model"
    if isinstance(model, PeftModel):
        if not merge:
            raise UserError(
                f"{checkpoint}: is an adapter, which peft loads as it is; say --merge to write a "
                "model without one"
            )
        model, what = model.merge_and_unload(safe_merge=True), "an adapter merged into its base"
    with disk_errors(output):
        model.save_pretrained(str(output))
        vlm.processor.save_pretrained(str(output))
    made, recipe = Path(checkpoint) / PROVENANCE, Path(checkpoint) / RECIPE
    if made.is_file() and recipe.is_file():
        exported = {"checkpoint": str(Path(checkpoint).resolve()), "merged": merge}
        record = {**read_json(made), "exported": exported}
        write_beside(output, recipe.read_text("utf-8"), record, record["model"]["name"])
    return what
