"""Others' text in our documents: on one line, and read as text by markdown and HTML."""

from __future__ import annotations

import re

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"})


def plain(text: str) -> str:
    """`text` on one line, without control, escape or direction characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escape(text: str) -> str:
    """`text` on one line with nothing that markdown, its tables or HTML would read as a sign."""
    signs = re.sub(r"([\\`*_{}\[\]()#~!$])", r"\\\1", plain(text)).translate(_ENTITIES)
    # Bare addresses become links by themselves.
    return signs.replace("://", "&#58;//").replace("www.", "www&#46;")


def code(text: str) -> str:
    """`text` on one line as code, in which markdown and HTML stay letters."""
    return f"`{plain(text).replace('`', chr(39))}`"
