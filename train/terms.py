"""From scores to a loss: an objective's function says by its parameters' names what it needs.

Its positional parameters name terms, its keyword-only parameters the keys of its recipe section.
A term is `QUANTITY_VIEW`, [B] in fp32 and nats, with a view of `train/views.py` and one of

- `logp`: Σ log π_θ over the answer's tokens; `mean_logp`: ℓ̄, the mean a token;
- `nll`: −ℓ̄, or −Σ log π_θ where the section says `nll: sum`;
- `delta`: Δ = log π_θ − log π_ref, a sum;

or `cooling`, the weight w_c of the rejected answer. Terms under no image are constants of the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.named import load_named
from cwdpo_bench.train.cooling import CoolingParameters
from cwdpo_bench.train.objectives import OBJECTIVES
from cwdpo_bench.train.sections import OPADPO, OPASFT, Custom, Objective
from cwdpo_bench.train.views import ANSWERS, SUFFIXES, answer_and_image

QUANTITIES = ("delta", "nll", "mean_logp", "logp")
COOLING = "cooling"
SAMPLED = frozenset({"ppo", "grpo"})
"""Kinds that judge answers of the policy's own by a reward, and read no term of a pair."""


class SequenceScores(NamedTuple):
    """Of B answers, each [B] in nats: the summed log-probability and the mean a token (ℓ̄)."""

    logp: torch.Tensor
    mean_logp: torch.Tensor


Scores = Mapping[str, SequenceScores]
"""By view, in the pairs' order."""


class _Signature(NamedTuple):
    """What an objective's function asks for: terms, keys, and the keys' defaults."""

    terms: tuple[str, ...]
    keys: tuple[str, ...]
    defaults: dict[str, Any]


def objective_function(kind: str) -> Callable[..., torch.Tensor]:
    """The function of a built-in kind, or the user's own of `module:function`."""
    return load_named(kind, "function", callable) if ":" in kind else OBJECTIVES[kind]


def _signature(kind: str) -> _Signature:
    if kind in SAMPLED:
        return _Signature((), (), {})
    parameters = inspect.signature(objective_function(kind)).parameters.values()
    keys = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    terms = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return _Signature(
        tuple(terms),
        tuple(p.name for p in keys),
        {p.name: p.default for p in keys if p.default is not p.empty},
    )


def check_custom(kind: str, keys: Mapping[str, Any]) -> None:
    """Hold a section's keys and a user's function against each other.

    Raises:
        UserError: the function cannot be imported, asks for a term that does not exist, or a key
            is unknown (the nearest is named) or missing.
    """
    signature = _signature(kind)
    for term in signature.terms:
        if _quantity_and_view(term) is None:
            raise UserError(
                f"{kind}: parameter {term!r} is no term; {nearest(term, known_terms())}"
            )
    for key in keys:
        if key not in signature.keys:
            raise UserError(f"unknown key {key!r}; {nearest(key, signature.keys)}")
    missing = [k for k in signature.keys if k not in keys and k not in signature.defaults]
    if missing:
        raise UserError(f"{kind}: the keys {missing} have no default; write them")


def known_terms() -> list[str]:
    """Every name that a positional parameter may have."""
    views = [answer + suffix for answer in ANSWERS for suffix in ("", *SUFFIXES)]
    return [COOLING, *(f"{quantity}_{view}" for quantity in QUANTITIES for view in views)]


def _quantity_and_view(term: str) -> tuple[str, str] | None:
    if term == COOLING:
        return "mean_logp", "rejected"
    for quantity in QUANTITIES:
        view = term.removeprefix(f"{quantity}_")
        if view != term and answer_and_image(view)[0] in ANSWERS:
            return quantity, view
    return None


def needed_views(objective: Objective) -> list[str]:
    """The views that an objective's terms are of, the pair's own image first."""
    found = [_quantity_and_view(term) for term in _signature(objective.kind).terms]
    views = dict.fromkeys(pair[1] for pair in found if pair is not None)
    order = known_terms()
    return sorted(views, key=lambda view: order.index(f"logp_{view}"))


def needs_rejected(objective: Objective) -> bool:
    """Whether the objective reads the data's rejected answers."""
    if isinstance(objective, OPASFT | OPADPO):
        # It makes its own, see `train/corrections.py`.
        return False
    return any(answer_and_image(view)[0] == "rejected" for view in needed_views(objective))


def needs_reference(objective: Objective) -> bool:
    """Whether the objective compares with a reference policy."""
    terms = _signature(objective.kind).terms
    return any(term == COOLING or term.startswith("delta_") for term in terms)


def loss_and_metrics(
    objective: Objective,
    scores: Scores,
    reference: Scores | None,
    cooling: CoolingParameters | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The scalar loss of a batch, and what is logged of it.

    Args:
        objective: which loss, with its parameters.
        scores: the policy's, of every view that the objective needs.
        reference: the reference's, of the same views.
        cooling: ℓ_floor and τ of now, for the cooled loss.
    """
    signature = _signature(objective.kind)
    values = {term: _term(term, objective, scores, reference, cooling) for term in signature.terms}
    keys = dict(signature.defaults)
    extra = (objective.model_extra or {}) if isinstance(objective, Custom) else {}
    for key in signature.keys:
        if key in extra or hasattr(objective, key):
            keys[key] = extra[key] if key in extra else getattr(objective, key)
    loss = objective_function(objective.kind)(*values.values(), **keys).mean()
    return loss, _metrics(values, keys, scores)


def _term(
    term: str,
    objective: Objective,
    scores: Scores,
    reference: Scores | None,
    cooling: CoolingParameters | None,
) -> torch.Tensor:
    found = _quantity_and_view(term)
    assert found is not None
    quantity, view = found
    policy = scores[view]
    if term == COOLING:
        assert cooling is not None
        return cooling.weight(policy.mean_logp)
    if quantity == "delta":
        assert reference is not None
        return policy.logp - reference[view].logp
    if quantity == "nll":
        return -(policy.logp if getattr(objective, "nll", "mean") == "sum" else policy.mean_logp)
    return policy.logp if quantity == "logp" else policy.mean_logp


def _metrics(
    values: dict[str, torch.Tensor], keys: dict[str, Any], scores: Scores
) -> dict[str, torch.Tensor]:
    metrics = {}
    for view, score in scores.items():
        metrics[f"logps/{view}"] = score.logp.mean()
        metrics[f"mean_logps/{view}"] = score.mean_logp.mean()
    if "nll_rejected" in values and "threshold" in keys:
        metrics["penalty/active"] = (values["nll_rejected"].mean() < keys["threshold"]).float()
    if {"delta_chosen", "delta_rejected"} <= values.keys():
        beta = keys.get("beta", 1.0)
        margin = values["delta_chosen"] - values["delta_rejected"]
        metrics["rewards/chosen"] = beta * values["delta_chosen"].mean()
        metrics["rewards/rejected"] = beta * values["delta_rejected"].mean()
        metrics["rewards/margins"] = beta * margin.mean()
        metrics["rewards/accuracies"] = (margin > 0).float().mean()
    if COOLING in values:
        metrics["cooling/mean"] = values[COOLING].mean()
    return metrics
