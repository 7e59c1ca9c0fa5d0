"""A language model behind a server writes rejected captions: asked, held to the rule, asked again.

The model is given a caption and a kind of change and answers with JSON. `edits.refusal` decides
whether that is one minimal change of the kind; then the model is asked whether both captions say
the same, which no rule can tell. A refused reply is sent back with the reason. Where the model
finds no change of a kind, the next kind is asked for. It sees no image: a change contradicts the
caption, and what it names may happen to be in the picture.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.server import Client, RequestFailed
from cwdpo_bench.train.preferences import edits

NO_JSON, NONE, PARAPHRASE = "not the JSON asked for", "the model finds no change", "a paraphrase"

_KINDS = {
    "replace_obj": (
        "replace one thing (a person, an animal, an object, a place) by another one that the "
        "caption does not name",
        ("A dog asleep on a red sofa.", "A cat asleep on a red sofa."),
    ),
    "replace_att": (
        "replace one attribute (a color, size, material, state, age, number) by another one that "
        "excludes it",
        ("A dog asleep on a red sofa.", "A dog asleep on a green sofa."),
    ),
    "replace_rel": (
        "replace one relation (a preposition or a verb) by another one that excludes it",
        ("A dog asleep on a red sofa.", "A dog asleep under a red sofa."),
    ),
    "swap_obj": (
        "let two things that the caption names change places, so that it says something else",
        ("A man watches a girl who holds a ball.", "A girl watches a man who holds a ball."),
    ),
    "swap_att": (
        "let two attributes of different things change places, so that it says something else",
        ("A white dog on a red sofa.", "A red dog on a white sofa."),
    ),
    "add_obj": (
        "add one thing that the caption does not name, with its article, in at most 8 words",
        ("A dog asleep on a red sofa.", "A dog and a cat asleep on a red sofa."),
    ),
    "add_att": (
        "add one attribute, of at most 4 words, to a thing that the caption names",
        ("A dog asleep on a red sofa.", "A spotted dog asleep on a red sofa."),
    ),
}
_WHY = {
    NO_JSON: "it is not the JSON object that was asked for",
    PARAPHRASE: "it means the same as the caption",
    edits.EMPTY: "it is empty",
    edits.EQUAL: "it is the caption itself",
    edits.FORMS: "it changes the form of words alone",
    edits.MORE: "it changes more than one thing",
    edits.LARGE: "it changes too many words",
    edits.NOT_ADDED: "it does more than add words: all words of the caption must stay in place",
    edits.NOT_SWAPPED: "no two parts of the caption have changed places, all else left as it was",
    edits.NOT_REPLACED: "it adds or removes words instead of replacing some",
    edits.OTHER_KIND: "it is a change of another kind than the one asked for",
    edits.SAME: "it still says the same, or no less",
    edits.NEGATED: "it negates; say something else instead",
}


@dataclass(frozen=True)
class Writing:
    """How the captions are asked for.

    Attributes:
        model: its name at the server.
        tries: replies to a caption that are looked at, over all kinds.
        verify: whether the model is asked if both captions say the same.
        temperature: divides the logits.
        max_new_tokens: of a reply.
    """

    model: str
    tries: int = 3
    verify: bool = True
    temperature: float = 0.7
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: names the option.
        """
        if self.tries < 1:
            raise UserError(f"--tries: must be 1 or more, not {self.tries}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature: must be 0 or more, not {self.temperature:g}")


@dataclass
class Written:
    """What became of a caption.

    Attributes:
        text: the rejected caption; None where every reply was refused.
        kind: of its change.
        edit: `old -> new`, the words that changed.
        refused: why replies were refused, in order.
        requests: answered for it.
        prompt_tokens: of them, as the server counts.
        completion_tokens: likewise.
    """

    text: str | None = None
    kind: str | None = None
    edit: str | None = None
    refused: list[str] = field(default_factory=list)
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def kinds_for(identity: str, caption: str, shares: Mapping[str, float], seed: int) -> list[str]:
    """All kinds with a share, in the order in which they are asked of a caption.

    Drawn one after the other by their shares, from what names the caption alone: an order does not
    depend on which captions were asked before.
    """
    rng = random.Random(f"{seed} {identity} {caption}")
    left = {kind: share for kind, share in shares.items() if share}
    order = []
    while left:
        order += rng.choices(list(left), list(left.values()))
        del left[order[-1]]
    return order


