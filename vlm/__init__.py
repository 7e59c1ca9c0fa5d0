"""A vision-language model as training and evaluation both need it.

Loading, images, batches (plain and packed), the one log-probability operation, and greedy
generation.
"""

from cwdpo_bench.vlm.answering import Generation, answer_batch, generate
from cwdpo_bench.vlm.batch import (
    Batch,
    EncodedPrompt,
    Prompt,
    append_completions,
    batches_by_length,
    build_batch,
    encode_prompt,
    encode_prompts,
    merge_prompts,
)
from cwdpo_bench.vlm.fingerprint import processor_fingerprint, weights_fingerprint
from cwdpo_bench.vlm.generation import Sample, greedy_ids, sample
from cwdpo_bench.vlm.images import MAX_PIXELS, image_to_send, open_image, path_inside, png_of
from cwdpo_bench.vlm.logprobs import (
    Distribution,
    TokenStatistics,
    at_the_head,
    average_confidence,
    completion_hidden,
    completion_statistics,
    frozen_head,
    output_head,
    sequence_logps,
    token_statistics,
)
from cwdpo_bench.vlm.model import VLM, load_vlm
from cwdpo_bench.vlm.packing import (
    batch_completions,
    build_branches,
    pack_completions,
    packing_refusal,
    with_positions,
)
from cwdpo_bench.vlm.quantized import is_quantized, need_bitsandbytes
from cwdpo_bench.vlm.scoring import TokenScores, score_completions
from cwdpo_bench.vlm.sharding import device_of, gathered_weights, is_sharded, reshard
from cwdpo_bench.vlm.vision import (
    embed_images,
    embedding_refusal,
    freeze_vision,
    vision_is_frozen,
    vision_parameters,
)

__all__ = [
    "MAX_PIXELS",
    "VLM",
    "Batch",
    "Distribution",
    "EncodedPrompt",
    "Generation",
    "Prompt",
    "Sample",
    "TokenScores",
    "TokenStatistics",
    "answer_batch",
    "append_completions",
    "at_the_head",
    "average_confidence",
    "batch_completions",
    "batches_by_length",
    "build_batch",
    "build_branches",
    "completion_hidden",
    "completion_statistics",
    "device_of",
    "embed_images",
    "embedding_refusal",
    "encode_prompt",
    "encode_prompts",
    "freeze_vision",
    "frozen_head",
    "gathered_weights",
    "generate",
    "greedy_ids",
    "image_to_send",
    "is_quantized",
    "is_sharded",
    "load_vlm",
    "merge_prompts",
    "need_bitsandbytes",
    "open_image",
    "output_head",
    "pack_completions",
    "packing_refusal",
    "path_inside",
    "png_of",
    "processor_fingerprint",
    "reshard",
    "sample",
    "score_completions",
    "sequence_logps",
    "token_statistics",
    "vision_is_frozen",
    "vision_parameters",
    "weights_fingerprint",
    "with_positions",
]
