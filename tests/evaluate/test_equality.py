"""One model, one set of pictures and questions: the same answers whichever way they are asked.

The reference is transformers alone, a prompt at a time: `generate` for the text, and a forward of
its own for every option and every reference caption. Every way of ours is compared with it: texts
equal, log-probabilities to 1e-4 in fp32. The model is the demo's trained base, its options letters
of one token (MMBench, MMMU) and words of two (POPE's Yes and No).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from chat_server import OPENAI, VLLM, StandIn, replying, serving
from cwdpo_bench.demo import base_path
from cwdpo_bench.demo.layouts import SMOKE, BenchmarkSizes, Sizes, write_world
from cwdpo_bench.evaluate import in_process
from cwdpo_bench.evaluate.engine import Engine
from cwdpo_bench.evaluate.images import open_images
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.plan import CaptionJob, Job, plan_tasks
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.evaluate.served import ServedEngine
from cwdpo_bench.evaluate.server import Server
from cwdpo_bench.vlm import VLM, Prompt, encode_prompts, load_vlm, packing
from cwdpo_bench.vlm.batch import chat_text, completion_ids

httpx = pytest.importorskip("httpx")

QUESTIONS = ["mmmu", "mmbench", "pope"]
TASKS = ["coco", *QUESTIONS]
TOLERANCE = 1e-4


class Answer(NamedTuple):
    """What a way says of one sample.

    Attributes:
        text: the caption or the reply.
        logps: [K] of the options, or [L] of the first reference's tokens; None where the way gives
            none.
    """

    text: str
    logps: np.ndarray | None


Answers = dict[str, Answer]
"""By task and sample."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered world with more captions and questions than a batch of 16 holds."""
    folder = tmp_path_factory.mktemp("world")
    test = BenchmarkSizes(coco=18, flickr30k=4, nocaps=1, mmmu=15, mmbench=6)
    write_world(folder, seed=5, sizes=Sizes(8, 4, test, SMOKE.validation))
    return folder


@pytest.fixture(scope="module")
def jobs(root: Path) -> list[Job]:
    found: list[Job] = []
    for job in plan_tasks(TASKS, root, None)[0]:
        # POPE asks nine times about a picture: some of them are enough here.
        step = 7 if job.task.name == "pope" else 1
        found.append(replace(job, samples=job.samples[::step]))  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm(base_path(), dtype=torch.float32, device="cpu")


# --- the reference -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(vlm: VLM, jobs: list[Job], root: Path) -> Answers:
    return {
        f"{job.task.name}/{sample.id}": _plainly(vlm, sample, root, job.task.max_new_tokens)
        for job in jobs
        for sample in job.samples
    }


def _plainly(vlm: VLM, sample: CaptionSample | ChoiceSample, root: Path, limit: int) -> Answer:
    prompt = Prompt(sample.prompt, open_images(sample, root))
    inputs = encode_prompts(vlm.processor, [prompt])
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        new = vlm.model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0, width:]
    text = vlm.tokenizer.decode(new, skip_special_tokens=True).strip()
    if isinstance(sample, CaptionSample):
        end = vlm.tokenizer.eos_token
        return Answer(text, _logps_behind(vlm, prompt, sample.references[0] + end))
    sums = [_logps_behind(vlm, prompt, option).sum() for option in sample.option_replies]
    return Answer(text, np.array(sums) if sums else None)


def _logps_behind(vlm: VLM, prompt: Prompt, answer: str) -> np.ndarray:
    """[L] of an answer's tokens, in a text of its own that the processor reads whole."""
    width = encode_prompts(vlm.processor, [prompt])["input_ids"].shape[1]
    text = chat_text(vlm.processor, prompt) + answer
    images = list(prompt.images) or None
    inputs = vlm.processor(text=[text], images=images, return_tensors="pt")
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        logps = vlm.model(**inputs).logits[0].float().log_softmax(-1)
    return logps[range(width - 1, len(ids) - 1), ids[width:]].numpy()


def test_the_reference_tells_its_samples_apart(reference: Answers, vlm: VLM) -> None:
    """Answers that were all alike would be equal however they were mixed up."""
    captions = [answer for name, answer in reference.items() if name.startswith("coco")]
    assert len(captions) > 16
    assert len({answer.text for answer in captions}) > len(captions) / 2
    assert len({answer.text for answer in reference.values()} & set("ABCD")) > 1
    options = {tuple(a.logps) for name, a in reference.items() if name.startswith("pope/")}
    assert len(options) > 16
    assert len(completion_ids(vlm.tokenizer, "Yes")) > 2
    assert len(completion_ids(vlm.tokenizer, "A")) == 2


# --- the ways in this process --------------------------------------------------------------------


def _asked(engine: Engine, jobs: list[Job]) -> Answers:
    found = {}
    for job in jobs:
        captions = isinstance(job, CaptionJob)
        ask: Callable[..., Any] = engine.answer_captions if captions else engine.answer_choices
        for place, reply in ask(job.samples, max_new_tokens=job.task.max_new_tokens):
            if captions:
                logps = None if reply.reference_scores is None else reply.reference_scores.logps
            else:
                logps = reply.option_log_probabilities
            found[f"{job.task.name}/{job.samples[place].id}"] = Answer(reply.text, logps)
    return found


