"""A base whose linear layers are kept in 4 bits while adapters on it are trained (QLoRA).

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (NeurIPS 2023): NF4 numbers in
blocks of 64 (section 3), their scales quantized once more (double quantization). bitsandbytes does
it, transformers puts it into the model. Only the language model's layers are: the vision tower and
the head stay as they are.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from cwdpo_bench.errors import UserError

_FOUR_BITS = "Linear4bit"


def four_bits(base: str, dtype: torch.dtype, *, trust_remote_code: bool) -> BitsAndBytesConfig:
    """What `from_pretrained` is told so that the language model's linear layers come in NF4.

    Args:
        base: folder or Hub id of a model whose weights are not quantized yet.
        dtype: in which a layer's product is computed.
        trust_remote_code: as for the model.

    Raises:
        UserError: bitsandbytes is not there, or does not run.
    """
    need_bitsandbytes()
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        skeleton: Any = AutoModelForImageTextToText.from_config(
            config, trust_remote_code=trust_remote_code
        )
    language = set(skeleton.get_decoder().modules())
    others = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and module not in language
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,
    )


def need_bitsandbytes() -> None:
    """Raise where weights in 4 bits cannot be had.

    Raises:
        UserError: bitsandbytes is not installed, or does not load.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "weights in 4 bits need bitsandbytes: pip install 'cwdpo-bench[qlora]', or set "
            "model.load_in_4bit=false"
        )
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        # It looks for libraries of the accelerator when it is imported, and says so in many ways.
        raise UserError(
            f"bitsandbytes does not load here ({' '.join(str(error).split())}); mend it, or set "
            "model.load_in_4bit=false"
        ) from error


def refuse_none_quantized(model: Any, name: str) -> None:
    """Raise where a model that was to come in 4 bits has no layer in 4 bits.

    Raises:
        UserError: its language model has no linear layers of the kind that bitsandbytes replaces.
    """
    if not any(type(module).__name__ == _FOUR_BITS for module in model.modules()):
        raise UserError(
            f"model {name!r}: model.load_in_4bit: the language model of the family "
            f"{model.config.model_type!r} has no linear layers that bitsandbytes can replace; "
            "remove the key"
        )


def keep_weights_as_they_are(model: Any) -> None:
    """Let no forward pass of bitsandbytes change weights in 4 bits.

    On processors with AVX512-BF16 one in evaluation mode turns them, in place, into a form that has
    no gradient, is multiplied in bfloat16 and does not exist for rows that 64 does not divide.
    """
    for module in model.modules():
        if type(module).__name__ == _FOUR_BITS:
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: Any) -> bool:
    """Whether weights of the model, or of the base below its adapters, are kept in few bits."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(inner, "hf_quantizer", None) is not None
