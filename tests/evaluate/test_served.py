"""The served engine against servers that hold the same model: its answers are our own."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.demo import base_path
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.coco import load_coco
from cwdpo_bench.evaluate.engine import Failure
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.mmbench import load_mmbench
from cwdpo_bench.evaluate.mmmu import load_mmmu
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.evaluate.served import ServedEngine
from cwdpo_bench.evaluate.server import Server
from cwdpo_bench.vlm import VLM, Prompt, encode_prompts, load_vlm
from cwdpo_bench.vlm.batch import chat_text

httpx = pytest.importorskip("httpx")

OPENAI = {"model", "messages", "max_tokens", "temperature", "top_p", "frequency_penalty"}
OPENAI |= {"presence_penalty", "logprobs", "top_logprobs"}
VLLM = OPENAI | {"repetition_penalty", "prompt_logprobs", "add_generation_prompt"}
VLLM |= {"continue_final_message"}


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm(base_path())


class _Model:
    """What a server does with a request, by the plainest forward there is."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.lock = threading.Lock()

    def inputs(self, content: list[dict[str, Any]], answer: str) -> dict[str, torch.Tensor]:
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        data = [base64.b64decode(url.partition(";base64,")[2], validate=True) for url in urls]
        images = tuple(Image.open(io.BytesIO(one)) for one in data)
        prompt = Prompt(content[-1]["text"], images)
        if not answer:
            return encode_prompts(self.vlm.processor, [prompt])
        text = chat_text(self.vlm.processor, prompt) + answer
        return dict(
            self.vlm.processor(text=[text], images=list(images) or None, return_tensors="pt")
        )

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        user, *assistant = body["messages"]
        answer = assistant[0]["content"] if assistant else ""
        decode = self.vlm.tokenizer.decode
        with self.lock, torch.no_grad():
            inputs = self.inputs(user["content"], answer)
            ids = inputs["input_ids"][0]
            logps = self.vlm.model(**inputs).logits[0].float().log_softmax(-1)
            new = self.vlm.model.generate(
                **inputs, max_new_tokens=body["max_tokens"], do_sample=False
            )[0, len(ids) :]
        text = self.vlm.tokenizer.decode(new, skip_special_tokens=True)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        if body.get("logprobs"):
            top = logps[-1].topk(body["top_logprobs"])
            tokens = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            named = [{"token": decode([token]), "logprob": logp} for token, logp in tokens]
            choice["logprobs"] = {"content": [{**named[0], "top_logprobs": named}]}
        reply: dict[str, Any] = {"choices": [choice]}
        if "prompt_logprobs" in body:
            reply["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": row[token].item(), "decoded_token": decode([token])}}
                for row, token in zip(logps, ids[1:].tolist(), strict=False)
            ]
        return reply


