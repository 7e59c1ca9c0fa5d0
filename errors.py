"""The one exception for a mistake that the user can mend.

The command line prints its text without a traceback and exits with status 2. The text names the
file, line or key and says the mend. Everything else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input; the message names the place and the mend."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `name`, or lists all when none is near."""
    words = sorted(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(words)}"


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception says, on one line and not too long; its name where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " …"
