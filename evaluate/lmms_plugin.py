"""What lmms-eval finds under its entry point `lmms_eval.models`: this package's engine as a model.

`python -m lmms_eval --model cwdpo_bench --model_args pretrained=CHECKPOINT` then runs adapters and
folders as `cwdpo-bench run` does (`evaluate/lmms_model.py`, which imports torch and waits for it).
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The name and the class, as lmms-eval's registry wants them."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="cwdpo_bench",
        simple_class_path="cwdpo_bench.evaluate.lmms_model.CwdpoBench",
    )
