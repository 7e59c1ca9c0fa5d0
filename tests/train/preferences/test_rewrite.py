"""A language model writes the negatives: real HTTP, with servers and models of every sort."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import chat_server
from cwdpo_bench import cli
from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.preferences import edits, writer
from cwdpo_bench.train.preferences.journal import journal_of, open_journal
from cwdpo_bench.train.preferences.perturb import KINDS, perturb
from cwdpo_bench.train.preferences.rewrite import rewrite_file
from cwdpo_bench.train.preferences.writer import Writing, answer_in, dressed, kinds_for

pytest.importorskip("httpx")

CAPTIONS = [f"A small dog sits on a red sofa number {i}." for i in range(12)]
OBJ = {"replace_obj": 1.0}
KEY = "sk-do-not-show-me"
Model = Callable[[dict[str, Any]], str | int]
"""What the model behind the server does: its reply's text, or the status of a refusal."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"images": ["no.png"], "prompt": "Caption?", "chosen": c} for c in CAPTIONS]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "captions.jsonl"


def first_turn(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


def caption_of(body: dict[str, Any]) -> str | None:
    """The caption that is asked about; None of the question whether two mean the same."""
    found = re.search(r"^Caption: (.*)$", first_turn(body), re.M)
    return None if found is None else json.loads(found[1])


def cat(body: dict[str, Any]) -> str:
    """A good model: cats for dogs, and no two captions mean the same to it."""
    caption = caption_of(body)
    if caption is None:
        return json.dumps({"same": False})
    return json.dumps({"caption": caption.replace("dog", "cat")})


def speaking(model: Model) -> chat_server.Act:
    """The act of a server that sends what the model says, and counts tokens."""

    def act(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        said = model(body)
        if not isinstance(said, str):
            chat_server.send(handler, said, b'{"error": {"message": "no"}}')
            return
        message = {"role": "assistant", "content": said}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        told = {"choices": [{"message": message}], "usage": usage}
        chat_server.send(handler, 200, json.dumps(told).encode())

    return act


def rewrite(
    data: Path, model: Model, shares: dict[str, float] | None = None, **settings: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    wanted = {name: settings.pop(name) for name in ("prices", "seed") if name in settings}
    kinds = ("tries", "verify", "temperature", "max_new_tokens")
    writing = Writing("m", **{name: settings.pop(name) for name in kinds if name in settings})
    with chat_server.serving(speaking(model), **settings) as (server, asked):
        output = data.parent / "hard.jsonl"
        return rewrite_file(data, output, shares or OBJ, server, writing, **wanted), asked


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is accepted ----------------------------------------------------------------------------


def test_good_replies_are_written_with_what_they_cost(data: Path) -> None:
    record, asked = rewrite(data, cat, prices=(2.0, 10.0))
    assert (record["rows"], record["written"], record["dropped"]) == (12, 12, {})
    assert record["kinds"] == {"replace_obj": 12}
    assert record["edit_size"] == {"1": 12}
    assert record["structured"] == "json_schema"
    # One example, then a caption and its check, twelve times.
    assert record["usage"] == {
        "requests": 25,
        "prompt_tokens": 2500,
        "completion_tokens": 250,
        "cost": 0.0075,
    }
    assert record["usage_in_all"]["requests"] == 24
    pairs = read_pairs(data.parent / "hard.jsonl", with_images=False).pairs
    assert [pair.rejected for pair in pairs] == [c.replace("dog", "cat") for c in CAPTIONS]
    row = lines(data.parent / "hard.jsonl")[0]
    assert row["negative"] == {
        "source": "perturb",
        "model": "m",
        "kind": "replace_obj",
        "edit": "dog -> cat",
    }
    assert row["images"] == ["no.png"]
    schema = asked[1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"caption": {"type": ["string", "null"]}}


def wrapped(body: dict[str, Any]) -> str:
    """Prose and drafts around the JSON, as models without structured output write."""
    said = cat(body)
    return (
        f'<think>{{"caption": "a draft"}} or {{x}}</think>Sure!\n```json\n{said}\n```\nHope so {{'
    )


def test_json_is_found_in_prose(data: Path) -> None:
    record, _ = rewrite(data, wrapped)
    assert record["written"] == 12
    assert record["refused"] == {}


@pytest.mark.parametrize(
    ("taken", "structured"),
    [
        (lambda b: b.get("response_format", {}).get("type") == "json_schema", "json_schema"),
        (lambda b: "max_tokens" not in b and "temperature" not in b, "json_schema"),
        (lambda b: b.get("response_format", {}).get("type") == "json_object", "json_object"),
        (lambda b: "response_format" not in b, "none"),
    ],
)
@pytest.mark.parametrize("status", [400, 500])
def test_a_server_is_asked_in_the_form_that_it_takes(
    data: Path, taken: Callable[[dict[str, Any]], bool], structured: str, status: int
) -> None:
    record, _ = rewrite(data, lambda body: cat(body) if taken(body) else status)
    assert record["structured"] == structured
    assert record["written"] == 12


def test_a_server_that_takes_no_form_is_one_clear_error(data: Path) -> None:
    with pytest.raises(UserError, match=r"does not answer an example .*400.*--model"):
        rewrite(data, lambda body: 400)
    assert not (data.parent / "hard.jsonl").exists()


# --- what is refused -----------------------------------------------------------------------------


def always(text: str | None) -> Model:
    said = json.dumps({"caption": text})
    return lambda body: json.dumps({"same": False}) if caption_of(body) is None else said


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda body: "I would rather not.", writer.NO_JSON),
        (lambda body: '{"caption": ["a"]}', writer.NO_JSON),
        (lambda body: '{"text": "a cat"}', writer.NO_JSON),
        (lambda body: "", writer.NO_JSON),
        (lambda body: cat(body).replace("cat sits", "cat sleeps"), edits.MORE),
        (lambda body: cat(body).replace("small cat", "very large flock of birds"), edits.LARGE),
        (lambda body: cat(body).replace("red", "blue"), edits.MORE),
        (lambda body: cat(body).replace("cat", "puppy"), edits.SAME),
        (lambda body: cat(body).replace("cat", "dog"), edits.EQUAL),
        (lambda body: cat(body).replace("small cat", "large dog"), edits.OTHER_KIND),
        (always("Nothing of the kind is to be seen anywhere here."), edits.NEGATED),
        (always(None), writer.NONE),
        (lambda body: cat(body).replace("false", "true"), writer.PARAPHRASE),
        (lambda body: cat(body).replace('"same"', '"alike"'), writer.PARAPHRASE),
    ],
)
def test_a_bad_reply_is_sent_back_with_the_reason_then_counted(
    data: Path, model: Model, reason: str
) -> None:
    with pytest.raises(UserError, match="no caption was accepted") as error:
        rewrite(data, model, tries=2)
    assert reason in str(error.value)
    kept = lines(journal_of(data.parent / "hard.jsonl"))
    tries = 1 if reason == writer.NONE else 2
    assert [one["refused"] for one in kept] == [[reason] * tries] * 12


