"""Train vision-language models with CW-DPO and prove whether a checkpoint is better.

The rooms: ``calibration`` (arrays in, numbers out), ``vlm`` (the model as both sides need it),
``evaluate`` (benchmarks and scores), ``train`` (objectives and recipes), ``leaderboards``
(paired comparison) and ``demo`` (the rendered world and its tiny model).
"""

__version__ = "0.1.0"
