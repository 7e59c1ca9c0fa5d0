"""`trainer.report_to`: Weights & Biases, TensorBoard, MLflow, … by the Trainer's own callbacks.

The Trainer sends each line of its log, which holds our means of the objective's parts. Added here:
a missing tracker is told before anything is loaded, each stage is a run of its own under its name,
and the held-out dynamics are sent as `dynamics/…` without becoming lines of the Trainer's log.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from cwdpo_bench.errors import UserError, nearest, one_line
from cwdpo_bench.train.dynamics import DynamicsLog
from cwdpo_bench.train.recipe import Recipe

_CALLBACKS: dict[str, type[TrainerCallback]] = integration_utils.INTEGRATION_TO_CALLBACK
_PACKAGES = {
    "azure_ml": ("azureml.core", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet_ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""By the Trainer's names: the module that must be there, and what brings it."""


def named(recipe: Recipe, stage: str, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The `trainer:` keys with the name that trackers show: the recipe's, or `run_name`, and the
    stage's where there are two."""
    name = trainer.get("run_name") or recipe.name
    return {**trainer, "run_name": name if len(recipe.stages()) == 1 else f"{name}-{stage}"}


def refuse_missing(arguments: TrainingArguments) -> None:
    """Tell of a tracker that is not there.

    Raises:
        UserError: `report_to` names one that is unknown or not installed.
    """
    for name in arguments.report_to or ():
        if name not in _CALLBACKS:
            known = [*_CALLBACKS, "all", "none"]
            raise UserError(f"trainer.report_to: unknown {name!r}; {nearest(str(name), known)}")
        module, package = _PACKAGES.get(name, (None, ""))
        if module is not None and not (_is_there(module) or _is_there(f"{module}X")):
            raise UserError(
                f"trainer.report_to: {name} is not installed; pip install {package}, or leave it "
                "out with trainer.report_to=none"
            )


def _is_there(module: str) -> bool:
    """`tensorboardX` will do for `tensorboard`; no other has a second of that name."""
    try:
        found = importlib.util.find_spec(module)
        # A mere folder of that name has no origin: W&B leaves one wherever it ran.
        return found is not None and found.origin is not None
    except ModuleNotFoundError:
        # The package around it.
        return False


@contextmanager
def tracked(arguments: TrainingArguments) -> Iterator[None]:
    """A stage's runs in the trackers: their errors are told, and W&B's run ends with the stage.

    Raises:
        UserError: a tracker refuses (not logged in, its server not reached).
    """
    began = _wandb_run() is None
    try:
        yield
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        if library not in {module.split(".")[0] for module, _ in _PACKAGES.values()}:
            raise
        offline = "; log in with `wandb login` or set WANDB_MODE=offline"
        raise UserError(
            f"trainer.report_to: {library}: {one_line(error)}"
            f"{offline if library == 'wandb' else ''}; or train without it: "
            "trainer.report_to=none, which --resume allows"
        ) from error
    finally:
        if began and "wandb" in (arguments.report_to or ()) and (run := _wandb_run()) is not None:
            # The Trainer leaves it open, and the next stage's steps would go into it.
            run.finish()


def _wandb_run() -> Any:
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None)


class TrackDynamics(TrainerCallback):
    """Sends every measurement of a stage to the trackers; stands behind the one that measures."""

    def __init__(self, trainer: Trainer, log: DynamicsLog, stage: str) -> None:
        """`log` is where the measurements stand."""
        callbacks = trainer.callback_handler.callbacks
        kinds = tuple(_CALLBACKS.values())
        self._trackers = [callback for callback in callbacks if isinstance(callback, kinds)]
        self._log, self._stage = log, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The policy that the stage starts from."""
        if state.global_step == 0:
            self._send(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step after which there was a measurement."""
        self._send(args, state, control, **kwargs)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = self._log.of(self._stage) if self._trackers else []
        if not rows or rows[-1]["step"] != state.global_step:
            return
        figures = {
            f"dynamics/{name}": float(value)
            for name, value in rows[-1].items()
            if name not in ("stage", "step", "total_step") and _is_finite(value)
        }
        for tracker in self._trackers:
            tracker.on_log(args, state, control, logs=dict(figures), **kwargs)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