def test_the_second_try_is_told_what_was_wrong_with_the_first(data: Path) -> None:
    def learns(body: dict[str, Any]) -> str:
        said = cat(body)
        return said if len(body["messages"]) == 3 or "same" in said else said.replace("red", "blue")

    record, asked = rewrite(data, learns)
    assert record["written"] == 12
    assert record["refused"] == {edits.MORE: 12}
    second = next(body for body in asked if len(body["messages"]) == 3)
    assert "blue" in second["messages"][1]["content"]
    assert "changes more than one thing" in second["messages"][2]["content"]


def test_where_a_kind_is_impossible_the_next_is_asked_for(data: Path) -> None:
    def no_swap(body: dict[str, Any]) -> str:
        return '{"caption": null}' if "change places" in first_turn(body) else cat(body)

    record, _ = rewrite(data, no_swap, {"swap_obj": 1000.0, "replace_obj": 0.001})
    assert record["kinds"] == {"replace_obj": 12}
    assert record["refused"] == {writer.NONE: 12}


def test_without_a_check_a_caption_is_one_request(data: Path) -> None:
    record, _ = rewrite(data, lambda body: cat(body).replace("false", "true"), verify=False)
    assert record["usage"]["requests"] == 13
    assert record["written"] == 12


def test_kinds_are_drawn_by_their_shares() -> None:
    shares = {"replace_obj": 3.0, "add_att": 1.0}
    orders = [kinds_for(str(i), "a cat", shares, 0) for i in range(2000)]
    first = Counter(order[0] for order in orders)
    assert all(sorted(order) == sorted(shares) for order in orders)
    assert 1400 < first["replace_obj"] < 1600
    assert kinds_for("7", "a cat", shares, 0) == orders[7]
    assert kinds_for("7", "a cat", {"add_att": 1.0, "add_obj": 0.0}, 0) == ["add_att"]


