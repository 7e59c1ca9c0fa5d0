"""Batches of prompts and completions, built by the model's own processor and chat template.

Layout of a row: `left padding | prompt | completion | right padding`. Every prompt of a batch ends
at the same column, so the completions are one block of columns for any model family, and the head
is applied to that block alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image


class Prompt(NamedTuple):
    """One user turn: the images first, then the text."""

    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Model inputs for B rows and their completions, padded on the right to L tokens.

    Attributes:
        inputs: what the model's forward takes; `input_ids` is [B, P + L], P the prompts' width.
        targets: [B, L] completion token ids, 0 where padded.
        mask: [B, L] True on completion tokens, the end-of-turn token included.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(moved, self.targets.to(device), self.mask.to(device))


def chat_text(processor: Any, prompt: Prompt) -> str:
    """The prompt as the model's chat template writes it, up to where its answer starts."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in prompt.images]
    content.append({"type": "text", "text": prompt.text})
    messages = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Run the processor on a batch of prompts, padded on the left."""
    texts = [chat_text(processor, prompt) for prompt in prompts]
    images = [list(prompt.images) for prompt in prompts] if any(p.images for p in prompts) else None
    encoded = processor(
        text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"
    )
    return dict(encoded)


def completion_ids(tokenizer: Any, completion: str) -> list[int]:
    """Token ids of an answer, the end-of-turn token behind them."""
    ids: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def build_batch(processor: Any, prompts: Sequence[Prompt], completions: Sequence[str]) -> Batch:
    """One row a (prompt, completion)."""
    ids = [completion_ids(processor.tokenizer, completion) for completion in completions]
    return append_completions(encode_prompts(processor, prompts), ids)


def append_completions(
    prompt_inputs: dict[str, torch.Tensor], completions: Sequence[Sequence[int]]
) -> Batch:
    """Put completions behind left-padded prompts.

    Args:
        prompt_inputs: the processor's output for B prompts.
        completions: R·B lists of token ids; row i belongs to prompt i mod B. With R > 1 (chosen
            rows, then rejected rows) the prompts' tensors are repeated R times.
    """
    rows = prompt_inputs["input_ids"].shape[0]
    repeats, rest = divmod(len(completions), rows)
    if rest or not repeats:
        raise ValueError(f"{len(completions)} completions for {rows} prompts")
    # Along dimension 0 lie rows, images or patches, always in the prompts' order: to repeat the
    # whole tensor repeats the batch for every processor.
    inputs = {name: torch.cat([value] * repeats) for name, value in prompt_inputs.items()}
    length = max(len(ids) for ids in completions)
    targets = torch.zeros(len(completions), length, dtype=torch.long)
    mask = torch.zeros(len(completions), length, dtype=torch.bool)
    for row, ids in enumerate(completions):
        targets[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    inputs["input_ids"] = torch.cat([inputs["input_ids"], targets], dim=1)
    inputs["attention_mask"] = torch.cat(
        [inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], dim=1
    )
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(targets)], dim=1)
    return Batch(inputs=inputs, targets=targets, mask=mask)
