"""The sizes of Qwen2.5-VL as their published configurations have them, and what follows from them.

Parameters are counted from the sizes; `tests/benchmarks/test_memory_plan.py` counts those of the
same models built without memory (on torch's meta device).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "window_size": 112}
VISION |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


@dataclass(frozen=True)
class Qwen:
    """A size of Qwen2.5-VL; `kv` are the key and value heads, of `hidden / heads` numbers each."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv: int
    vocabulary: int
    tied: bool
    vision_intermediate: int
    vision: dict[str, Any] | None = None

    @property
    def _vision(self) -> dict[str, Any]:
        return VISION if self.vision is None else self.vision

    @property
    def kv_size(self) -> int:
        """Numbers of a token's keys, or of its values."""
        return self.kv * self.hidden // self.heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a decoder layer's linear layers, which adapters go to."""
        h, i, kv = self.hidden, self.intermediate, self.kv_size
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer: its linear layers, three biases, two norms."""
        weights = sum(a * b for a, b in self.linears)
        return weights + self.hidden + 2 * self.kv_size + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embeddings, and of the head where it is not the same matrix."""
        return self.vocabulary * self.hidden

    @property
    def tower(self) -> int:
        """Parameters between pixels and language model."""
        v = self._vision
        h, i = v["hidden_size"], self.vision_intermediate
        merged = h * v["spatial_merge_size"] ** 2
        block = 4 * h * h + 4 * h + 3 * h * i + 2 * i + h + 2 * h
        patches = h * 3 * v["temporal_patch_size"] * v["patch_size"] ** 2
        merger = merged * merged + merged + merged * self.hidden + self.hidden + h
        return int(v["depth"] * block + patches + merger)

    @property
    def parameters(self) -> int:
        """All of them."""
        heads = 1 if self.tied else 2
        return heads * self.embedding + self.layers * self.layer + self.hidden + self.tower

    def adapters(self, r: int) -> int:
        """Parameters of adapters of rank r on all linear layers of the language model."""
        return self.layers * r * sum(a + b for a, b in self.linears)

    def config(self) -> Any:
        """What transformers builds the model from."""
        from transformers import Qwen2_5_VLConfig

        head = self.hidden // self.heads
        third = head // 8
        return Qwen2_5_VLConfig(
            text_config={
                "hidden_size": self.hidden,
                "intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv,
                "vocab_size": self.vocabulary,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1000000.0,
                    "mrope_section": [head // 2 - 2 * (3 * third // 2), *[3 * third // 2] * 2],
                },
            },
            vision_config={
                **self._vision,
                "intermediate_size": self.vision_intermediate,
                "out_hidden_size": self.hidden,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            tie_word_embeddings=self.tied,
        )


SIZES = {
    size.name: size
    for size in (
        Qwen("3B", 36, 2048, 11008, 16, 2, 151936, True, 3420),
        Qwen("7B", 28, 3584, 18944, 28, 4, 152064, False, 3420),
        Qwen("32B", 64, 5120, 27648, 40, 8, 152064, False, 3456),
        Qwen("72B", 80, 8192, 29568, 64, 8, 152064, False, 3456),
    )
}
