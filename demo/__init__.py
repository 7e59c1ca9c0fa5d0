"""The embedded default: a rendered world, a tiny VLM with its bundled base, and their study."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError
from cwdpo_bench.files import write_text

__all__ = ["base_path", "data_root", "first_pairs", "model_path", "training_pairs"]


def base_path() -> Path:
    """The folder of the bundled base checkpoint, which stands for a pre-trained VLM."""
    return Path(__file__).parent / "base"


def model_path(model: str) -> str:
    """Where a model is loaded from: `demo` is the bundled base, all else its own name."""
    return str(base_path()) if model == "demo" else model


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

    root = _cache(cache) / f"demo-{__version__}-{seed}"
    return _made(root, lambda: render_world(root, seed))


def training_pairs(easy_share: float, cache: Path | None = None, seed: int = 0) -> Path:
    """The world's training pairs with another share of easy negatives; made on first use.

    Args:
        easy_share: 0 to 1; the world's own pairs have 0.7.
        cache: as `data_root`.
        seed: as `data_root`.

    Raises:
        UserError: they cannot be written.
    """
    from cwdpo_bench.demo.layouts import render_pairs

    folder = _cache(cache) / f"demo-{__version__}-{seed}-easy-{easy_share:g}"
    return _made(folder, lambda: render_pairs(folder, seed, easy_share)) / "train.jsonl"


def first_pairs(file: Path, number: int) -> Path:
    """A file beside it with the first pairs alone; the demo's are in no order.

    Args:
        file: preference data as JSON lines.
        number: of pairs to keep.

    Raises:
        UserError: it has fewer.
    """
    part = file.with_name(f"{file.stem}-first-{number}.jsonl")
    if not part.is_file():
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        if number > len(rows):
            raise UserError(f"pairs: {number}: {file} has {len(rows)}; ask for fewer")
        write_text(part, "".join(rows[:number]))
    return part


def _cache(cache: Path | None) -> Path:
    if cache is not None:
        return cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cwdpo-bench"


def _made(folder: Path, make: Callable[[], None]) -> Path:
    """The folder, made where it is not there."""
    if folder.is_dir():
        return folder
    try:
        make()
    except OSError as error:
        # Another process may have finished the same data first; theirs are as good.
        if folder.is_dir():
            return folder
        raise UserError(
            f"{folder}: the demo's data cannot be written ({error.strerror}); free space, mend "
            "the rights, or set XDG_CACHE_HOME"
        ) from error
    return folder
