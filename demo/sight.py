"""The first stage of pre-training: the vision tower learns to see before the text is read to it.

As a real VLM starts from an image encoder that was trained before (CLIP's, say), the tiny one's
tower first names what lies in each of the nine cells: shape, colour, size, and the background.
From pixels and captions alone the loss stays for many hundred steps at that of the language.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cwdpo_bench.demo.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene

_FEATURES: tuple[tuple[str, ...], ...] = (SHAPES, tuple(COLOURS), tuple(SIZES))
_BATCH = 32


@dataclass(frozen=True)
class Images:
    """Images through the processor, in half precision.

    Attributes:
        pixels: [images, 36, 1176] patches, or [images, 3, H, W] where the tower cuts them itself.
        grid: [3], frames, rows and columns of patches, the same for each image; None with whole
            images.
    """

    pixels: torch.Tensor
    grid: torch.Tensor | None = None

    def inputs(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the model takes of these."""
        pixels = self.pixels[list(numbers)].float()
        if self.grid is None:
            return {"pixel_values": pixels}
        return {
            "pixel_values": pixels.flatten(0, 1),
            "image_grid_thw": self.grid.expand(len(numbers), 3),
        }


def cell_labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """[scenes, 9, 4] class numbers: shape, colour and size (0: empty), and background."""
    labels = torch.zeros(len(scenes), 9, 4, dtype=torch.long)
    for number, scene in enumerate(scenes):
        labels[number, :, 3] = tuple(BACKGROUNDS).index(scene.background)
        for thing in scene.things:
            named = (thing.shape, thing.colour, thing.size)
            labels[number, 3 * thing.row + thing.column, :3] = torch.tensor(
                [names.index(name) + 1 for names, name in zip(_FEATURES, named, strict=True)]
            )
    return labels


def learn_to_see(
    model: Any,
    images: Images,
    scenes: Sequence[Scene],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Train the vision tower on the cells' contents; the classifier heads are thrown away.

    Args:
        model: all before its language model is trained in place.
        images: of the scenes.
        scenes: what the images show.
        steps: of 32 images each, one-cycle.
        learning_rate: its peak.
        seed: of the heads and the order.

    Returns:
        The share of the last batch's things whose shape, colour and size are all named rightly.
    """
    labels = cell_labels(scenes)
    weights = [
        weight
        for name, weight in model.model.named_parameters()
        if not name.startswith("language_model.")
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = torch.nn.Linear(model.config.text_config.hidden_size, sum(_CLASSES))
    optimizer = torch.optim.AdamW([*weights, *heads.parameters()], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    rng = random.Random(f"{seed}:sight")
    for _ in range(steps):
        chosen = rng.sample(range(len(scenes)), min(_BATCH, len(scenes)))
        seen = model.model.get_image_features(**images.inputs(chosen), return_dict=True)
        guesses = heads(torch.cat(list(seen.pooler_output))).split(_CLASSES, dim=-1)
        truth = labels[chosen].flatten(0, 1)
        losses = [
            torch.nn.functional.cross_entropy(guess, truth[:, feature])
            for feature, guess in enumerate(guesses)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    right = torch.stack([g.argmax(-1) == truth[:, f] for f, g in enumerate(guesses[:3])]).all(0)
    return float(right[truth[:, 0] > 0].float().mean())


_CLASSES = [*(len(names) + 1 for names in _FEATURES), len(BACKGROUNDS)]
