"""Preference data in, checkpoints out: objectives, recipes, the trainer, learning dynamics.

`recipe.load_recipe` and `run.train` are the way in; `objectives` holds the pure functions.
"""