# --- what a server does --------------------------------------------------------------------------


def test_what_passes_is_asked_again_and_what_does_not_is_counted(data: Path) -> None:
    seen: Counter[str] = Counter()

    def shaky(body: dict[str, Any]) -> str | int:
        caption = caption_of(body)
        seen[str(caption)] += 1
        if caption == CAPTIONS[3]:
            return 413
        if caption == CAPTIONS[5] and seen[caption] == 1:
            return 429
        if caption == CAPTIONS[6] and seen[caption] < 3:
            return 500
        return cat(body)

    record, _ = rewrite(data, shaky, retries=2)
    assert record["written"] == 11
    assert record["dropped"] == {"no reply": 1}
    assert record["failures"] == ["the server answered 413: no"]
    # What failed is no outcome: the next start asks for it alone.
    again, asked = rewrite(data, cat)
    assert again["written"] == 12
    assert again["kept"] == 11
    assert {caption_of(body) for body in asked[1:]} == {CAPTIONS[3], None}


def test_a_server_that_hangs_on_a_caption_is_left(data: Path) -> None:
    def slow(body: dict[str, Any]) -> str:
        if caption_of(body) == CAPTIONS[0]:
            time.sleep(2)
        return cat(body)

    record, _ = rewrite(data, slow, timeout=0.5)
    assert record["written"] == 11
    assert record["failures"] == ["no reply within 0.5 s (1 tries)"]


def test_a_server_that_fails_throughout_ends_the_run(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cwdpo_bench.train.preferences.rewrite.IN_A_ROW", 5)
    first = iter([True])
    with pytest.raises(UserError, match=r"5 captions in a row got no reply; the last: .* 500"):
        rewrite(data, lambda body: cat(body) if next(first, False) else 500)


@pytest.mark.parametrize("limit", [{"max_requests": 12}, {"max_total_tokens": 1200}])
def test_a_budget_ends_the_run_and_nothing_accepted_is_asked_twice(
    data: Path, limit: dict[str, int]
) -> None:
    with pytest.raises(UserError, match=r"budget of .* is used up"):
        rewrite(data, cat, **limit)
    kept = {one["text"] for one in lines(journal_of(data.parent / "hard.jsonl"))}
    assert 3 <= len(kept) < 12
    assert not (data.parent / "hard.jsonl").exists()
    record, asked = rewrite(data, cat)
    assert record["kept"] == len(kept)
    assert record["written"] == 12
    again = {str(caption_of(body)).replace("dog", "cat") for body in asked[1:]}
    assert not again & kept
    # A third start asks for nothing, not even an example.
    record, asked = rewrite(data, cat)
    assert (record["kept"], record["usage"]["requests"], asked) == (12, 0, [])


def test_another_question_is_asked_anew(data: Path) -> None:
    rewrite(data, cat)
    record, asked = rewrite(data, cat, tries=5)
    assert record["kept"] == 0
    assert len(asked) == 25


def test_a_killed_run_goes_on_where_it_stopped(data: Path) -> None:
    gate = threading.Semaphore(9)

    def throttled(body: dict[str, Any]) -> str:
        gate.acquire()
        return cat(body)

    output = data.parent / "hard.jsonl"
    with chat_server.serving(speaking(throttled)) as (server, asked):
        command = ["negatives", "perturb", data, "--output", output, "--kinds", "replace_obj=1"]
        command += ["--engine", "openai", "--base-url", server.base_url, "--model", "m"]
        command = [sys.executable, "-m", "cwdpo_bench", *map(str, command), "--concurrency", "2"]
        parent = str(Path(cli.__file__).parents[1])
        path = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(asked) < 11:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = {one["text"] for one in lines(journal_of(output))}
        with journal_of(output).open("ab") as journal:
            journal.write(b'{"key": "cut o')
        assert len(kept) >= 3
        del asked[:]
        gate.release(1000)
        record = rewrite_file(data, output, OBJ, server, Writing("m"))
    assert (record["written"], record["kept"]) == (12, len(kept))
    again = {str(caption_of(body)).replace("dog", "cat") for body in asked[1:]}
    assert not again & kept
    assert len(lines(journal_of(output))) == 12


# --- what is kept --------------------------------------------------------------------------------


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path / "x.jsonl"),
        pytest.raises(UserError, match="another run is writing it"),
        open_journal(tmp_path / "x.jsonl"),
    ):
        pass


