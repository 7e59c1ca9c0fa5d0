"""One request to an OpenAI-compatible server, sent until it is answered or given up.

A request that may succeed later (no connection, too slow, cut off, not JSON, 408, 429, 5xx) is sent
again after a wait that doubles, or that the server names in `Retry-After`. What no repetition mends
ends the run (no such server or model, a refused key, a budget used up) or the sample alone (too
long an input). Neither the address nor the key stands in any message. `concurrently` keeps several
requests under way.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from cwdpo_bench.errors import UserError

MAX_REPLY_BYTES = 16_000_000
"""A longer reply is no reply to a question of ours."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at the most, whatever `Retry-After` asks for."""
_FIRST_WAIT = 0.5
_MAY_PASS = {408, 409, 425, 429}
_SHOWN = 200
_LIKE_A_SECRET = re.compile(
    r"\w+://\S+"  # an address, another server's too
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\blocalhost(?::\d+)?\b"
    r"|\b(?:sk|pk|hf|gsk|xai)[-_]\S+|\bBearer\s+\S+"
    r"|\S*\*{3,}\S*"  # a key that is partly hidden
    r"|[A-Za-z0-9_+/=]{32,}",
    re.IGNORECASE,
)
"""In a server's words: addresses and what may be a key, also where it is not this run's."""


