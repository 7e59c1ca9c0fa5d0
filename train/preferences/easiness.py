"""How easy a preference file's rejected answers are for a model, before any training.

Easy negatives are what a model already gives no probability to. On them DPO gains its margin by
pushing an improbable answer further down, and the probability that this frees goes to what is most
probable already: the squeezing effect (Ren and Sutherland, Learning Dynamics of LLM Finetuning,
ICLR 2025). Answers that differ by a word are the other danger: they share their tokens with the
chosen one, and pushing them down takes it along (Razin et al., Unintentional Unalignment, ICLR
2025). So both shares are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table

from cwdpo_bench.calibration.plots import plain_title, save_figure
from cwdpo_bench.files import write_json
from cwdpo_bench.train.cooling import resolve_cooling
from cwdpo_bench.train.data import Pair, read_pairs
from cwdpo_bench.train.layouts import AUTO
from cwdpo_bench.train.preferences.perturb import edit_size
from cwdpo_bench.train.sections import Cooling
from cwdpo_bench.train.trainer import reference_scores
from cwdpo_bench.vlm import VLM

EASY_MARGIN = 1.0
"""ℓ̄_ref(y_w) − ℓ̄_ref(y_l) above which a pair is easy: each token is e times as likely, nats."""
MANY = 0.5
"""The share of pairs from which a file is called by them."""
INVERTED = 0.7
"""The share from which chosen and rejected may be interchanged: half is what chance gives."""
ALIKE = 0.2
"""Words touched over words of the longer answer, up to which two answers are near copies."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Easiness:
    """The figures of a file under one model; log-probabilities are nats a token.

    Attributes:
        pairs: how many.
        chosen: mean of ℓ̄_ref(y_w).
        rejected: mean of ℓ̄_ref(y_l).
        margin_quantiles: of ℓ̄_ref(y_w) − ℓ̄_ref(y_l), at `QUANTILES`.
        easy: share of pairs with a margin above `EASY_MARGIN`.
        inverted: share of pairs whose rejected answer is the likelier one.
        edit: mean of the words by which two answers differ.
        alike: share of pairs whose answers differ in at most `ALIKE` of their words.
        floor: ℓ_floor as the recipe's `auto` would set it.
        tau: τ likewise.
        below_floor: share of rejected answers below the floor.
        cooling_mean: mean of w_c before the first step.
        verdict: in words.
    """

    pairs: int
    chosen: float
    rejected: float
    margin_quantiles: dict[str, float]
    easy: float
    inverted: float
    edit: float
    alike: float
    floor: float
    tau: float
    below_floor: float
    cooling_mean: float
    verdict: str

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Scores(NamedTuple):
    """ℓ̄_ref of every pair's answers, nats a token, fp64 [pairs] each."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def judge_file(
    data: Path,
    vlm: VLM,
    *,
    output: Path | None = None,
    with_images: bool = True,
    batch_size: int = 16,
    image_root: Path | None = None,
    layout: str = AUTO,
) -> Easiness:
    """The figures of a preference file under a model.

    Args:
        data: rows with chosen and rejected answers.
        vlm: the model, as a rule that from which training would start.
        output: a folder for `easiness.json` and `easiness.png`.
        with_images: without, the prompts' texts alone are given, and images need not be there.
        batch_size: pairs a forward.
        image_root: what image paths are relative to; default the file's folder.
        layout: of the rows, see `read_pairs`.

    Raises:
        UserError: bad data, or no spread among the rejected answers' likelihoods.
    """
    pairs = read_pairs(data, with_images=with_images, image_root=image_root, layout=layout).pairs
    scores = score_pairs(vlm, pairs, batch_size=batch_size)
    found = easiness(scores, pairs)
    if output is not None:
        record = {"data": str(data), "model": vlm.name, "images": with_images}
        write_json(output / "easiness.json", {**record, **found.record()})
        title = f"{data.name} under {vlm.name}"
        save_figure(plot_easiness(scores, found, title), output / "easiness.png")
    return found


def score_pairs(vlm: VLM, pairs: Sequence[Pair], *, batch_size: int = 16) -> Scores:
    """ℓ̄ of chosen and rejected answers under a model."""
    scores = reference_scores(vlm, list(pairs), batch_size)
    return Scores(*(scores[view].mean_logp.double() for view in ("chosen", "rejected")))


def easiness(scores: Scores, pairs: Sequence[Pair], cooling: Cooling | None = None) -> Easiness:
    """The figures and the verdict.

    Args:
        scores: of the pairs.
        pairs: whose words are compared.
        cooling: a recipe's section; default both `auto`.

    Raises:
        UserError: τ is to be found and all rejected answers are equally likely.
    """
    margins = scores.chosen - scores.rejected
    parameters = resolve_cooling(cooling or Cooling(), scores.rejected)
    easy, inverted = (float(s.double().mean()) for s in (margins > EASY_MARGIN, margins < 0))
    edits = [edit_size(pair.chosen, pair.rejected or "") for pair in pairs]
    alike = sum(map(_alike, pairs, edits)) / len(pairs)
    return Easiness(
        pairs=len(pairs),
        chosen=float(scores.chosen.mean()),
        rejected=float(scores.rejected.mean()),
        margin_quantiles={f"{q:g}": float(margins.quantile(q)) for q in QUANTILES},
        easy=easy,
        inverted=inverted,
        edit=sum(edits) / len(pairs),
        alike=alike,
        floor=parameters.floor,
        tau=parameters.tau,
        below_floor=float((scores.rejected < parameters.floor).double().mean()),
        cooling_mean=float(parameters.weight(scores.rejected).mean()),
        verdict=_verdict(easy, inverted, alike),
    )


def _alike(pair: Pair, edit: int) -> bool:
    words = max(len(pair.chosen.split()), len((pair.rejected or "").split()))
    return edit <= ALIKE * words


def _verdict(easy: float, inverted: float, alike: float) -> str:
    told = []
    if easy >= MANY:
        told.append(
            f"mostly easy: {easy:.0%} of the rejected answers are far below the chosen ones "
            "already; plain DPO may squeeze, so cool (cw-dpo), filter, or bring harder ones"
        )
    if inverted >= INVERTED:
        told.append(
            f"mostly inverted: the model prefers {inverted:.0%} of the rejected answers; see that "
            "chosen and rejected are not interchanged"
        )
    if alike >= MANY:
        told.append(
            f"mostly near copies: {alike:.0%} differ in at most {ALIKE:.0%} of their words; "
            "pushing the rejected answer down takes the chosen one along, so watch chosen log p"
        )
    return "; ".join(told) or "mixed: neither easy negatives nor near copies prevail"


def easiness_table(found: Easiness, title: str) -> Table:
    """The figures for the terminal."""
    table = Table(title=title, caption=found.verdict, show_header=False)
    quantiles = ", ".join(f"{q}: {value:+.2f}" for q, value in found.margin_quantiles.items())
    rows = {
        "pairs": f"{found.pairs}",
        "log p a token, chosen": f"{found.chosen:.3f}",
        "log p a token, rejected": f"{found.rejected:.3f}",
        "margin, quantiles": quantiles,
        f"easy (margin above {EASY_MARGIN:g})": f"{found.easy:.1%}",
        "inverted (margin below 0)": f"{found.inverted:.1%}",
        "words that differ, mean": f"{found.edit:.1f}",
        f"near copies (at most {ALIKE:.0%} of the words differ)": f"{found.alike:.1%}",
        "floor of the cooling, and τ": f"{found.floor:.3f}, {found.tau:.3f}",
        "rejected below the floor": f"{found.below_floor:.1%}",
        "mean w_c before the first step": f"{found.cooling_mean:.3f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def plot_easiness(scores: Scores, found: Easiness, title: str) -> Figure:
    """Histograms of both answers' log p a token, and of the margins."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    both, margin = figure.subplots(1, 2)
    both.hist(
        [scores.chosen.numpy(), scores.rejected.numpy()], bins=30, label=["chosen", "rejected"]
    )
    both.axvline(found.floor, color="black", linestyle="--", linewidth=1, label="floor")
    both.set(xlabel="log p a token (nats)", ylabel="pairs")
    both.legend()
    margin.hist((scores.chosen - scores.rejected).numpy(), bins=30, color="#0072B2")
    margin.axvline(EASY_MARGIN, color="black", linestyle="--", linewidth=1, label="easy from here")
    margin.axvline(0, color="black", linewidth=1)
    margin.set(xlabel="chosen minus rejected (nats a token)", ylabel="pairs")
    margin.legend()
    figure.suptitle(plain_title(title), fontsize=10)
    return figure
