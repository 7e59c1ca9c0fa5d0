"""ℓ_floor and τ of the cooled loss: numbers, `auto` from the reference, or `auto-track`.

The paper names the tuning of the two as its open limitation. `auto` takes them once from the
reference's scores (SPEC 1); `auto-track` starts there and follows the policy as it moves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.objectives import cooling_weight
from cwdpo_bench.train.sections import Cooling

LEAST_TAU = 1e-6
"""Below it the rejected answers count as equally likely."""
LEAST_SHARE = 0.1
"""A tracked τ never falls under this share of its start: w_c would become a hard threshold."""


class CoolingParameters(NamedTuple):
    """ℓ_floor and τ as numbers, the treatment of the gradient, and a weight that overrules them."""

    floor: float
    tau: float
    detach: bool
    fixed: float | None = None

    def weight(self, confidence: torch.Tensor) -> torch.Tensor:
        """w_c of answers with mean log-probability `confidence`."""
        if self.fixed is not None:
            return torch.full_like(confidence, self.fixed)
        return cooling_weight(confidence, floor=self.floor, tau=self.tau, detach=self.detach)


def resolve_cooling(cooling: Cooling, confidence: torch.Tensor) -> CoolingParameters:
    """Numbers for `auto` and `auto-track`: mean and standard deviation of ℓ̄_ref(y_l) (SPEC 1).

    Args:
        cooling: the recipe's section.
        confidence: [pairs], ℓ̄_ref(y_l) of the stage's pairs, nats a token.

    Raises:
        UserError: τ is to be found and all rejected answers are equally likely, so that it were 0.
    """
    confidence = confidence.double()
    floor, tau = cooling.floor, cooling.tau
    if isinstance(floor, str):
        floor = float(confidence.mean())
    if isinstance(tau, str):
        found = float(confidence.std(correction=0))
        if found < LEAST_TAU:
            raise UserError(
                f"stage2.cooling.tau: {tau} found no spread among the rejected answers' "
                "likelihoods; set a number"
            )
        tau = found
    return CoolingParameters(float(floor), float(tau), cooling.detach, cooling.fixed)


class CoolingTracker(TrainerCallback, ExportableState):
    """ℓ_floor and τ re-estimated as the policy moves (`auto-track`).

    Exponential moving moments of ℓ̄_θ(y_l) over the training batches: after a batch of n pairs
    m ← (1 − ρ) m + ρ · mean(ℓ̄), s ← (1 − ρ) s + ρ · mean(ℓ̄²), ρ = min(1, n / memory);
    ℓ_floor = m, τ = √(s − m²), not under a tenth of its start. A batch is weighed with the moments
    of the batches before it. They start at those of the reference, so that the first step is that
    of `auto`. Several processes take the moments of all their pairs together.

    The state travels in the Trainer's own checkpoint (`trainer_state.json`).
    """

    def __init__(self, cooling: Cooling, confidence: torch.Tensor) -> None:
        """`confidence` is [pairs], ℓ̄_ref(y_l) of the stage's pairs."""
        self._cooling = cooling
        self.start = resolve_cooling(cooling, confidence)
        confidence = confidence.double()
        self._mean = float(confidence.mean())
        self._square = float(confidence.square().mean())

    @property
    def parameters(self) -> CoolingParameters:
        """The numbers of now; what the recipe fixes stays fixed."""
        floor, tau = self.start.floor, self.start.tau
        if self._cooling.floor == "auto-track":
            floor = self._mean
        if self._cooling.tau == "auto-track":
            spread = max(self._square - self._mean**2, 0.0) ** 0.5
            tau = max(spread, LEAST_SHARE * self.start.tau)
        return self.start._replace(floor=floor, tau=tau)

    def weight(self, confidence: torch.Tensor) -> torch.Tensor:
        """w_c of answers with mean log-probability `confidence` under the numbers of now."""
        return self.parameters.weight(confidence)

    def observe(self, confidence: torch.Tensor) -> None:
        """Take in ℓ̄_θ(y_l) of a training batch, [B]; to be called once a batch on every process."""
        values = confidence.detach().double()
        sums = torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        number, total, squares = sums.tolist()
        rate = min(1.0, number / self._cooling.memory)
        self._mean += rate * (total / number - self._mean)
        self._square += rate * (squares / number - self._square)

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in a checkpoint."""
        return {"args": {}, "attributes": {"mean": self._mean, "square": self._square}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the moments of the checkpoint that the run goes on from."""
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self._mean, self._square = saved["mean"], saved["square"]


def make_cooling(cooling: Cooling, confidence: torch.Tensor) -> CoolingParameters | CoolingTracker:
    """What the recipe asks for: numbers that stay, or a tracker."""
    if "auto-track" in (cooling.floor, cooling.tau):
        return CoolingTracker(cooling, confidence)
    return resolve_cooling(cooling, confidence)