def test_a_broken_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"key": "a"}\nnot json\n')
    with (
        pytest.raises(UserError, match=r"x\.jsonl: line 2: not a kept reply"),
        open_journal(tmp_path / "x.jsonl"),
    ):
        pass


def test_neither_key_nor_address_is_kept_or_said(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    _, asked = rewrite(data, cat, key_variable="MY_KEY")
    assert {body["headers"].get("Authorization") for body in asked} == {f"Bearer {KEY}"}
    said = capfd.readouterr()
    texts = [said.out, said.err, *(p.read_text() for p in data.parent.iterdir())]
    assert not any(KEY in text or "127.0.0.1" in text for text in texts)


# --- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('{"caption": "a"}', "a"),
        ('{"caption": null}', None),
        ('x {"caption": "a"} y {"caption": "b"} z', "b"),
        ('{"other": {"caption": "inner"}}', writer.NOTHING),
        ('{"caption": "a', writer.NOTHING),
        ("{" * 5000, writer.NOTHING),
        ("[" * 5000, writer.NOTHING),
        ("", writer.NOTHING),
    ],
)
def test_an_answer_is_found_in_a_reply(reply: str, found: object) -> None:
    assert answer_in(reply, "caption") is found or answer_in(reply, "caption") == found


@pytest.mark.parametrize(
    ("caption", "text", "expected"),
    [
        ("A dog.", "a\n cat", "A cat."),
        ("a dog", "A cat.", "a cat"),
        ("a dog", "TV on", "TV on"),
        ("A dog.", "", ""),
        ("", "a cat", "a cat"),
    ],
)
def test_start_and_end_are_those_of_the_caption(caption: str, text: str, expected: str) -> None:
    assert dressed(caption, text) == expected


def test_our_own_examples_pass_the_rule() -> None:
    assert writer._KINDS.keys() == set(KINDS)
    for kind, (_, example) in writer._KINDS.items():
        assert edits.refusal(*example, kind) is None, kind


def test_captions_changed_by_rule_pass_as_a_models(data: Path) -> None:
    """A model that writes what our rules write, in every kind, is accepted throughout."""
    captions = ["The man is riding a horse while a woman holds a green umbrella and a yellow bag."]
    made = {
        kind: change.text
        for kind in KINDS
        if (change := perturb(captions, {kind: 1.0}).changes[0]) is not None
    }
    assert len(made) == len(KINDS)
    for kind, text in made.items():
        assert edits.refusal(captions[0], text, kind) is None, (kind, text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--engine openai", "name --base-url"),
        ("--engine openai --base-url http://x/v1", "--model"),
        ("--model m", "go with --engine openai"),
        ("--engine openai --base-url x --model m", "http://"),
        ("--engine openai --base-url http://x/v1 --model m --tries 0", "--tries"),
        ("--engine openai --base-url http://x/v1 --model m --temperature -1", "--temperature"),
        ("--engine openai --base-url http://x/v1 --model m --prices 3", "--prices"),
        ("--engine openai --base-url http://x/v1 --model m --prices 3,-1", "--prices"),
        ("--engine openai --base-url http://x/v1 --model m --kinds swap=1", "swap_obj"),
    ],
)
def test_a_mistake_gets_one_clear_error(data: Path, options: str, said: str) -> None:
    command = ["negatives", "perturb", str(data), "--output", str(data.parent / "o.jsonl")]
    result = CliRunner().invoke(cli.app, [*command, *options.split()])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
    assert not (data.parent / "o.jsonl").exists()