def _assert_equal(found: Answers, reference: Answers, scored: Sequence[str] = TASKS) -> None:
    """The same samples and texts, and log-probabilities of all samples of the tasks `scored`."""
    assert found.keys() == reference.keys()
    for name, (text, logps) in reference.items():
        assert found[name].text == text, name
        known = found[name].logps
        if logps is None:
            assert known is None, name
        elif known is not None or name.partition("/")[0] in scored:
            assert known is not None, name
            np.testing.assert_allclose(known, logps, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 16, None])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_any_batch_packed_or_plain(
    batch_size: int | None,
    packed: bool,
    vlm: VLM,
    jobs: list[Job],
    root: Path,
    reference: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain: options and references in rows of their own, decoding by `generate`."""
    if not packed:
        monkeypatch.setattr(packing, "PACKED_FAMILIES", frozenset())
        assert packing.packing_refusal(vlm.model) is not None
    _assert_equal(_asked(InProcessEngine(vlm, root, batch_size), jobs), reference)


def test_images_opened_a_few_at_a_time(
    vlm: VLM, jobs: list[Job], root: Path, reference: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_process, "CHUNK_PIXELS", 30_000)
    _assert_equal(_asked(InProcessEngine(vlm, root, 16), jobs), reference)


# --- two processes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes(root: Path, reference: Answers, tmp_path: Path) -> None:
    """The command as `accelerate launch` starts it; its run folder says what one process's does."""
    arguments = ["--model", base_path(), "--data-root", root, "--output", tmp_path / "two"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command = [*launcher, "--num_processes=2", "-m", "cwdpo_bench", "run", *arguments, "--json"]
    command += ["--tasks", ",".join(TASKS), "--batch-size", "4"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    results = json.loads(done.stdout)  # one process alone has spoken
    assert results["provenance"]["processes"] == 2
    found = _of_run(tmp_path / "two")
    _assert_equal({name: found[name] for name in reference}, reference, scored=QUESTIONS)

    # Everything that is kept of a sample, the statistics of its tokens among it.
    one = run_tasks(base_path(), tasks=TASKS, data_root=root, output=tmp_path / "one")
    assert results["signature"] == one.results["signature"]
    for task in TASKS:
        assert results["tasks"][task]["signature"] == one.results["tasks"][task]["signature"]
        tables = [
            pd.read_parquet(tmp_path / run / "samples" / f"{task}.parquet")
            for run in ("one", "two")
        ]
        for column in tables[0]:
            _assert_close(*(table[column].tolist() for table in tables))


def _of_run(folder: Path) -> Answers:
    found = {}
    for task in TASKS:
        for row in pd.read_parquet(folder / "samples" / f"{task}.parquet").to_dict("records"):
            logps = row.get("option_log_probabilities")
            found[f"{task}/{row['id']}"] = Answer(row["prediction"], logps)
    return found


def _assert_close(a: Any, b: Any) -> None:
    """Numbers to the tolerance, through lists in lists; all else equal."""
    if isinstance(a, list | np.ndarray):
        for x, y in zip(a, b, strict=True):
            _assert_close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=TOLERANCE, nan_ok=True)
    else:
        assert a == b


# --- served --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(jobs: list[Job]) -> list[Job]:
    """Some of each task: a server's stand-in reads a prompt anew for every option."""
    return [replace(job, samples=job.samples[:5]) for job in jobs]  # type: ignore[arg-type]


def _of(jobs: list[Job], reference: Answers) -> Answers:
    names = [f"{job.task.name}/{sample.id}" for job in jobs for sample in job.samples]
    return {name: reference[name] for name in names}


@pytest.mark.parametrize(("known", "source"), [(VLLM, "prompt"), (OPENAI, "first-token")])
def test_a_server_that_gives_log_probabilities(
    known: set[str], source: str, vlm: VLM, few: list[Job], root: Path, reference: Answers
) -> None:
    with serving(replying(StandIn(vlm), known)) as (server, _):
        engine = ServedEngine(server, "m", root)
        found = _asked(engine, few)
        engine.close()
    assert engine.signature_parts["option_scores"] == source
    # A first token is not among the 20 likeliest of every reply, and not all of a word.
    _assert_equal(found, _of(few, reference), scored=QUESTIONS if source == "prompt" else ())
    scored = [name for name, answer in found.items() if answer.logps is not None]
    assert len(scored) >= (13 if source == "prompt" else 6)
    assert not [name for name in scored if name.startswith("coco")]


def test_transformers_serve(
    few: list[Job], root: Path, reference: Answers, transformers_server: Server
) -> None:
    """It gives no log-probabilities; its texts are the reference's."""
    engine = ServedEngine(transformers_server, str(base_path()), root)
    found = _asked(engine, few)
    engine.close()
    assert engine.scores == "none"
    _assert_equal(found, _of(few, reference), scored=())


@pytest.fixture
def transformers_server() -> Iterator[Server]:
    for extra in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(extra, reason="pip install transformers[serving]")
    command = shutil.which("transformers", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("no transformers command")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(
        [command, "serve", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/v1/models", process)
        yield Server(f"http://127.0.0.1:{port}/v1", concurrency=2)
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert process.poll() is None, "transformers serve has ended"
        try:
            httpx.get(address, trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail("transformers serve does not answer")