@contextmanager
def serving(
    answer: Callable[[dict[str, Any]], dict[str, Any]], known: set[str]
) -> Iterator[Server]:
    """A server that refuses what it does not know, as OpenAI's and transformers' do."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            unknown = sorted(set(body) - known)
            told = {"error": {"message": f"unknown: {unknown}"}} if unknown else answer(body)
            content = json.dumps(told).encode()
            self.send_response(400 if "error" in told else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is no news."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield Server(f"http://127.0.0.1:{server.server_address[1]}/v1", concurrency=3, retries=0)
        server.shutdown()


def _answers(engine: Any, samples: Any, ask: str, max_new_tokens: int = 4) -> list[Any]:
    replies = dict(getattr(engine, ask)(samples, max_new_tokens=max_new_tokens))
    assert sorted(replies) == list(range(len(samples)))
    return [replies[place] for place in range(len(samples))]


def _assert_same(ours: list[Any], theirs: list[Any], at_least: int) -> None:
    """Equal replies, and equal log-probabilities wherever both have them."""
    assert [a.text for a in ours] == [a.text for a in theirs]
    pairs = [
        (a.option_log_probabilities, b.option_log_probabilities)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert all(a is not None for a, b in pairs if b is not None)
    known = [(a, b) for a, b in pairs if b is not None]
    assert len(known) >= at_least
    for a, b in known:
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("known", "scores"), [(VLLM, "prompt"), (OPENAI, "first-token")])
def test_replies_and_option_scores_are_those_of_the_in_process_engine(
    vlm: VLM, data_root_once: Path, known: set[str], scores: str
) -> None:
    questions = [*load_mmbench(data_root_once), *load_mmmu(data_root_once)]
    captions = load_coco(data_root_once)
    here = InProcessEngine(vlm, data_root_once, 16)
    with serving(_Model(vlm).reply, known) as server:
        engine = ServedEngine(server, "m", data_root_once)
        there = _answers(engine, questions, "answer_choices")
        described = _answers(engine, captions, "answer_captions", 12)
        engine.close()
    assert engine.signature_parts["option_scores"] == scores
    # Eight questions have options; of some, one is not among the likeliest 20 tokens.
    at_least = 8 if scores == "prompt" else 4
    _assert_same(_answers(here, questions, "answer_choices"), there, at_least)
    expected = _answers(here, captions, "answer_captions", 12)
    assert [a.text for a in described] == [a.text for a in expected]
    assert [a.reference_scores for a in described] == [None] * len(captions)


def test_a_server_that_drops_the_wish_for_probabilities_is_found_out(
    vlm: VLM, data_root_once: Path
) -> None:
    plain = _Model(vlm).reply

    def silent(body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": plain(body)["choices"][0]["message"]}]}

    with serving(silent, OPENAI) as server:
        engine = ServedEngine(server, "m", data_root_once)
        answers = _answers(engine, load_mmbench(data_root_once), "answer_choices", 1)
        engine.close()
    assert engine.signature_parts["option_scores"] == "none"
    assert [a.option_log_probabilities for a in answers] == [None] * 5


def test_a_question_with_an_option_out_of_the_likeliest_has_no_scores(
    vlm: VLM, data_root_once: Path
) -> None:
    plain = _Model(vlm).reply

    def few(body: dict[str, Any]) -> dict[str, Any]:
        return plain({**body, "top_logprobs": 1} if body.get("logprobs") else body)

    with serving(few, OPENAI) as server:
        engine = ServedEngine(server, "m", data_root_once)
        answers = _answers(engine, load_mmbench(data_root_once), "answer_choices", 1)
        engine.close()
    assert [a.option_log_probabilities for a in answers] == [None] * 5


def test_a_sample_that_fails_leaves_the_others(vlm: VLM, data_root: Path) -> None:
    plain = _Model(vlm).reply
    samples = load_coco(data_root)
    (data_root / str(samples[1].image)).write_bytes(b"")
    calls: list[int] = []

    def one_refused(body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][0]["content"]
        calls.append(len(content))
        if calls.count(2) == 1 and len(content) == 2:
            return {"error": {"message": "maximum context length"}}
        return plain(body)

    with serving(one_refused, OPENAI) as server:
        engine = ServedEngine(server, "m", data_root)
        answers = _answers(engine, samples, "answer_captions", 2)
        engine.close()
    failed = [a.reason for a in answers if isinstance(a, Failure)]
    assert len(failed) == 2
    assert any("sample 102: image" in reason and "is broken" in reason for reason in failed)
    assert any("answered 400: maximum context length" in reason for reason in failed)


def test_so_many_requests_are_under_way_and_none_after_the_end(
    vlm: VLM, data_root_once: Path
) -> None:
    now, seen, most, turn = 0, 0, 0, threading.Lock()

    def slow(body: dict[str, Any]) -> dict[str, Any]:
        nonlocal now, seen, most
        with turn:
            now, seen, most = now + 1, seen + 1, max(most, now + 1)
        time.sleep(0.05)
        with turn:
            now -= 1
        return {"choices": [{"message": {"content": "x"}}]}

    with serving(slow, OPENAI) as server:
        engine = ServedEngine(server, "m", data_root_once)
        replies = engine.answer_captions(load_coco(data_root_once) * 20, max_new_tokens=1)
        for _ in range(7):
            next(replies)
        replies.close()  # type: ignore[attr-defined]
        time.sleep(0.2)
        at_end = seen
        time.sleep(0.2)
        engine.close()
    assert most == server.concurrency
    assert at_end == seen < 60


def test_what_ends_the_run_comes_out_of_the_workers(vlm: VLM, data_root_once: Path) -> None:
    with serving(_Model(vlm).reply, OPENAI) as server:
        limited = replace(server, max_requests=6, concurrency=2)
        engine = ServedEngine(limited, "m", data_root_once)
        with pytest.raises(UserError, match="budget of 6 requests"):
            _answers(engine, load_coco(data_root_once) * 4, "answer_captions", 1)
        engine.close()


def test_a_run_names_neither_server_nor_key(
    vlm: VLM, data_root_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-show-me")
    with serving(_Model(vlm).reply, VLLM) as server:
        folder = run_tasks(
            "m", server=server, tasks=["mmbench", "coco"], data_root=data_root_once, output=tmp_path
        )
    assert folder.results["model"] == {"name": "m"}
    assert "option_scores:prompt" in folder.results["signature"]
    assert folder.results["tasks"]["mmbench"]["metrics"]["ece"]["value"] >= 0
    assert "token_ece" not in folder.results["tasks"]["coco"]["metrics"]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    said = capsys.readouterr()
    for text in [*written, said.out.encode(), said.err.encode()]:
        assert b"127.0.0.1" not in text
        assert b"sk-do-not" not in text


@pytest.mark.parametrize(
    "setting", [{"reference_model": "x"}, {"diversity": 2}, {"trust_remote_code": True}]
)
def test_what_a_server_cannot_do_is_refused(
    setting: dict[str, Any], data_root_once: Path, tmp_path: Path
) -> None:
    server = Server("http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UserError, match="--engine openai"):
        run_tasks(
            "m", server=server, tasks=["coco"], data_root=data_root_once, output=tmp_path, **setting
        )


# --- transformers serve --------------------------------------------------------------------------


@pytest.fixture(scope="module")
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
    for _ in range(600):
        assert process.poll() is None, "transformers serve has ended"
        try:
            httpx.get(address, trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail("transformers serve does not answer")


def test_transformers_serve_answers_as_we_do_and_gives_no_probabilities(
    vlm: VLM, data_root_once: Path, transformers_server: Server
) -> None:
    captions, questions = load_coco(data_root_once), load_mmbench(data_root_once)
    engine = ServedEngine(transformers_server, str(base_path()), data_root_once)
    described = _answers(engine, captions, "answer_captions", 12)
    replies = _answers(engine, questions, "answer_choices", 3)
    engine.close()
    here = InProcessEngine(vlm, data_root_once, 16)
    assert [a.text for a in described] == [
        a.text for a in _answers(here, captions, "answer_captions", 12)
    ]
    assert [a.text for a in replies] == [
        a.text for a in _answers(here, questions, "answer_choices", 3)
    ]
    assert engine.scores == "none"


@pytest.mark.parametrize(
    ("status", "body"),
    [(400, b'{"error": {"message": "no such model"}}'), (422, b"{}"), (200, b"<html></html>")],
)
def test_a_server_that_refuses_the_first_question_is_one_clear_error(
    status: int, body: bytes, tmp_path: Path
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        asked = Server(f"http://127.0.0.1:{server.server_port}/v1", retries=0)
        with pytest.raises(UserError, match=r"plain question .*mend --base-url"):
            ServedEngine(asked, "m", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
