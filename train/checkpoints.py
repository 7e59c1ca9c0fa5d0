"""Checkpoints on disk, the last whole one and a finished stage's; a full disk or memory, told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import processes
from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.vlm import VLM


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The Trainer writes `trainer_state.json` last: a checkpoint without it was cut off."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The update step at which a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Every library says in its own way that the disk is full; users get one."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        signs = ("No space left", "File too large", "PytorchStreamWriter", "os error 28")
        if not any(sign in text for sign in signs):
            raise
        raise UserError(
            f"{folder}: a checkpoint cannot be written ({text.splitlines()[0]}); free space, then "
            "go on with --resume"
        ) from error


@contextmanager
def memory_errors(trainer: BaseTrainer) -> Iterator[None]:
    """Too little memory is told with the sizes and the keys that lower it."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        cpu = "can't allocate memory" in str(error)
        if not (isinstance(error, torch.OutOfMemoryError) or cpu):
            raise
        batch = trainer.args.per_device_train_batch_size
        keys = [f"trainer.per_device_train_batch_size (now {batch})"]
        if not trainer.args.gradient_checkpointing:
            keys.append("or set trainer.gradient_checkpointing=true")
        raise UserError(
            f"out of memory at step {trainer.state.global_step + 1} with {batch} pairs a forward "
            f"({str(error).splitlines()[0]}); lower {', '.join(keys)}; "
            "trainer.gradient_accumulation_steps keeps the pairs a step; the last checkpoint is "
            "kept, but these keys make another run: name another --output, with init=CHECKPOINT "
            "to start from it"
        ) from error


def save(vlm: VLM, trainer: BaseTrainer, folder: Path) -> None:
    """Write the model as `save_pretrained` does, the processor and the Trainer's state.

    To be called by all processes, of which the first writes.
    """
    with disk_errors(folder), processes.first_writes() as writes:
        if trainer.is_deepspeed_enabled:
            # Only its engine can put the weights together.
            trainer.save_model(str(folder))
        else:
            processes.save_pretrained(vlm.model, folder)
        if writes:
            vlm.processor.save_pretrained(str(folder))
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
