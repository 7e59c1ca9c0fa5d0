"""The OpenAI-compatible engine: a server answers a benchmark's samples (vLLM, SGLang, …).

Images are sent as data URLs: plain JPEG and PNG files as they are, all else as PNG of our pixels
(`vlm/images.py`). What a server gives of the options' log-probabilities is found out by asking it
once, before the run, and stands in the signature:

- `prompt`: log-probabilities of a prompt's tokens (vLLM). Each option is sent as the start of the
  answer, and the values of its tokens add up: what the in-process engine computes.
- `first-token`: the likeliest first tokens of the reply. A question one of whose options is not
  among them has no option log-probabilities, and counts for accuracy alone.
- `none`: neither. `transformers serve` drops the wish without a word, so what counts is what came
  back, never what was asked for.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer, Failure
from cwdpo_bench.evaluate.images import images_to_send
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.evaluate.server import Client, RequestFailed, Server, concurrently

Scores = Literal["prompt", "first-token", "none"]
TOPS = (20, 5)
"""First tokens that servers give at the most; one that gives fewer refuses to be asked for more."""
# Greedy, whatever the model's own settings say. OpenAI's interface has no repetition penalty of
# this name; `frequency_penalty: 0` says the same to the servers that refuse it.
_GREEDY = {"temperature": 0, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
_OWN_WORDS = {"repetition_penalty": 1.0}

Sample = TypeVar("Sample", CaptionSample, ChoiceSample)
Answer = TypeVar("Answer", CaptionAnswer, ChoiceAnswer)


class ServedEngine:
    """A model behind a server.

    Attributes:
        scores: where options' log-probabilities come from, see above.
        extended: whether the server knows vLLM's words beside OpenAI's.
    """

    name = "openai"
    shift_from = None
    draws = 0
    chunk_size = 1

    def __init__(
        self, server: Server, model: str, root: Path, *, client: Client | None = None
    ) -> None:
        """Ask the server what it gives.

        Args:
            server: where it is.
            model: its name there.
            root: the data root; no image may lie outside it.
            client: to ask with; default one of our own.

        Raises:
            UserError: the server is not there, knows no such model, or refuses the key.
        """
        self._server = server
        self._model = model
        self._root = root
        self._client = Client(server) if client is None else client
        self.extended, self.scores = self._probe()

    @property
    def model(self) -> Mapping[str, object]:
        """The name alone: a server does not say what it runs."""
        return {"name": self._model}

    @property
    def signature_parts(self) -> Mapping[str, object]:
        """Where option log-probabilities come from; precision and resolution are the server's."""
        return {
            "engine": self.name,
            "dtype": "server",
            "images": "server",
            "option_scores": self.scores,
        }

    @property
    def provenance(self) -> Mapping[str, object]:
        """How many requests at a time; no address."""
        return {"device": "server", "concurrency": self._server.concurrency}

    def fingerprint(self) -> str:
        """Of the model's name and the source of the scores: it cannot know the weights."""
        return hashlib.sha256(f"{self._model}\n{self.scores}".encode()).hexdigest()

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def answer_captions(
        self, samples: Sequence[CaptionSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, CaptionAnswer | Failure]]:
        """Greedy captions; a server scores no reference.

        Raises:
            UserError: the server is gone, refuses the key, or the budget is used up.
        """

        def answer(sample: CaptionSample) -> CaptionAnswer:
            content = self._content(sample)
            return CaptionAnswer(_text(self._reply(content, max_new_tokens)), None)

        return self._answers(samples, answer)

    def answer_choices(
        self, samples: Sequence[ChoiceSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, ChoiceAnswer | Failure]]:
        """Greedy replies, with the options' log-probabilities where the server gives them.

        Raises:
            UserError: the server is gone, refuses the key, or the budget is used up.
        """

        def answer(sample: ChoiceSample) -> ChoiceAnswer:
            content, options = self._content(sample), sample.option_replies
            if not options or self.scores == "none":
                return ChoiceAnswer(_text(self._reply(content, max_new_tokens)), None)
            if self.scores == "first-token":
                reply = self._reply(content, max_new_tokens, logprobs=True, top_logprobs=self._top)
                return ChoiceAnswer(_text(reply), _of_first_token(reply, options))
            reply = self._reply(content, max_new_tokens)
            logps = [_of_prompt(self._continued(content, option), option) for option in options]
            known = [logp for logp in logps if logp is not None]
            return ChoiceAnswer(_text(reply), np.array(known) if len(known) == len(logps) else None)

        return self._answers(samples, answer)

    def _answers(
        self, samples: Sequence[Sample], answer: Callable[[Sample], Answer]
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """Replies as they come, `concurrency` samples under way at a time."""

        def outcome(sample: Sample) -> Answer | Failure:
            try:
                return answer(sample)
            except _BrokenSample as error:
                return Failure(str(error))
            except RequestFailed as error:
                return Failure(f"sample {sample.id}: {error}")

        return concurrently(outcome, samples, self._server.concurrency)

    # --- requests --------------------------------------------------------------------------------

    def _content(self, sample: CaptionSample | ChoiceSample) -> list[dict[str, Any]]:
        """The user's turn: the images, then the text."""
        try:
            images = images_to_send(sample, self._root)
        except UserError as error:
            raise _BrokenSample(str(error)) from error
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(kind, data)}}
            for kind, data in images
        ]
        return [*content, {"type": "text", "text": sample.prompt}]

    def _reply(
        self, content: Sequence[Mapping[str, Any]], max_new_tokens: int, **wishes: Any
    ) -> dict[str, Any]:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_new_tokens,
            **_GREEDY,
            **(_OWN_WORDS if self.extended else {}),
            **wishes,
        }
        return self._client.chat(body)

    def _continued(self, content: Sequence[Mapping[str, Any]], option: str) -> dict[str, Any]:
        """The log-probabilities of the prompt's tokens, the option its last ones."""
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": option}]
        return self._client.chat(
            {
                "model": self._model,
                "messages": messages,
                "add_generation_prompt": False,
                "continue_final_message": True,
                "max_tokens": 1,
                "prompt_logprobs": 0,
                **_GREEDY,
            }
        )

    def _probe(self) -> tuple[bool, Scores]:
        """What the server gives, by what comes back."""
        self.extended = False
        question = [{"type": "text", "text": "Answer with the letter A."}]
        # First plainly: a mistake in address, model or key has to be told as such.
        try:
            self._reply(question, 1)
        except RequestFailed as error:
            self.close()
            raise UserError(
                f"the server does not answer a plain question ({error}); mend --base-url, which "
                "as a rule ends with /v1, or --model"
            ) from error
        with suppress(RequestFailed):
            if _of_prompt(self._continued(question, "A"), "A") is not None:
                return True, "prompt"
        for self._top in TOPS:
            with suppress(RequestFailed):
                reply = self._reply(question, 1, logprobs=True, top_logprobs=self._top)
                if _first_tokens(reply):
                    return False, "first-token"
        return False, "none"


