"""Batches of prompts and completions, built by the model's own processor and chat template.

Layout of a row: `left padding | prompt | completion | right padding`. Every prompt of a batch ends
at the same column, so the completions are one block of columns for any model family, and the head
is applied to that block alone. `vlm/packing.py` puts several completions behind one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn.functional import pad


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
        segments: of a packed batch alone, [R, S] for its R rows of S tokens: 0 on padding, 1 on
            the prompt, 2, 3, … on the completions behind it.
        tail: of a packed batch alone, [T] the columns of a row from the prompts' last token on.
        columns: of a packed batch alone, [B, L] positions in the flattened [R · T] tails of the
            hidden states that predict the targets.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    mask: torch.Tensor
    segments: torch.Tensor | None = None
    tail: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def tensors(self) -> dict[str, Any]:
        """The fields that are there, by name: what a collator returns; `Batch(**…)` undoes it."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        rest = {
            name: value.to(device) for name, value in self.tensors().items() if name != "inputs"
        }
        return Batch(inputs=inputs, **rest)


EncodedPrompt = dict[str, torch.Tensor]
"""The processor's output for one prompt, a batch of one without padding."""

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")
"""Entries that hold a value a token; all others hold images."""


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


def encode_prompt(processor: Any, prompt: Prompt) -> EncodedPrompt:
    """Run the processor on one prompt; `merge_prompts` makes batches of such."""
    return encode_prompts(processor, [prompt])


def merge_prompts(prompts: Sequence[EncodedPrompt], pad_token_id: int) -> dict[str, torch.Tensor]:
    """What `encode_prompts` gives for all prompts at once, from each one's own encoding.

    Token rows are padded on the left. Everything else lies along dimension 0 (rows, images or
    patches, in the prompts' order) and is padded with zeros in the other dimensions: as processors
    do that hold a row's images in one block [1, images, C, H, W] with a mask of its real pixels.
    """
    width = max(prompt["input_ids"].shape[-1] for prompt in prompts)
    blocks = any(_BLOCK_MASK in prompt for prompt in prompts)
    merged: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        parts = [prompt[name] for prompt in prompts if name in prompt]
        if name in PER_TOKEN:
            fill = pad_token_id if name == "input_ids" else 0
            rows = [pad(part, (width - part.shape[-1], 0), value=fill) for part in parts]
            # [B, P], or [3, B, P] for positions in three dimensions.
            merged[name] = torch.cat(rows, dim=-2)
        else:
            if blocks:
                # A block needs a row for every prompt, all zeros where it has no image.
                empty = torch.zeros_like(parts[0][:, :1])
                parts = [prompt.get(name, empty) for prompt in prompts]
            merged[name] = torch.cat(_to_common_shape(parts))
    return merged


_BLOCK_MASK = "pixel_attention_mask"
"""Of the real pixels, beside a block [1, images, C, H, W] for a row's images (Idefics3)."""


def _to_common_shape(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [full - size for full, size in zip(shape, part.shape[1:], strict=True)]
        # `pad` counts from the last dimension on, a pair (before, after) each.
        ends = [n for count in reversed(missing) for n in (0, count)]
        padded.append(pad(part, ends) if any(ends) else part)
    return padded


def completion_ids(tokenizer: Any, completion: str) -> list[int]:
    """Token ids of an answer, the end-of-turn token behind them."""
    ids: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def batches_by_length(
    prompts: Sequence[Prompt], size: int, tails: Sequence[str] | None = None
) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little of a batch is padding.

    Args:
        prompts: image sizes count first, then the texts' lengths.
        size: prompts a batch.
        tails: what stands behind each prompt.
    """

    def length(index: int) -> tuple[int, int]:
        prompt = prompts[index]
        pixels = sum(image.width * image.height for image in prompt.images)
        return pixels, len(prompt.text) + (0 if tails is None else len(tails[index]))

    order = sorted(range(len(prompts)), key=length)
    for start in range(0, len(order), size):
        yield order[start : start + size]


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
    inputs.pop("position_ids", None)
    targets, mask = pad_completions(completions)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], targets], dim=1)
    inputs["attention_mask"] = torch.cat(
        [inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], dim=1
    )
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(targets)], dim=1)
    return Batch(inputs=inputs, targets=targets, mask=mask)


def pad_completions(completions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, L] of N completions, 0 where padded, and the mask of their tokens."""
    length = max(len(ids) for ids in completions)
    targets = torch.zeros(len(completions), length, dtype=torch.long)
    mask = torch.zeros(len(completions), length, dtype=torch.bool)
    for row, ids in enumerate(completions):
        targets[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return targets, mask
