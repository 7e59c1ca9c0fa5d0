"""Which path a model's family takes in training, found out without its weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm.model import base_of
from cwdpo_bench.vlm.packing import packing_refusal


class Family(NamedTuple):
    """A model's family.

    Attributes:
        model_type: as transformers calls it.
        refusal: why its completions are not packed into one row; None where they are.
    """

    model_type: str
    refusal: str | None


def family_of(name: str) -> Family:
    """The family of a folder, an adapter's folder or a Hub id, from its configuration alone.

    The model is built without memory for its weights, so that its size does not matter and its
    attention is the one that training would get.

    Raises:
        UserError: there is no configuration, or it is not of a vision-language model.
    """
    try:
        config = AutoConfig.from_pretrained(base_of(name))
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {name!r}: no family to tell from its configuration ({told})"
        ) from error
    return Family(config.model_type, packing_refusal(model))
