"""`trainer.push_to_hub`: checkpoints on the Hugging Face Hub, by the Trainer's own switches.

The Trainer pushes the folder that it writes to, which is a stage's: without processor and record,
and with the token inside `training_args.bin`. So it never sees these switches, and what is pushed
is the finished checkpoint, and before it what `hub_strategy` asks for. A push that fails loses
nothing: all that it would have sent stays in the output folder.
"""

from __future__ import annotations

import logging
import shlex
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from pydantic import SecretStr
from transformers.trainer_utils import HubStrategy

from cwdpo_bench.errors import UserError, nearest, one_line
from cwdpo_bench.train.recipe import HUB_SWITCHES, Recipe

logger = logging.getLogger(__name__)

_FAILURES = (HfHubHTTPError, HTTPError, OSError, ValueError, RuntimeError)
"""What the Hub's client raises: refused, not reached, bad names, transfers of large files.

`HTTPError` is of whichever HTTP library the client is built on."""
_ONLY_TO_RESUME = [
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args.bin"),
    *("global_step*", "pytorch_model_fsdp*", "zero_to_fp32.py", "latest"),
]


@dataclass
class Hub:
    """Where a run is pushed to; made by `hub_of`."""

    output: Path
    name: str
    strategy: HubStrategy
    private: bool | None
    always: bool
    revision: str | None
    api: HfApi = field(repr=False)
    stages: tuple[str, ...]
    _under_way: list[Future[Any]] = field(default_factory=list)

    def open(self) -> None:
        """Make the repository, so that a name or a token that will not do is told before training.

        Where the Hub is not reached at all, training goes on: it may be at the end.

        Raises:
            UserError: the Hub refuses.
        """
        try:
            self._make()
        except _FAILURES as error:
            if _not_reached(error):
                logger.warning(
                    "trainer.push_to_hub: the Hub is not reached (%s); tried again at the end",
                    one_line(error),
                )
                return
            raise UserError(
                f"trainer.push_to_hub: the Hub refuses {self.name} ({one_line(error)}); log in "
                "with `hf auth login`, or set HF_TOKEN to a token that may write there, or name "
                "another trainer.hub_model_id"
            ) from error

    def checkpoint(self, folder: Path) -> None:
        """Push a checkpoint from the middle of the run in the background, as `hub_strategy` says.

        Without `hub_always_push` it is left out while the one before is still on its way.
        """
        pending = any(not push.done() for push in self._under_way)
        if self.strategy == HubStrategy.END or (pending and not self.always):
            return
        self._report()
        message = f"Training in progress, {folder.parent.name}, {folder.name}"
        self._send(folder, message, ignore=[*_ONLY_TO_RESUME, "trainer_state.json"])
        if self.strategy == HubStrategy.CHECKPOINT:
            self._send(folder, message, under="last-checkpoint")
        elif self.strategy == HubStrategy.ALL_CHECKPOINTS:
            self._send(folder, message, under=f"{folder.parent.name}/{folder.name}")

    def finish(self) -> str:
        """Push the finished checkpoint and wait for it; returns its address.

        Raises:
            UserError: it failed; what to do then.
        """
        self._report(wait=True)
        try:
            self._make()
            self._upload(self.output, "End of training", allow=self._final())
        except _FAILURES as error:
            raise UserError(
                f"{self.output}: trained and saved, all of it is in this folder, but not pushed "
                f"({one_line(error)}); push it by hand: {self.command()}; or run the same training "
                "command with --resume, which pushes alone"
            ) from error
        return f"{self.api.endpoint}/{self.name}"

    def command(self) -> str:
        """What pushes the finished checkpoint from a shell."""
        words = ["hf", "upload", self.name, str(self.output), "."]
        for pattern in self._final():
            words += ["--include", pattern]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words)

    def _make(self) -> None:
        made = self.api.create_repo(self.name, private=self.private, exist_ok=True)
        self.name = made.repo_id

    def _final(self) -> list[str]:
        """The checkpoint without the stages' own folders, but with their TensorBoard curves."""
        top = [path for path in sorted(self.output.iterdir()) if path.name[0] != "."]
        own = [path for path in top if path.name not in self.stages]
        return [
            *(f"{path.name}/*" if path.is_dir() else path.name for path in own),
            *(f"{name}/runs/*" for name in self.stages if (self.output / name / "runs").is_dir()),
        ]

    def _upload(
        self, folder: Path, message: str, *, allow: list[str] | None = None, **how: Any
    ) -> Any:
        if self.revision is not None:
            self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
        return self.api.upload_folder(
            repo_id=self.name,
            folder_path=folder,
            commit_message=message,
            revision=self.revision,
            allow_patterns=allow,
            **how,
        )

    def _send(
        self, folder: Path, message: str, *, under: str | None = None, ignore: Any = None
    ) -> None:
        how = {"path_in_repo": under, "ignore_patterns": ignore}
        self._under_way.append(
            self.api.run_as_future(self._upload, folder, message, **how)  # type: ignore[arg-type]
        )

    def _report(self, *, wait: bool = False) -> None:
        """Tell of background pushes that failed; the end sends what counts."""
        for push in [one for one in self._under_way if wait or one.done()]:
            self._under_way.remove(push)
            if (error := push.exception()) is not None:
                logger.warning(
                    "trainer.push_to_hub: a checkpoint was not pushed: %s", one_line(error)
                )


def hub_of(recipe: Recipe, output: Path) -> Hub | None:
    """Where the recipe's `trainer:` wants a run to be pushed; None where it does not.

    Raises:
        UserError: a switch has a value that the Trainer does not know.
    """
    switches = dict(recipe.trainer)
    for stage in recipe.stages().values():
        switches |= {key: value for key, value in stage.trainer.items() if key in HUB_SWITCHES}
    if not switches.get("push_to_hub"):
        return None
    strategy = switches.get("hub_strategy", HubStrategy.EVERY_SAVE.value)
    known = [one.value for one in HubStrategy]
    if strategy not in known:
        hint = nearest(str(strategy), known)
        raise UserError(f"trainer.hub_strategy: unknown {strategy!r}; {hint}")
    token = switches.get("hub_token")
    return Hub(
        output,
        switches.get("hub_model_id") or output.resolve().name,
        HubStrategy(strategy),
        switches.get("hub_private_repo"),
        bool(switches.get("hub_always_push")),
        switches.get("hub_revision"),
        HfApi(token=token.get_secret_value() if isinstance(token, SecretStr) else token),
        tuple(recipe.stages()),
    )


def _not_reached(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code >= 500
    if isinstance(error, LocalTokenNotFoundError | HFValidationError):
        return False
    return isinstance(error, OfflineModeIsEnabled | HTTPError | OSError)
