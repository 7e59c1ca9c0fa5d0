"""Keeps the libraries' own chatter out of our display; to be called before they are imported."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Only errors from transformers and the Hub; no progress bars of theirs beside ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    # Raised by transformers and peft at each other, not at the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
