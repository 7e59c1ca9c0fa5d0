"""A dry run tells the work and its rate and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.dry_run import dry_run, told
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.vlm import Prompt, encode_prompt, load_vlm, open_image


def test_a_dry_run_counts_and_times_and_writes_nothing(
    tiny_model_folder: Path, data_root_once: Path, tmp_path: Path
) -> None:
    tasks, output = ["coco", "mmbench"], tmp_path / "run"
    coco, mmbench = dry_run(
        str(tiny_model_folder), tasks=tasks, data_root=data_root_once, output=output
    )
    assert (coco.task, coco.samples, coco.kept, coco.new_tokens) == ("coco", 3, 0, 3 * 64)
    assert (mmbench.samples, mmbench.new_tokens) == (5, 5 * 128)
    assert coco.seconds > 0
    assert coco.disk is not None
    assert coco.disk > 0
    image = data_root_once / "coco/val2014/COCO_val2014_000000000001.jpg"
    prompt = Prompt(
        "Provide a one-sentence caption for the provided image.", (open_image(image, name="x"),)
    )
    one = encode_prompt(load_vlm(tiny_model_folder).processor, prompt)["input_ids"].shape[-1]
    assert coco.prompt_tokens == 3 * one
    assert "coco: 3 samples (0 answered already)" in told([coco, mmbench], output)
    assert not output.exists()


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"diversity": 1}, {"diversity": -1}, {"max_failures": -1}]
)
def test_what_a_run_refuses_a_dry_run_refuses(
    data_root_once: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    for body in (run_tasks, dry_run):
        with pytest.raises(UserError, match=f"must be . .*{next(iter(wrong.values()))}"):
            body("no model", tasks=None, data_root=data_root_once, output=tmp_path, **wrong)


def test_replies_that_are_kept_give_the_rate(
    tiny_model_folder: Path, data_root_once: Path, tmp_path: Path
) -> None:
    arguments = {"tasks": ["mmbench"], "data_root": data_root_once, "output": tmp_path / "run"}
    run_tasks(tiny_model_folder, **arguments)  # type: ignore[arg-type]
    before = (tmp_path / "run/replies.sqlite").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cwdpo_bench.evaluate.dry_run._timed", None)
        (mmbench,) = dry_run(str(tiny_model_folder), **arguments)  # type: ignore[arg-type]
    assert (mmbench.kept, mmbench.seconds) == (5, 0)
    assert (tmp_path / "run/replies.sqlite").read_bytes() == before
