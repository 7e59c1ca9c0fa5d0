"""The served engine: what it finds out of a server, leaves out, refuses and never says.

That its answers are those of the in-process engine is in `test_equality.py`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chat_server import OPENAI, VLLM, StandIn, replying, send, serving
from cwdpo_bench.demo import base_path
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.coco import load_coco
from cwdpo_bench.evaluate.engine import Failure
from cwdpo_bench.evaluate.mmbench import load_mmbench
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.evaluate.served import ServedEngine
from cwdpo_bench.evaluate.server import Server
from cwdpo_bench.vlm import VLM, load_vlm

pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm(base_path())


def _answers(engine: Any, samples: Any, ask: str, max_new_tokens: int = 4) -> list[Any]:
    replies = dict(getattr(engine, ask)(samples, max_new_tokens=max_new_tokens))
    assert sorted(replies) == list(range(len(samples)))
    return [replies[place] for place in range(len(samples))]


def test_a_server_that_drops_the_wish_for_probabilities_is_found_out(
    vlm: VLM, data_root_once: Path
) -> None:
    plain = StandIn(vlm)

    def silent(body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": plain(body)["choices"][0]["message"]}]}

    with serving(replying(silent, OPENAI)) as (server, _):
        engine = ServedEngine(server, "m", data_root_once)
        answers = _answers(engine, load_mmbench(data_root_once), "answer_choices", 1)
        engine.close()
    assert engine.signature_parts["option_scores"] == "none"
    assert [a.option_log_probabilities for a in answers] == [None] * 5


def test_a_question_with_an_option_out_of_the_likeliest_has_no_scores(
    vlm: VLM, data_root_once: Path
) -> None:
    plain = StandIn(vlm)

    def few(body: dict[str, Any]) -> dict[str, Any]:
        return plain({**body, "top_logprobs": 1} if body.get("logprobs") else body)

    with serving(replying(few, OPENAI)) as (server, _):
        engine = ServedEngine(server, "m", data_root_once)
        answers = _answers(engine, load_mmbench(data_root_once), "answer_choices", 1)
        engine.close()
    assert [a.option_log_probabilities for a in answers] == [None] * 5


def test_a_sample_that_fails_leaves_the_others(vlm: VLM, data_root: Path) -> None:
    plain = StandIn(vlm)
    samples = load_coco(data_root)
    (data_root / str(samples[1].image)).write_bytes(b"")
    calls: list[int] = []

    def one_refused(body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][0]["content"]
        calls.append(len(content))
        if calls.count(2) == 1 and len(content) == 2:
            return {"error": {"message": "maximum context length"}}
        return plain(body)

    with serving(replying(one_refused, OPENAI)) as (server, _):
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

    with serving(replying(slow, OPENAI)) as (server, _):
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
    with serving(replying(StandIn(vlm), OPENAI)) as (server, _):
        limited = replace(server, max_requests=6, concurrency=2)
        engine = ServedEngine(limited, "m", data_root_once)
        with pytest.raises(UserError, match="budget of 6 requests"):
            _answers(engine, load_coco(data_root_once) * 4, "answer_captions", 1)
        engine.close()


def test_a_run_names_neither_server_nor_key(
    vlm: VLM, data_root_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-show-me")
    with serving(replying(StandIn(vlm), VLLM)) as (server, _):
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


@pytest.mark.parametrize(
    ("status", "body"),
    [(400, b'{"error": {"message": "no such model"}}'), (422, b"{}"), (200, b"<html></html>")],
)
def test_a_server_that_refuses_the_first_question_is_one_clear_error(
    status: int, body: bytes, tmp_path: Path
) -> None:
    with (
        serving(lambda handler, _: send(handler, status, body)) as (server, _),
        pytest.raises(UserError, match=r"plain question .*mend --base-url"),
    ):
        ServedEngine(server, "m", tmp_path)
