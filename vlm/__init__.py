"""A vision-language model as training and evaluation both need it.

Loading, images, batches, the one log-probability operation, and greedy generation.
"""

from cwdpo_bench.vlm.batch import Batch, Prompt, append_completions, build_batch, encode_prompts
from cwdpo_bench.vlm.generation import Generation, TokenScores, generate, score_completions
from cwdpo_bench.vlm.images import open_image, path_inside
from cwdpo_bench.vlm.logprobs import (
    Distribution,
    TokenStatistics,
    average_confidence,
    completion_hidden,
    completion_statistics,
    output_head,
    sequence_logps,
    token_statistics,
)
from cwdpo_bench.vlm.model import VLM, load_vlm

__all__ = [
    "VLM",
    "Batch",
    "Distribution",
    "Generation",
    "Prompt",
    "TokenScores",
    "TokenStatistics",
    "append_completions",
    "average_confidence",
    "build_batch",
    "completion_hidden",
    "completion_statistics",
    "encode_prompts",
    "generate",
    "load_vlm",
    "open_image",
    "output_head",
    "path_inside",
    "score_completions",
    "sequence_logps",
    "token_statistics",
]
