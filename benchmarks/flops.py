"""Model FLOPs utilization: the work that a pair needs, over what the device could do meanwhile.

    MFU = pairs a second × FLOPs a pair / peak FLOPs a second

after Chowdhery et al., "PaLM" (JMLR 2023), appendix B: only the work that the model's mathematics
asks for, so what is recomputed, padded, encoded twice or scored by a reference in each step counts
as time and not as work. A pair of prompt P and two answers of L tokens needs, once, P + 2L tokens
in every layer, in the last one keys and values of them all and the rest for the 2L + 1 tokens that
predict or are answers, and the head on 2L. A product of [m, k] and [k, n] is 2mkn; attention is two
products over all tokens of the row, no triangle spared, as in PaLM. The backward pass has each
product twice, for what flows back and for the weight: with LoRA not for frozen weights, and into
the first layer's query, key and value nothing flows back. The tower is frozen and needs nothing.

`tests/benchmarks/test_gpu.py` holds the count to that of torch's FlopCounterMode.
"""

from __future__ import annotations

from shapes import Qwen  # type: ignore[import-not-found]

PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Peak bfloat16 TFLOP/s of dense products with fp32 sums, by what the device's name holds.

The first that fits. Source: NVIDIA's data sheets of each product, where they state the rate with
structured sparsity (H100, H200, B200) half of it; for the two GeForce cards NVIDIA's white papers
of the Ada and Ampere (GA102) architectures, A10G as AWS states it.
"""


def peak_flops(device: str) -> float | None:
    """FLOP/s of a device by its name, None where the table has none."""
    return next((1e12 * peak for name, peak in PEAKS.items() if name in device), None)


def pair_flops(size: Qwen, *, lora: bool, prefix: int, completion: int, rank: int = 16) -> float:
    """The FLOPs of a training step that one pair needs, forward and backward.

    Args:
        size: the language model's sizes.
        lora: adapters alone are trained, else the whole language model.
        prefix: tokens of the prompt, its image's among them.
        completion: tokens of each answer.
        rank: of the adapters.
    """
    tokens, tail = prefix + 2 * completion, 2 * completion + 1
    work = 0.0
    for layer in range(size.layers):
        last = layer == size.layers - 1
        queries = tail if last else tokens
        # Query, key, value, output, gate, up, down.
        for place, (inputs, outputs) in enumerate(size.linears):
            rows = tokens if place in (1, 2) else queries
            product = 2.0 * rows * inputs * outputs
            stops_here = lora and layer == 0 and place < 3
            work += product * (1 + (not stops_here) + (not lora))
            if lora:
                down, up = 2.0 * rows * inputs * rank, 2.0 * rows * rank * outputs
                work += down * (2 + (not stops_here)) + 3 * up
        work += 3 * 4.0 * queries * tokens * size.hidden
    head = 2.0 * 2 * completion * size.hidden * size.vocabulary
    return work + head * (2 if lora else 3)


def utilization(pairs_a_second: float, flops_a_pair: float, peak: float) -> float:
    """MFU, a share of one."""
    return pairs_a_second * flops_a_pair / peak
