"""The report's HTML file: template, style and script of `page/`, and data blocks.

The page's Content-Security-Policy allows its own style and script by their hashes, pictures as
data, and nothing else: no text of a model could run or fetch anything even if it were markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cwdpo_bench.leaderboards.report_samples import dumps
from cwdpo_bench.markup import plain

_PAGE = files("cwdpo_bench.leaderboards") / "page"
PICTURES_A_BLOCK = 100
"""Pictures are decoded from their JSON a block at a time, when one of it is looked at."""


def render_page(
    content: Mapping[str, Any], samples: Mapping[str, str], pictures: Sequence[str]
) -> str:
    """The whole page.

    Args:
        content: what the template shows.
        samples: task → its samples as JSON, safe inside a script element.
        pictures: base64 text of WebP files.
    """
    style, script = (_read(name) for name in ("report.css", "report.js"))
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    blocks = {f"samples-{number}": text for number, text in enumerate(samples.values())}
    for start in range(0, len(pictures), PICTURES_A_BLOCK):
        part = list(pictures[start : start + PICTURES_A_BLOCK])
        blocks[f"pictures-{start // PICTURES_A_BLOCK}"] = dumps(part)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    template = environment.from_string(_read("report.html.j2"))
    # Style and script are files of this package; `dumps` made the blocks safe.
    return template.render(
        **content,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        tasks_shown=list(samples),
        blocks={name: Markup(text) for name, text in blocks.items()},
    )


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
