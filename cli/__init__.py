"""The front door: thin, with lazy imports; a module for what the user does."""

from cwdpo_bench.cli.app import app, main

__all__ = ["app", "main"]
