"""A user's own things by name: `module:name`, from an installed module or the working directory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError, nearest


def load_named(name: str, kind: str, fits: Callable[[Any], bool]) -> Any:
    """Import `module:name`.

    Args:
        name: as the user wrote it.
        kind: what it must be, in a word, for errors.
        fits: whether what stands there is one.

    Raises:
        UserError: no such module, its import fails, or it holds no such thing.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{name!r}: cannot import {module_name!r} ({error}); start in the folder that holds "
            f"{module_name}.py, or install it"
        ) from error
    found = getattr(module, attribute, None)
    if found is None or not fits(found):
        known = [key for key, value in vars(module).items() if key[0] != "_" and fits(value)]
        raise UserError(
            f"{name!r}: no {kind} {attribute!r} in {module.__file__}; {nearest(attribute, known)}"
        )
    return found