@dataclass(frozen=True)
class Server:
    """Where and how to ask.

    Attributes:
        base_url: up to and with `/v1`.
        key_variable: the environment variable that holds the key; where it is not set, none is
            sent.
        concurrency: requests under way at a time.
        timeout: seconds for a request as a whole.
        retries: how often a request that failed is sent again.
        max_requests: end the run before it sends more, repetitions included.
        max_total_tokens: end the run once the server has counted so many, of prompts and replies.
    """

    base_url: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5
    max_requests: int | None = None
    max_total_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: names the option.
        """
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError("--base-url: must start with http:// or https:// and end with /v1")
        for option, value, least in (
            ("--concurrency", self.concurrency, 1),
            ("--retries", self.retries, 0),
            ("--max-requests", self.max_requests, 1),
            ("--max-total-tokens", self.max_total_tokens, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{option}: must be {least} or more, not {value}")
        if not self.timeout > 0:
            raise UserError(f"--timeout: must be more than 0 seconds, not {self.timeout:g}")


class Usage(NamedTuple):
    """What a server was asked and has counted; tokens are 0 where it does not count them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class RequestFailed(Exception):
    """This request will not be answered; others may. The text is one line.

    Attributes:
        status: with which the server refused it; None where it did not say anything.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        """Take the reason and the status."""
        super().__init__(reason)
        self.status = status


class _TryAgain(Exception):
    def __init__(
        self,
        reason: str,
        wait: float | None = None,
        *,
        status: int | None = None,
        unreached: bool = False,
    ) -> None:
        super().__init__(reason)
        self.wait, self.status, self.unreached = wait, status, unreached


class Client:
    """Sends chat requests to a server; safe to use from several threads."""

    def __init__(self, server: Server, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Open nothing yet.

        Raises:
            UserError: httpx is not installed.
        """
        try:
            import httpx
        except ImportError as error:
            raise UserError("--engine openai: pip install 'cwdpo-bench[openai]'") from error
        # At INFO they write every address down.
        for library in ("httpx", "httpcore"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self._server = server
        self._sleep = sleep
        self._lock = threading.Lock()
        self._requests = 0
        self._tokens = 0
        self._usage = Usage()
        self._key = os.environ.get(server.key_variable, "").strip()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=server.concurrency)
        self._http = httpx.Client(headers=headers, timeout=server.timeout, limits=limits)
        self._url = server.base_url.rstrip("/") + "/chat/completions"

    @property
    def usage(self) -> Usage:
        """Of all requests so far, repetitions included."""
        with self._lock:
            return self._usage._replace(requests=self._requests)

    def close(self) -> None:
        """Give the connections back; requests under way end with an error."""
        self._http.close()

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's reply, with a `message` in its first choice.

        Raises:
            RequestFailed: after all tries, or at once where another try would not help.
            UserError: what no other request would escape.
        """
        tries = self._server.retries + 1
        for number in range(1, tries + 1):
            self._spend()
            try:
                return self._once(body)
            except _TryAgain as error:
                if number == tries:
                    reason = f"{error} ({tries} tries)"
                    if error.unreached:
                        raise UserError(
                            f"the server of --base-url is not there: {reason}; start it, or mend "
                            "the address"
                        ) from error
                    raise RequestFailed(reason, error.status) from error
                doubled = _FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.5, 1)
                self._sleep(min(LONGEST_WAIT, doubled if error.wait is None else error.wait))
        raise AssertionError("unreachable")

    def _spend(self) -> None:
        """Count a request, unless the budget has no room for it."""
        server = self._server
        with self._lock:
            if server.max_requests is not None and self._requests >= server.max_requests:
                raise UserError(
                    f"the budget of {server.max_requests} requests is used up; raise "
                    "--max-requests to go on"
                )
            if server.max_total_tokens is not None and self._tokens >= server.max_total_tokens:
                raise UserError(
                    f"the budget of {server.max_total_tokens} tokens is used up; raise "
                    "--max-total-tokens to go on"
                )
            self._requests += 1

    def _once(self, body: Mapping[str, Any]) -> dict[str, Any]:
        import httpx

        try:
            status, headers, content = self._send(body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise _TryAgain("no connection", unreached=True) from error
        except httpx.TimeoutException as error:
            raise _TryAgain(f"no reply within {self._server.timeout:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TryAgain("the reply was cut off") from error
        except httpx.InvalidURL as error:
            raise UserError("--base-url: is not an address") from error
        if status != 200:
            raise self._refusal(status, headers, content)
        reply = _parsed(content)
        total, counted = _counted(reply.get("usage"))
        with self._lock:
            self._tokens += total
            self._usage = Usage(*map(sum, zip(self._usage, counted, strict=True)))
        return reply

    def _send(self, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body. httpx limits each wait for bytes, this the whole."""
        import httpx

        end = time.monotonic() + self._server.timeout
        content = bytearray()
        with self._http.stream("POST", self._url, json=dict(body)) as reply:
            for part in reply.iter_bytes():
                content += part
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("slow")
                if len(content) > MAX_REPLY_BYTES:
                    raise RequestFailed(f"the reply has more than {MAX_REPLY_BYTES:,} bytes")
        return reply.status_code, reply.headers, bytes(content)

    def _refusal(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        # What a server says of a refused key may quote it, in part or otherwise written.
        words = "" if status in (401, 403) else self._words(content)
        told = f"the server answered {status}" + (f": {words}" if words else "")
        if status in _MAY_PASS or status >= 500:
            return _TryAgain(told, _seconds(headers.get("retry-after")), status=status)
        if status in (401, 403):
            return UserError(f"{told}; set the key in ${self._server.key_variable}")
        if status == 404:
            return UserError(f"{told}; mend --base-url (it ends with /v1) or --model")
        return RequestFailed(told, status)

    def _words(self, content: bytes) -> str:
        """What the server says was wrong, in one short line without address and key."""
        text = content.decode("utf-8", "replace")
        try:
            found = json.loads(text)
        except ValueError:
            # A page for people, most of all the one of a proxy: the status says as much.
            return ""
        if isinstance(found, dict):
            found = found.get("error", found.get("detail", found.get("message", "")))
        if isinstance(found, dict):
            found = found.get("message", "")
        words = " ".join(str(found).split())
        host = self._http.build_request("POST", self._url).url.host
        for secret in (self._key, self._server.base_url, host):
            if secret:
                words = words.replace(secret, "…")
        words = _LIKE_A_SECRET.sub("…", words)
        return words if len(words) <= _SHOWN else words[:_SHOWN] + " …"


def _counted(usage: object) -> tuple[int, Usage]:
    """All tokens of a reply, and those of prompt and completion, as far as the server tells."""
    told = usage if isinstance(usage, dict) else {}
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    prompt, completion, total = (
        number if isinstance(number := told.get(name), int) else 0 for name in names
    )
    return total or prompt + completion, Usage(0, prompt, completion)


def _seconds(header: str | None) -> float | None:
    """Of `Retry-After`: a number, or the date up to which to wait; None where it is neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    # Without a zone it is UTC, as HTTP's dates are.
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(content)
        message = reply["choices"][0]["message"]
    except (ValueError, LookupError, TypeError) as error:
        raise _TryAgain("the reply is no chat completion") from error
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise _TryAgain("the reply is no chat completion")
    parsed: dict[str, Any] = reply
    return parsed


Item = TypeVar("Item")
Result = TypeVar("Result")


def concurrently(
    work: Callable[[Item], Result], items: Sequence[Item], limit: int
) -> Iterator[tuple[int, Result]]:
    """What `work` makes of each item, with the item's place, as it comes.

    Args:
        work: called in threads.
        items: in the order in which they are begun.
        limit: under way at a time.

    Raises:
        Exception: the first that `work` raised. No item is begun after it, and those that were
            under way have been given out before.
    """
    places, turn, stopped = iter(range(len(items))), threading.Lock(), threading.Event()
    done: SimpleQueue[tuple[int, Result] | BaseException | None] = SimpleQueue()

    def worker() -> None:
        while not stopped.is_set():
            with turn:
                place = next(places, None)
            if place is None:
                break
            try:
                done.put((place, work(items[place])))
            except BaseException as error:
                stopped.set()
                done.put(error)
        done.put(None)

    # Daemons: who interrupts a run does not wait for requests that are under way.
    alive = min(limit, len(items))
    for _ in range(alive):
        threading.Thread(target=worker, daemon=True).start()
    first: BaseException | None = None
    try:
        while alive:
            got = done.get()
            if got is None:
                alive -= 1
            elif isinstance(got, BaseException):
                first = first or got
            else:
                yield got
    finally:
        stopped.set()
    if first is not None:
        raise first
