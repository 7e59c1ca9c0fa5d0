"""A chat server on this machine that does what a test tells it to, over real HTTP.

`serving` runs it; `replying` makes an act of a function from the request to the reply; `StandIn` is
such a function with a model behind it, which gives all that OpenAI's and vLLM's servers give.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from cwdpo_bench.evaluate.server import Server
from cwdpo_bench.vlm import VLM, Prompt, encode_prompts
from cwdpo_bench.vlm.batch import chat_text

Body = dict[str, Any]
Act = Callable[[BaseHTTPRequestHandler, Body], None]

OPENAI = {"model", "messages", "max_tokens", "temperature", "top_p", "frequency_penalty"}
OPENAI |= {"presence_penalty", "logprobs", "top_logprobs"}
VLLM = OPENAI | {"repetition_penalty", "prompt_logprobs", "add_generation_prompt"}
VLLM |= {"continue_final_message"}
"""Words that such a server knows; it refuses all others."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.released = threading.Event()
        """Set at the end, for acts that wait for it."""

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serving(act: Act, **settings: Any) -> Iterator[tuple[Server, list[Body]]]:
    """A server that does `act` at every request; how to reach it, and what it has been asked.

    Args:
        act: answers by the handler.
        settings: of `Server`, in place of no retries, 30 s and 3 requests at a time.
    """
    asked: list[Body] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "headers": dict(self.headers), "path": self.path})
            with suppress(OSError):
                act(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    with _Quiet(Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            defaults = {"retries": 0, "timeout": 30, "concurrency": 3}
            yield Server(address, **{**defaults, **settings}), asked
        finally:
            server.released.set()
            server.shutdown()


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> None:
    """A whole reply; `Retry_After="7"` is the header of that name."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def replying(reply: Callable[[Body], Body], known: set[str] | None = None) -> Act:
    """The act that sends what `reply` gives; 400 where that is an error, or for unknown words."""

    def act(handler: BaseHTTPRequestHandler, body: Body) -> None:
        unknown = set() if known is None else set(body) - known
        told = {"error": {"message": f"unknown: {sorted(unknown)}"}} if unknown else reply(body)
        send(handler, 400 if "error" in told else 200, json.dumps(told).encode())

    return act


class StandIn:
    """What a server of a model does with a request, by the plainest forward there is."""

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self._lock = threading.Lock()

    def __call__(self, body: Body) -> Body:
        user, *assistant = body["messages"]
        answer = assistant[0]["content"] if assistant else ""
        decode = self._vlm.tokenizer.decode
        with self._lock, torch.no_grad():
            inputs = self._inputs(user["content"], answer)
            ids = inputs["input_ids"][0]
            logps = self._vlm.model(**inputs).logits[0].float().log_softmax(-1)
            new = self._vlm.model.generate(
                **inputs, max_new_tokens=body["max_tokens"], do_sample=False
            )[0, len(ids) :]
        message = {"role": "assistant", "content": decode(new, skip_special_tokens=True)}
        choice: Body = {"message": message}
        if body.get("logprobs"):
            top = logps[-1].topk(body["top_logprobs"])
            tokens = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            named = [{"token": decode([token]), "logprob": logp} for token, logp in tokens]
            choice["logprobs"] = {"content": [{**named[0], "top_logprobs": named}]}
        reply: Body = {"choices": [choice]}
        if "prompt_logprobs" in body:
            reply["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": row[token].item(), "decoded_token": decode([token])}}
                for row, token in zip(logps, ids[1:].tolist(), strict=False)
            ]
        return reply

    def _inputs(self, content: list[dict[str, Any]], answer: str) -> dict[str, torch.Tensor]:
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        data = [base64.b64decode(url.partition(";base64,")[2], validate=True) for url in urls]
        images = tuple(Image.open(io.BytesIO(one)) for one in data)
        prompt = Prompt(content[-1]["text"], images)
        if not answer:
            return encode_prompts(self._vlm.processor, [prompt])
        text = chat_text(self._vlm.processor, prompt) + answer
        return dict(
            self._vlm.processor(text=[text], images=list(images) or None, return_tensors="pt")
        )