class _BrokenSample(Exception):
    """A sample whose images cannot be sent."""


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode("ascii")


def _text(reply: Mapping[str, Any]) -> str:
    return (reply["choices"][0]["message"].get("content") or "").strip()


# --- log-probabilities ---------------------------------------------------------------------------


def _of_prompt(reply: Mapping[str, Any], option: str) -> float | None:
    """Σ log p of the prompt's last tokens that make up the option; None where they do not."""
    found, total = "", 0.0
    for entry in reversed(reply.get("prompt_logprobs") or []):
        token = next(iter(entry.values()), None) if isinstance(entry, dict) else None
        if not isinstance(token, dict) or not isinstance(token.get("logprob"), int | float):
            return None
        found = str(token.get("decoded_token", "")) + found
        total += token["logprob"]
        if found == option:
            return float(total)
        if not option.endswith(found):
            return None
    return None


def _first_tokens(reply: Mapping[str, Any]) -> dict[str, float]:
    """Log-probabilities of the likeliest first tokens, by their text."""
    try:
        first = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {str(one["token"]): float(one["logprob"]) for one in first}
    except (LookupError, TypeError, ValueError):
        return {}


def _of_first_token(reply: Mapping[str, Any], options: Sequence[str]) -> np.ndarray | None:
    known = _first_tokens(reply)
    if not all(option in known for option in options):
        return None
    return np.array([known[option] for option in options])
