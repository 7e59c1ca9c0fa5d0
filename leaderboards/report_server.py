"""A finished report on this machine's own address, for a browser here and no one else."""

from __future__ import annotations

import os
import sys
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "127.0.0.1"


def serve_report(page: str) -> None:
    """Open a report in a browser here and serve it until Ctrl-C."""
    with report_server(page) as server:
        address = f"http://{HOST}:{server.server_port}/"
        print(f"{address} (Ctrl-C ends)", flush=True)
        # Without a screen a browser of text might take the terminal over.
        if sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def report_server(page: str, port: int = 0) -> ThreadingHTTPServer:
    """A server of one page on 127.0.0.1; `serve_forever` runs it, `server_port` says where.

    Requests under another name than this machine's are refused, so that no web site can read the
    page through a name of its own that leads here.

    Args:
        page: the HTML.
        port: 0 takes a free one.
    """
    content = page.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.headers.get("Host", "").rpartition(":")[0]
            if name not in (HOST, "localhost"):
                self.send_error(403)
                return
            if self.path.partition("?")[0] != "/":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: the one reader is the one who started it."""

    return ThreadingHTTPServer((HOST, port), Handler)
