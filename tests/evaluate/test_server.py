"""A client against a server that misbehaves in every way that servers do."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

import chat_server
from chat_server import Act, send
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.server import (
    MAX_REPLY_BYTES,
    Client,
    RequestFailed,
    Server,
    Usage,
    concurrently,
)

pytest.importorskip("httpx")

KEY = "sk-do-not-show-me"


def completion(text: str, **extra: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message}], **extra}).encode()


def well(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    send(handler, 200, completion("well", usage={"total_tokens": 10}))


def status(code: int, content: bytes = b"{}", **headers: str) -> Act:
    return lambda handler, body: send(handler, code, content, **headers)


def cut(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def hang(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.server.released.wait(20)  # type: ignore[attr-defined]


def drip(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A byte now and then: each wait is short, the whole has no end."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        if handler.server.released.wait(0.05):  # type: ignore[attr-defined]
            return
        handler.wfile.write(b" ")


@contextmanager
def serving(*acts: Act, **settings: Any) -> Iterator[tuple[Server, list[dict[str, Any]]]]:
    """A server that does one act a request, the last one for ever."""
    left = list(acts)

    def act(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler, body)

    with chat_server.serving(act, **{"retries": 2, **settings}) as (server, asked):
        yield server, asked


def ask(server: Server, waits: list[float] | None = None) -> dict[str, Any]:
    client = Client(server, sleep=(waits if waits is not None else []).append)
    try:
        return client.chat({"model": "m", "messages": []})
    finally:
        client.close()


@pytest.mark.parametrize(
    "act",
    [
        status(429),
        status(500),
        status(503, b"<html>no</html>"),
        cut,
        status(200, b"not json"),
        status(200, b'{"choices": []}'),
        status(200, b"[]"),
        status(200, b'{"choices": [{"message": {"content": 7}}]}'),
    ],
)
def test_what_may_pass_is_asked_again(act: Act) -> None:
    waits: list[float] = []
    with serving(act, act, well) as (server, asked):
        assert ask(server, waits)["choices"][0]["message"]["content"] == "well"
    assert len(asked) == 3
    assert asked[0]["path"] == "/v1/chat/completions"
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (status(429, b'{"error": {"message": "slow down"}}'), "answered 429: slow down"),
        (status(500, b'{"detail": "broken"}'), "answered 500: broken"),
        (cut, "was cut off"),
        (status(200, b"{"), "no chat completion"),
    ],
)
def test_after_the_last_try_the_request_has_failed(act: Act, words: str) -> None:
    with serving(act) as (server, asked), pytest.raises(RequestFailed, match=words) as error:
        ask(server)
    assert len(asked) == 3
    assert "(3 tries)" in str(error.value)


@pytest.mark.parametrize("act", [hang, drip])
def test_a_server_that_does_not_end_is_left(act: Act) -> None:
    started = time.monotonic()
    with (
        serving(act, timeout=0.3, retries=1) as (server, asked),
        pytest.raises(RequestFailed, match=r"no reply within 0\.3 s \(2 tries\)"),
    ):
        ask(server)
    assert len(asked) == 2
    assert time.monotonic() - started < 5


def test_the_wait_is_the_one_that_the_server_names() -> None:
    waits: list[float] = []
    with serving(status(429, Retry_After="7"), status(503, Retry_After="9999"), well) as (s, _):
        ask(s, waits)
    assert waits == [7.0, 60.0]


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("in 30 s", 28, 31), ("in 9999 s", 60, 60), ("30 s ago", 0, 0), ("soon", 0.25, 0.5)],
)
def test_a_date_is_waited_for(header: str, least: float, most: float) -> None:
    if header.startswith("in"):
        header = formatdate(time.time() + int(header.split()[1]), usegmt=True)
    elif header.endswith("ago"):
        header = formatdate(time.time() - 30, usegmt=True)
    waits: list[float] = []
    with serving(status(429, Retry_After=header), well) as (server, _):
        ask(server, waits)
    assert least <= waits[0] <= most


def test_a_request_that_is_wrong_is_not_sent_again() -> None:
    act = status(400, b'{"error": {"message": "maximum context length is 4096 tokens"}}')
    with serving(act) as (server, asked), pytest.raises(RequestFailed, match="context length"):
        ask(server)
    assert len(asked) == 1


def test_an_endless_reply_is_refused() -> None:
    with (
        serving(status(200, b" " * (MAX_REPLY_BYTES + 1))) as (server, asked),
        pytest.raises(RequestFailed, match="more than 16,000,000 bytes"),
    ):
        ask(server)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [(401, r"set the key in \$OPENAI_API_KEY"), (403, "set the key"), (404, "--model")],
)
def test_what_no_sample_would_escape_ends_the_run(code: int, words: str) -> None:
    with serving(status(code)) as (server, asked), pytest.raises(UserError, match=words):
        ask(server)
    assert len(asked) == 1


def test_a_server_that_is_not_there_ends_the_run() -> None:
    with serving(well) as (server, _):
        pass
    with pytest.raises(UserError, match="is not there: no connection") as error:
        ask(server)
    assert "127.0.0.1" not in str(error.value)


def test_the_key_goes_to_the_server_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def echo(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        told = f"wrong key {handler.headers['Authorization']} at {handler.headers['Host']}"
        send(handler, 401, json.dumps({"error": {"message": told}}).encode())

    with (
        serving(echo, key_variable="MY_KEY") as (server, asked),
        pytest.raises(UserError, match=r"\$MY_KEY") as error,
    ):
        ask(server)
    assert asked[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    for text in (str(error.value), caplog.text):
        assert KEY not in text
        assert "127.0.0.1" not in text


@pytest.mark.parametrize("code", [401, 403])
def test_what_a_server_says_of_a_refused_key_is_not_repeated(code: int) -> None:
    act = status(code, b'{"error": {"message": "wrong key ending in me, by b64 c2st"}}')
    with serving(act) as (server, _), pytest.raises(UserError) as error:
        ask(server)
    assert str(error.value) == f"the server answered {code}; set the key in $OPENAI_API_KEY"


@pytest.mark.parametrize(
    "secret",
    [
        "https://other.example.com:8443/v1?key=1",
        "10.0.0.7:8000",
        "localhost:11434",
        "sk-proj-AbC",
        "hf_abcdef",
        "Bearer abc.def",
        "abcd********wxyz",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_other_addresses_and_keys_are_struck_out_too(secret: str) -> None:
    told = f"maximum context length of Qwen/Qwen2.5-VL-72B-Instruct-AWQ {secret} is 4096"
    act = status(400, json.dumps({"error": {"message": told}}).encode())
    with serving(act) as (server, _), pytest.raises(RequestFailed) as error:
        ask(server)
    assert str(error.value) == (
        "the server answered 400: maximum context length of Qwen/Qwen2.5-VL-72B-Instruct-AWQ … "
        "is 4096"
    )


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(well) as (server, asked):
        ask(server)
    assert "Authorization" not in asked[0]["headers"]


def test_the_budget_of_requests_counts_repetitions() -> None:
    with (
        serving(status(500), max_requests=2, retries=5) as (server, asked),
        pytest.raises(UserError, match="budget of 2 requests is used up"),
    ):
        ask(server)
    assert len(asked) == 2


def test_the_budget_of_tokens_is_what_the_server_counted() -> None:
    with serving(well, max_total_tokens=15) as (server, asked):
        client = Client(server)
        client.chat({})
        client.chat({})
        with pytest.raises(UserError, match="budget of 15 tokens is used up"):
            client.chat({})
        client.close()
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("setting", "option"),
    [
        ({"base_url": "localhost:8000"}, "--base-url"),
        ({"concurrency": 0}, "--concurrency"),
        ({"retries": -1}, "--retries"),
        ({"timeout": 0}, "--timeout"),
        ({"max_requests": 0}, "--max-requests"),
        ({"max_total_tokens": 0}, "--max-total-tokens"),
    ],
)
def test_a_setting_that_cannot_work_is_named(setting: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=option):
        Server(**{"base_url": "http://x/v1", **setting})


def test_what_is_under_way_comes_out_before_the_error() -> None:
    begun: list[int] = []
    all_begun = threading.Barrier(3)

    def work(item: int) -> int:
        begun.append(item)
        if item < 3:
            all_begun.wait(10)
        if item == 1:
            raise UserError("no more")
        time.sleep(0.1)
        return item * 10

    got: list[tuple[int, int]] = []
    results = concurrently(work, range(50), 3)
    with pytest.raises(UserError, match="no more"):
        got.extend(results)
    assert sorted(begun) == [0, 1, 2]
    assert sorted(got) == [(0, 0), (2, 20)]


def test_usage_is_what_the_server_counted_and_every_request() -> None:
    def counts(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send(handler, 200, completion("x", usage={"prompt_tokens": 7, "completion_tokens": 2}))

    with serving(status(500), counts, well, counts, max_total_tokens=28) as (server, _):
        client = Client(server, sleep=lambda seconds: None)
        for _ in range(3):
            client.chat({})
        assert client.usage == Usage(requests=4, prompt_tokens=14, completion_tokens=4)
        # 9 + 10 + 9: where the server adds nothing up, its two parts count.
        with pytest.raises(UserError, match="budget of 28 tokens"):
            client.chat({})
        client.close()
