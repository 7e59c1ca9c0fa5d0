"""What the benchmarks share: a Qwen2.5-VL and pairs of a given shape, one run of our trainer.

Everything is made from a seed, nothing is fetched. The model is the demo's tiny one, or of given
sizes with random weights, made where it runs. Time is the process's own on its processor, so
that other work on the machine counts little; wall time stands beside it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shapes import Qwen  # type: ignore[import-not-found]
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLImageProcessor,
    TrainerCallback,
    TrainingArguments,
)

from cwdpo_bench.demo.tiny import build_processor, build_tiny_vlm
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.sections import DPO
from cwdpo_bench.train.trainer import (
    PairCollator,
    PreferenceTrainer,
    autocast_of,
    reference_scores,
)
from cwdpo_bench.vlm import VLM, freeze_vision, load_vlm
from cwdpo_bench.vlm.vision import batch_windows, multiply_patches

BETA = 0.1
WARM_UP = 3
WORDS = ("red", "blue", "green", "left", "right", "yellow", "a", "above", "below")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One workload; lengths in tokens, the end-of-turn token of a completion included.

    `sizes` are the fields of a `shapes.Qwen`; without them the model is the demo's. Weights, and
    steps, are in bfloat16 where `bf16` says so.
    """

    name: str
    width: int
    height: int
    prefix: int
    completion: int
    batch: int
    lora: bool = False
    frozen: bool = False
    vocabulary: int | None = None
    sizes: dict[str, Any] | None = None
    device: str | None = None
    bf16: bool = False
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Of a pair, its prompt counted once."""
        return self.prefix + 2 * self.completion


def make_folder(shape: Shape, folder: Path, pairs: int) -> None:
    """Write a model folder and `pairs.jsonl` with its images."""
    processor = build_processor()
    size: dict[str, Any] = {"min_pixels": 28 * 28, "max_pixels": shape.width * shape.height}
    size.update(patch_size=14, merge_size=2, temporal_patch_size=2)
    processor.image_processor = Qwen2VLImageProcessor(**size)
    if shape.sizes is None:
        model, _ = build_tiny_vlm(seed=0)
        if shape.vocabulary is not None:
            model.resize_token_embeddings(shape.vocabulary, mean_resizing=False)
        model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    image_tokens = (shape.width // 28) * (shape.height // 28)
    # The chat template takes nine tokens beside the image and the text: checked by the worker.
    words = shape.prefix - image_tokens - _template_tokens(processor)
    rows = []
    for i in range(pairs):
        pixels = rng.integers(0, 255, (shape.height, shape.width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        prompt, chosen, rejected = (
            " ".join(rng.choice(WORDS, n))
            for n in (words, shape.completion - 1, shape.completion - 1)
        )
        row = {"id": str(i), "images": [f"{i}.png"], "prompt": prompt}
        rows.append(json.dumps({**row, "chosen": chosen, "rejected": rejected}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))


def _template_tokens(processor: Any) -> int:
    content = [{"type": "image"}, {"type": "text", "text": "red"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    # One token each for the image placeholder and the word.
    return len(processor.tokenizer(text)["input_ids"]) - 2


def arguments(shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """The same `TrainingArguments` for every trainer that is measured."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": shape.batch,
        "max_steps": steps,
        "learning_rate": 1e-5 if shape.sizes else 1e-3 if shape.lora else 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": shape.checkpointing,
        "bf16": shape.bf16,
        "use_cpu": shape.device == "cpu" or not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }


def load(shape: Shape, folder: Path) -> VLM:
    """The model as both trainers start from it, adapters with the same random start."""
    dtype = torch.bfloat16 if shape.bf16 else torch.float32
    if shape.sizes is None:
        vlm = load_vlm(folder / "model", dtype=dtype, device=shape.device)
    else:
        vlm = _random(Qwen(**shape.sizes), folder, dtype, shape.device or "cuda")
    if shape.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(0)
        vlm = VLM(get_peft_model(vlm.model, config), vlm.processor, vlm.name)
    if shape.frozen:
        freeze_vision(vlm.model)
    return vlm


def _random(size: Qwen, folder: Path, dtype: torch.dtype, device: str) -> VLM:
    """A model of these sizes with random weights, and the folder's processor."""
    processor: Any = AutoProcessor.from_pretrained(folder / "model")
    tokenizer = processor.tokenizer
    config = size.config()
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    config.vision_end_token_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    multiply_patches(model)
    batch_windows(model)
    return VLM(model, processor, size.name)


class Meter(TrainerCallback):
    """Seconds a step after the warm-up, and the peak of memory above the loaded model.

    On an accelerator a step is over when its kernels are.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._work: list[float] = []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self._loaded = _memory("VmRSS")
        self._started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())
        self._work.append(time.process_time())

    def result(self, trainer: Any) -> dict[str, Any]:
        """The figures of a run that is over."""
        wall, work = (np.diff(times)[WARM_UP - 1 :] for times in (self._times, self._work))
        return {
            "step_seconds": float(np.median(work)),
            "wall_seconds": float(np.median(wall)),
            "total_seconds": self._work[-1] - self._started,
            "loaded_bytes": self._loaded,
            "peak_bytes": _memory("VmHWM") - self._loaded,
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        }


def _memory(field: str) -> int:
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        return peak if field == "VmHWM" else torch.cuda.memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def run_ours(shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """DPO with our trainer: preparation and reference scores are in the total, not in the steps."""
    vlm = load(shape, folder)
    pairs = read_pairs(folder / "pairs.jsonl").pairs
    meter = Meter()
    settings = TrainingArguments(**arguments(shape, folder, steps))
    prepared = PreparedPairs(vlm, pairs, folder=folder, autocast=lambda: autocast_of(settings))
    found = {prepared.length(pair) for pair in pairs}
    if found != {shape.tokens}:
        raise RuntimeError(f"pairs of {sorted(found)} tokens, not {shape.tokens}")
    reference = reference_scores(
        vlm, pairs, shape.batch, prepared=prepared, autocast=lambda: autocast_of(settings)
    )
    trainer = PreferenceTrainer(
        model=vlm.model,
        args=settings,
        data_collator=PairCollator(prepared, ("chosen", "rejected")),
        objective=DPO(kind="dpo", beta=BETA),
        pairs=pairs,
        reference=reference,
        cooling=None,
        callbacks=[meter],
    )
    trainer.train()
    return meter.result(trainer)


def in_fresh_process(script: str, worker: str, shape: Shape, folder: Path, steps: int) -> Any:
    """Run `script` as a worker in a process of its own and read its JSON."""
    values = json.dumps(dataclasses.asdict(shape))
    command = [sys.executable, script, "--worker", worker, values, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def serve_worker(runners: dict[str, Any]) -> bool:
    """In a worker process: run what the command line asks for and print the JSON."""
    if "--worker" not in sys.argv:
        return False
    worker, values, folder, steps = sys.argv[sys.argv.index("--worker") + 1 :]
    result = runners[worker](Shape(**json.loads(values)), Path(folder), int(steps))
    print(json.dumps(result))
    return True
