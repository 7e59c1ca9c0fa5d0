"""What a model's answers follow from, in digests: its weights' contents and its processor."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from cwdpo_bench.vlm.sharding import reshard, whole


def weights_fingerprint(model: Any) -> str:
    """Of all parameters, adapters included: names, shapes, types, values, and scales of 4 bits."""
    digest = hashlib.sha256()
    reshard(model)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        values = whole(parameter.detach()).cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy().data)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            # Numbers in 4 bits are the same for weights of another scale.
            for key, scales in sorted(state.as_dict(packed=True).items()):
                digest.update(
                    key.encode() + scales.cpu().contiguous().view(torch.uint8).numpy().data
                )
    return digest.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """Of tokenizer, image processor and chat template."""
    # What it saves is all that it does; its tokenizer's settings also say how it was loaded.
    special = json.dumps(processor.tokenizer.special_tokens_map, sort_keys=True)
    digest = hashlib.sha256(special.encode())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            content = file.read_bytes()
            if file.name == "tokenizer_config.json":
                continue
            if file.name == "tokenizer.json":
                # How the last batch was padded stands there too.
                values = {**json.loads(content), "padding": None, "truncation": None}
                content = json.dumps(values, sort_keys=True).encode()
            digest.update(file.name.encode() + b"\n" + content)
    return digest.hexdigest()
