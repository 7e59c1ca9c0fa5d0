"""A stand-in of the Hub's HTTP API: repositories, commits of small files, and who may write.

The real `huggingface_hub` client talks to it. Every file goes into its commit as it is, so that
what was pushed can be read here byte for byte.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class HubStandIn:
    """What it was told.

    Attributes:
        address: of the server.
        token: the one that may write.
        repositories: names, with what was asked for when they were made.
        files: of each repository and revision, path → bytes.
        commits: (repository, revision, message), in order.
        refuse_commits: an HTTP status, where it is to fail on commits.
        bodies: all that was sent beside the headers.
    """

    address: str = ""
    token: str = "hf_secretOfMine"
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    refuse_commits: int | None = None
    bodies: list[bytes] = field(default_factory=list)


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Serve until the block ends."""
    hub = HubStandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"error": "not found"}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hub.bodies.append(body)
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer({"error": "Invalid username or password."}, 401)
                return
            parts = self.path.strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                owner = asked.get("organization") or "me"
                name = f"{owner}/{asked['name']}"
                made = name not in hub.repositories
                hub.repositories.setdefault(name, asked)
                self.answer({"url": f"{hub.address}/{name}"}, 200 if made else 409)
                return
            if parts == ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
                return
            name, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
            if action == "branch":
                hub.files.setdefault((name, revision), {})
                self.answer({})
            elif action == "preupload":
                asked = json.loads(body)["files"]
                kept = [{"path": f["path"], "uploadMode": "regular"} for f in asked]
                self.answer({"files": [{**f, "shouldIgnore": False} for f in kept]})
            elif action == "commit" and hub.refuse_commits is not None:
                self.answer({"error": "no space in this repository"}, hub.refuse_commits)
            elif action == "commit":
                self.commit(name, revision, body)
            else:
                self.answer({"error": self.path}, 404)

        def commit(self, name: str, revision: str, body: bytes) -> None:
            lines = [json.loads(line) for line in body.splitlines()]
            tree = hub.files.setdefault((name, revision), {})
            for line in lines:
                if line["key"] == "file":
                    tree[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            summary = lines[0]["value"]["summary"]
            hub.commits.append((name, revision, summary))
            self.answer({"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
