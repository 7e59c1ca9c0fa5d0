"""What a training needs of each device's memory, on paper.

    python benchmarks/memory_plan.py                      # the table of docs/SCALING.md
    python benchmarks/memory_plan.py --devices 16 --tokens 2048

All in bytes a device, one packed pair of T tokens a forward (its image, prompt and both answers):

- weights: what is kept of them between layers;
- gradients and optimizer (AdamW): of what is trained, in fp32;
- gathered: of spread weights the two layers that are whole at a time, the embeddings and the head;
- activations: a layer's input a token (2 · hidden, bf16) for every layer, checkpointed; one layer's
  inner ones (8 · intermediate + 24 · hidden) and as much again for their gradients; the mask; a
  block of 2²⁴ logits in bf16, fp32 and its gradient;
- rest: what the runtime, the communication and the allocator keep for themselves, by rule of thumb.

The reference costs nothing here: its log-probabilities are computed once and lie in the host's
memory. A second model would cost as much as the first one's weights once more.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from shapes import SIZES, Qwen  # type: ignore[import-not-found]

BF16, FP32 = 2, 4
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A number in 4 bits, an 8-bit scale for 64 of them, and an fp32 scale for 256 scales."""
GRADIENT, ADAM = FP32, 2 * FP32
BLOCK = 2**24
REST = 4e9
DEVICE = 80e9
RANK = 16


class Plan(NamedTuple):
    """Bytes on a device."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self) + REST


class Way(NamedTuple):
    """How a model is trained: what, and whether its weights are spread over the devices."""

    name: str
    lora: bool
    bits: int = 16
    spread: bool = True


WAYS = (
    Way("LoRA r 16, FSDP2", lora=True),
    Way("LoRA r 16, DDP", lora=True, spread=False),
    Way("QLoRA r 16, DDP", lora=True, bits=4, spread=False),
    Way("full, FSDP2", lora=False),
)


def activations(size: Qwen, tokens: int) -> float:
    """Bytes that a checkpointed forward keeps, and the largest layer's on the way back."""
    kept = size.layers * tokens * BF16 * size.hidden
    layer = tokens * (8 * size.intermediate + 24 * size.hidden)
    mask = BF16 * tokens**2
    return kept + 2 * layer + mask + BLOCK * (BF16 + 2 * FP32)


def plan(size: Qwen, way: Way, *, devices: int, tokens: int) -> Plan:
    """The bytes of one size, trained one way."""
    share = devices if way.spread else 1
    trained = size.adapters(RANK) if way.lora else size.parameters
    if not way.lora:
        # Masters in fp32; a layer is gathered in bf16.
        weights = FP32 * size.parameters
    elif way.bits == 4:
        linear = size.layers * sum(a * b for a, b in size.linears)
        # peft prepares what stays whole in fp32.
        weights = NF4 * linear + FP32 * (size.parameters - linear + trained)
    else:
        weights = BF16 * size.parameters + FP32 * trained
    gathered = BF16 * (2 * size.layer + 2 * size.embedding) if way.spread else 0
    if not way.lora:
        # A layer's gradients before they are summed and cut.
        gathered += FP32 * size.layer
    return Plan(
        weights=weights / share,
        gradients=GRADIENT * trained / share,
        optimizer=ADAM * trained / share,
        gathered=gathered,
        activations=activations(size, tokens),
    )


def table(devices: int, tokens: int) -> str:
    """Markdown: gigabytes (10⁹) a device, and how many such devices would do."""
    head = ["model", "way", "weights", "gradients", "optimizer", "gathered", "activations", "sum"]
    lines = [f"| {' | '.join([*head, 'fits 80 GB', 'devices needed'])} |", f"|{' --- |' * 10}"]
    for size in SIZES.values():
        if size.name == "3B":
            continue
        for way in WAYS:
            found = plan(size, way, devices=devices, tokens=tokens)
            cells = [f"{value / 1e9:.1f}" for value in (*found, found.total)]
            fits = "yes" if found.total <= DEVICE else "no"
            needed = next(
                (str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128) if _fits(size, way, n, tokens)), "–"
            )
            lines.append(f"| {' | '.join([size.name, way.name, *cells, fits, needed])} |")
    return "\n".join(lines)


def _fits(size: Qwen, way: Way, devices: int, tokens: int) -> bool:
    return plan(size, way, devices=devices, tokens=tokens).total <= DEVICE


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1152, help="of a packed pair")
    options = parser.parse_args()
    print(table(options.devices, options.tokens))


if __name__ == "__main__":
    main()
