"""Loading a vision-language model: a folder, a Hub id, or a LoRA adapter on its base."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm.cpu import ready_for_cpu
from cwdpo_bench.vlm.quantized import (
    four_bits,
    is_quantized,
    keep_weights_as_they_are,
    refuse_none_quantized,
)
from cwdpo_bench.vlm.sharding import device_of, is_sharded
from cwdpo_bench.vlm.vision import batch_windows, multiply_patches


@dataclass(frozen=True)
class VLM:
    """A model, its processor, and the name under which the user asked for it."""

    model: Any
    processor: Any
    name: str

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows up; the end-of-turn token where the tokenizer has none."""
        token = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)

    @property
    def context_length(self) -> int | None:
        """Most tokens of a prompt and its answer together; None where the model does not say."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if length is None else int(length)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return device_of(self.model)


def cache_name(known: Container[str]) -> str:
    """What transformers calls kept keys and values: the name changed within its version 5.

    Args:
        known: the names of a function's parameters, of its arguments, or of an output's fields.
    """
    return "cache" if "cache" in known else "past_key_values"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and back as it was afterwards."""
    training = model.training
    model.eval()
    try:
        # What FSDP gathers under inference mode could not take part in a backward pass later.
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            yield
    finally:
        model.train(training)


def load_vlm(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    trainable: bool = False,
    load_in_4bit: bool = False,
    dequantize: bool = False,
) -> VLM:
    """Load a vision-language model and its processor.

    Args:
        name: a local folder (full model or LoRA adapter) or a Hub id.
        dtype: default bfloat16 on an accelerator, float32 on a CPU.
        device: default the accelerator where there is one.
        trust_remote_code: let the repository's own code run; off unless the user asks.
        trainable: leave an adapter's weights trainable.
        load_in_4bit: keep the language model's linear layers in NF4, see `vlm/quantized.py`.
        dequantize: bring weights that were saved in few bits back to `dtype`.

    Raises:
        UserError: missing, no safetensors weights, not a vision-language model, or 4 bits are asked
            for and bitsandbytes or the family does not allow them.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    name = str(name)
    folder = Path(name)
    _refuse_missing(name, folder)
    adapter = folder / "adapter_config.json"
    base = base_of(name)
    try:
        processor_source = name if _has_processor(folder) or base == name else base
        processor: Any = AutoProcessor.from_pretrained(
            processor_source, trust_remote_code=trust_remote_code
        )
        settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        if load_in_4bit:
            quantization = four_bits(base, dtype, trust_remote_code=trust_remote_code)
            settings.update(quantization_config=quantization, device_map={"": str(device)})
        model: Any = AutoModelForImageTextToText.from_pretrained(
            base, use_safetensors=True, **settings
        )
        if load_in_4bit:
            refuse_none_quantized(model, name)
        if is_quantized(model) and dequantize:
            model = model.dequantize(dtype)
        keep_weights_as_they_are(model)
        if is_quantized(model) and trainable:
            # Norms, embeddings and head in fp32, all frozen: as QLoRA trains, and its users expect.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if adapter.is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise UserError(f"{folder}: no adapter_model.safetensors; save it as safetensors")
            model = PeftModel.from_pretrained(model, name, is_trainable=trainable)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {name!r} cannot be loaded: {_first_lines(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise UserError(f"model {name!r} has no image processor; name a vision-language model")
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"model {name!r} has no chat template; save one with its processor")
    model.to(device).eval()
    multiply_patches(model)
    batch_windows(model)
    ready_for_cpu(model)
    return VLM(model=model, processor=processor, name=name)


def _refuse_missing(name: str, folder: Path) -> None:
    """A path that is not there is not asked of the Hub, whose answer speaks of repositories."""
    looks_like_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"model {name!r} is a file; name the folder that holds config.json")
        if not any((folder / f).is_file() for f in ("config.json", "adapter_config.json")):
            raise UserError(
                f"model {name!r}: neither config.json nor adapter_config.json in that folder"
            )
    elif looks_like_path:
        raise UserError(f"model {name!r}: no such folder")


def base_of(name: str) -> str:
    """The model below the adapter in a folder; any other name is its own base.

    Raises:
        UserError: the adapter does not say, or its base is not there.
    """
    adapter_config = Path(name) / "adapter_config.json"
    if not adapter_config.is_file():
        return name
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter_config}: cannot read base_model_name_or_path") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter_config}: base_model_name_or_path is empty; name the base model")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{adapter_config}: the base model {base} is not there; mend the path")
    return base


def _has_processor(folder: Path) -> bool:
    names = ("processor_config.json", "preprocessor_config.json")
    return any((folder / name).is_file() for name in names)


def _first_lines(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " …"
