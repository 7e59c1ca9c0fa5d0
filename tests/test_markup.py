"""Text of others in documents: no sign of it is read as markup."""

from __future__ import annotations

import pytest

from cwdpo_bench.markup import code, escape


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", "a&#124;b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("`x` *y* _z_ [l](u)", r"\`x\` \*y\* \_z\_ \[l\]\(u\)"),
        ("back\\|slash", r"back\\&#124;slash"),
        ("two\nlines\r\n\tand \u202etab", "two lines and tab"),
        ("https://x.y www.z", "https&#58;//x.y www&#46;z"),
        ("Qwen/Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B"),
    ],
)
def test_signs_of_markdown_and_html_are_escaped(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("text", "shown"), [("a`b", "`a'b`"), ("two\nlines \x1b[31m", "`two lines [31m`")]
)
def test_code_ends_where_it_ends(text: str, shown: str) -> None:
    assert code(text) == shown