class Writer:
    """Asks a server for rejected captions.

    Attributes:
        structured: what of structured output the server takes: `json_schema`, `json_object`, none.
    """

    def __init__(self, client: Client, writing: Writing) -> None:
        """Find out what the server takes, by asking it about an example.

        Raises:
            UserError: it is not there, knows no such model, refuses the key, or every form of the
                question.
        """
        self._client, self._writing = client, writing
        instruction, (caption, _) = _KINDS["replace_obj"]
        question = [_question(caption, instruction, _KINDS["replace_obj"][1])]
        for structured, settings in self._manners():
            self.structured, self._settings = structured, settings
            try:
                client.chat(self._body(question, "caption", ["string", "null"]))
                return
            except RequestFailed as error:
                refused = error
                if error.status is None:
                    break
        raise UserError(
            f"the server does not answer an example ({refused}); mend --base-url, which as a rule "
            "ends with /v1, or --model"
        )

    def write(self, caption: str, kinds: list[str]) -> Written:
        """A rejected caption for a chosen one, or why there is none.

        Args:
            caption: the chosen one.
            kinds: in the order in which they are tried.

        Raises:
            RequestFailed: a request was not answered.
            UserError: what no other caption would escape.
        """
        written = Written()
        waiting = iter(kinds)
        kind = next(waiting)
        talk = [_question(caption, *_KINDS[kind])]
        for _ in range(self._writing.tries):
            reply = self._ask(talk, "caption", ["string", "null"], written)
            found = answer_in(reply, "caption")
            if found is not NOTHING and found is None:
                written.refused.append(NONE)
                following = next(waiting, None)
                if following is None:
                    break
                kind = following
                talk = [_question(caption, *_KINDS[kind])]
                continue
            text = dressed(caption, found) if isinstance(found, str) else None
            reason = NO_JSON if text is None else self._refused(caption, text, kind, written)
            if reason is None and text is not None:
                written.text, written.kind = text, kind
                written.edit = edits.change_between(caption, text).told()
                break
            assert reason is not None
            written.refused.append(reason)
            # The last reply alone: what was wrong before would only make the question longer.
            talk = [talk[0], _turn("assistant", reply), _turn("user", _again(reason))]
        return written

    def _refused(self, caption: str, text: str, kind: str, written: Written) -> str | None:
        reason = edits.refusal(caption, text, kind)
        if reason is None and self._writing.verify:
            told = _SAME.format(first=json.dumps(caption), second=json.dumps(text))
            reply = self._ask([_turn("user", told)], "same", "boolean", written)
            # Without a clear no the caption may be as true as the chosen one.
            return None if answer_in(reply, "same") is False else PARAPHRASE
        return reason

    def _ask(
        self, messages: list[dict[str, str]], name: str, kind: str | list[str], written: Written
    ) -> str:
        reply = self._client.chat(self._body(messages, name, kind))
        usage = reply.get("usage")
        counted = usage if isinstance(usage, dict) else {}
        written.requests += 1
        written.prompt_tokens += _number(counted.get("prompt_tokens"))
        written.completion_tokens += _number(counted.get("completion_tokens"))
        return reply["choices"][0]["message"].get("content") or ""

    def _manners(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Forms of a request, the best first. Some servers take neither the old name of the limit
        nor a temperature, some no schema, some no format at all."""
        limit, warm = self._writing.max_new_tokens, {"temperature": self._writing.temperature}
        yield "json_schema", {"max_tokens": limit, **warm}
        yield "json_schema", {"max_completion_tokens": limit}
        yield "json_object", {"max_tokens": limit, **warm}
        yield "none", {"max_tokens": limit, **warm}

    def _body(
        self, messages: list[dict[str, str]], name: str, kind: str | list[str]
    ) -> dict[str, Any]:
        schema = {
            "type": "object",
            "properties": {name: {"type": kind}},
            "required": [name],
            "additionalProperties": False,
        }
        formats: dict[str, dict[str, Any]] = {
            "json_schema": {
                "type": "json_schema",
                "json_schema": {"name": name, "strict": True, "schema": schema},
            },
            "json_object": {"type": "json_object"},
        }
        body = {"model": self._writing.model, "messages": messages, **self._settings}
        if self.structured in formats:
            body["response_format"] = formats[self.structured]
        return body


NOTHING = object()
"""No answer in a reply; None is one."""


def answer_in(reply: str, name: str) -> Any:
    """What a reply gives under a name: it is JSON, or text that holds a JSON object with it.

    Returns:
        The value in the last such object (before it may stand drafts), or `NOTHING`.
    """
    decoder, found, start = json.JSONDecoder(), NOTHING, 0
    while (start := reply.find("{", start)) >= 0:
        try:
            value, end = decoder.raw_decode(reply, start)
        except (ValueError, RecursionError):
            start += 1
            continue
        found = value.get(name, found)
        start = end
    return found


def dressed(caption: str, text: str) -> str:
    """The text on one line, its first letter and its end as the caption has them.

    Otherwise chosen and rejected answers could be told apart by a full stop.
    """
    text = " ".join(text.split())
    body = caption.strip()
    if text and body.endswith(".") != text.endswith("."):
        text = text.removesuffix(".") if text.endswith(".") else text + "."
    if body[:1].islower() and text[:1].isupper() and not text[1:2].isupper():
        return text[0].lower() + text[1:]
    if body[:1].isupper():
        return text[:1].upper() + text[1:]
    return text


_TASK = """\
Change an image caption so that it says something else. Make exactly one change: {what}. Keep \
every other word and its place, except what grammar demands. The new caption must be fluent and \
plausible, must not mean the same, and must not use a negation.
Example: {before} -> {after}
If the caption allows no such change, the answer is null.
Caption: {caption}
Answer with JSON alone: {{"caption": "the new caption"}} or {{"caption": null}}"""
_SAME = """\
Two captions of an image.
1: {first}
2: {second}
Do they mean the same, so that each is true wherever the other is? Answer with JSON alone: \
{{"same": true}} or {{"same": false}}"""


def _question(caption: str, what: str, example: tuple[str, str]) -> dict[str, str]:
    before, after = map(json.dumps, example)
    told = json.dumps(caption, ensure_ascii=False)
    return _turn("user", _TASK.format(what=what, before=before, after=after, caption=told))


def _again(reason: str) -> str:
    return (
        f"That is refused: {_WHY[reason]}. Make the one change that was asked for in the caption "
        'above, and answer with JSON alone: {"caption": …}'
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
