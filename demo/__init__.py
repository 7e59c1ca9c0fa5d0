"""The embedded default: a rendered world, a tiny VLM with its bundled base, and their study."""

from __future__ import annotations

import os
from pathlib import Path

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError

__all__ = ["base_path", "data_root"]


def base_path() -> Path:
    """The folder of the bundled base checkpoint, which stands for a pre-trained VLM."""
    return Path(__file__).parent / "base"


def data_root(cache: Path | None = None, seed: int = 0) -> Path:
    """The folder that holds the rendered world in the public layouts; made on first use.

    Args:
        cache: where it is kept; by default `$XDG_CACHE_HOME/cwdpo-bench` or `~/.cache/cwdpo-bench`.
        seed: of the scenes.

    Raises:
        UserError: it cannot be written.
    """
    # Rendering needs pyarrow and Pillow; whoever asks for a path alone should not wait for them.
    from cwdpo_bench.demo.layouts import render_world

    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "cwdpo-bench"
    root = cache / f"demo-{__version__}-{seed}"
    if root.is_dir():
        return root
    try:
        render_world(root, seed)
    except OSError as error:
        # Another process may have finished the same data first; theirs are as good.
        if root.is_dir():
            return root
        raise UserError(
            f"{root}: the demo's data cannot be written ({error.strerror}); free space, mend the "
            "rights, or set XDG_CACHE_HOME"
        ) from error
    return root
