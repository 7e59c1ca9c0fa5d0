"""A user's own functions, named `module:function` in a recipe."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError, nearest


def load_callable(name: str) -> Callable[..., Any]:
    """Import `module:function`; modules in the working directory are found too.

    Raises:
        UserError: no such module, its import fails, or it holds no such function.
    """
    module_name, _, function_name = name.partition(":")
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
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UserError(
            f"{name!r}: no function {function_name!r} in {module.__file__}; "
            f"{nearest(function_name, known)}"
        )
    return function
